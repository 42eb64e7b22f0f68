"""The versions that are installed, against what nanoserve declares."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cluster.doctor.finding import Finding, error, ok, warning

CHECK = "versions"
_DISTRIBUTION = "nanoserve"
_SHOWN = ("torch", "ray", "triton", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """`installed` has None for what is missing; `required` are specifiers by name, as far as they apply here.

    Both are by the name in lower case with dashes. Without an installed nanoserve nothing is declared.
    """

    python: str
    requires_python: str
    installed: dict[str, str | None]
    required: dict[str, str]
    is_declared: bool = True


def read_versions() -> Versions:
    """Of this interpreter."""
    python = ".".join(map(str, sys.version_info[:3]))
    try:
        declared = metadata.metadata(_DISTRIBUTION)
        texts: Sequence[str] = metadata.requires(_DISTRIBUTION) or ()
    except metadata.PackageNotFoundError:
        installed = {name: _installed(name) for name in _SHOWN}
        return Versions(python=python, requires_python="", installed=installed, required={}, is_declared=False)
    parsed = [Requirement(text) for text in texts]
    required = {
        _normal(each.name): str(each.specifier)
        for each in parsed
        if each.marker is None or each.marker.evaluate({"extra": ""})
    }
    names = {*required, *_SHOWN}
    return Versions(
        python=python,
        requires_python=declared["Requires-Python"] or "",
        installed={name: _installed(name) for name in sorted(names)},
        required=required,
    )


def judge_versions(versions: Versions) -> list[Finding]:
    """An error for each that is missing or does not fit; else one line with those that matter most."""
    where = f"Python {versions.python} at {sys.prefix}"
    if not versions.is_declared:
        remedy = "Install the checkout: `make install`, or `pip install -e .`."
        return [warning(CHECK, "nanoserve is not installed here, so nothing says what it needs.", where, remedy)]
    findings = []
    if not _fits(versions.python, versions.requires_python):
        findings.append(
            error(
                CHECK,
                f"Python {versions.python} does not fit {versions.requires_python}.",
                where,
                "Make the environment anew with a Python that fits: `make install PYTHON=/path/to/python3`.",
            )
        )
    for name, specifier in sorted(versions.required.items()):
        installed = versions.installed.get(name)
        if installed is None or not _fits(installed, specifier):
            state = "is not installed" if installed is None else f"{installed} does not fit {specifier}"
            findings.append(error(CHECK, f"{name} {state}.", where, f"Run `pip install '{name}{specifier}'` there."))
    if findings:
        return findings
    shown = [f"{name} {versions.installed[name]}" for name in _SHOWN if versions.installed.get(name)]
    return [ok(CHECK, ", ".join([f"Python {versions.python}", *shown]) + ".", where)]


def _fits(version: str, specifier: str) -> bool:
    return SpecifierSet(specifier).contains(version, prereleases=True)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
