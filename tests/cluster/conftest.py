"""Ray Serve warns while it is imported; everything else stays an error."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", r"ignore::DeprecationWarning:ray\.")
    config.addinivalue_line("filterwarnings", r"ignore::FutureWarning:ray\.")
