"""What an installation contributes: exactly the two packages, under one name, never to be uploaded by accident."""

from importlib.metadata import metadata, packages_distributions


def test_both_packages_come_from_nanoserve_alone() -> None:
    owners = packages_distributions()
    assert set(owners["engine"]) == {"nanoserve"}
    assert set(owners["cluster"]) == {"nanoserve"}


def test_distribution_is_private() -> None:
    assert "Private :: Do Not Upload" in metadata("nanoserve").get_all("Classifier", [])
