"""`PlanStore`: plans and profiles on disk, a file per fingerprint, in the user's cache directory; shipped ones beside.

A fingerprint that is not there is a miss with a reason: what differs from the nearest one that is. A file that cannot
be used is reported, moved aside and counts as a miss; so does one that cannot be read, which stays where it is. Several
replicas may read and write at once: a file is replaced as a whole, and the last writer wins.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError
from engine.pipeline.atomic_file import read_file, replace_file
from engine.pipeline.fingerprint import Fingerprint, differences, fingerprint_hash
from engine.pipeline.json_value import JsonValue
from engine.pipeline.plan_set import FORMAT, PlanSet
from engine.user_cache import cache_directory

_log = logging.getLogger(__name__)


def shipped_directory() -> Path | None:
    """Plans that come with a checkout: `deploy/schedules`, beside this package; None in an installation without it."""
    root = Path(__file__).resolve().parents[2]
    shipped = root / "deploy" / "schedules"
    # An installed package lies among others, where a folder of that name would be somebody else's.
    return shipped if (root / "pyproject.toml").is_file() and shipped.is_dir() else None


@dataclass(frozen=True, slots=True)
class Found:
    """What a search brought: plans or None, and in words where they come from or why there are none."""

    plans: PlanSet | None
    reason: str


class PlanStore:
    """`cache` is read and written; `shipped` (deploy/schedules of a checkout) holds a folder per device, only read."""

    def __init__(self, cache: Path | None = None, shipped: Path | None = None) -> None:
        # The folder names the format: an older version of this program must not move a newer one's files aside.
        self._cache = (cache or cache_directory()) / f"format-{FORMAT}"
        self._shipped = shipped

    def plans_path(self, fingerprint: Fingerprint) -> Path:
        """The file that holds, or would hold, the plans of this fingerprint."""
        return self._cache / "plans" / f"{fingerprint_hash(fingerprint)}.json"

    def profile_path(self, fingerprint: Fingerprint, grid: str = "") -> Path:
        """The file in which the profiler keeps what it has measured so far, and all of it in the end.

        With the name of a `grid` a file of its own, so that a start's quick profile replaces none that took longer.
        """
        name = "-".join(part for part in (fingerprint_hash(fingerprint), grid) if part)
        return self._cache / "profiles" / f"{name}.json"

    def find(self, fingerprint: Fingerprint) -> Found:
        """The plans of this fingerprint: the user's own, else shipped ones, else a reason."""
        own = self.plans_path(fingerprint)
        others: list[Fingerprint] = []
        for path in [own, *self._shipped_files(own.name)]:
            plans = self._read(path)
            if plans is not None and not differences(plans.fingerprint, fingerprint):
                return Found(plans, f"plans of {path}")
        for path in [*_files(own.parent, "*.json"), *self._shipped_files("*.json")]:
            stored = _fingerprint(path)
            if stored is not None and differences(stored, fingerprint):
                others.append(stored)
        if not others:
            return Found(None, "no plans are stored yet")
        nearest = min((differences(other, fingerprint) for other in others), key=len)
        return Found(None, f"no plans for this setup; the nearest stored ones differ: {'; '.join(nearest)}")

    def save(self, plans: PlanSet) -> Path:
        """Write the plans to the cache and return the file; raises `ConfigError` where it cannot be written."""
        path = self.plans_path(plans.fingerprint)
        replace_file(path, str(plans))
        return path

    def _shipped_files(self, pattern: str) -> Iterator[Path]:
        if self._shipped is not None:
            yield from _files(self._shipped, f"*/{pattern}")

    def _read(self, path: Path) -> PlanSet | None:
        """None for a file that is not there or cannot be used; the latter is reported and, in the cache, moved."""
        try:
            text = read_file(path)
            if text is None:
                return None
            plans = PlanSet.parse(text, str(path))
            if f"{fingerprint_hash(plans.fingerprint)}.json" != path.name:
                raise ConfigError(f"{path} holds the plans of another fingerprint than it is named after.")
        except ConfigError as error:
            if path.is_relative_to(self._cache):
                aside = path.with_suffix(".corrupt")
                _log.warning("%s It is moved to %s and planned anew.", error, aside.name)
                try:
                    path.replace(aside)
                except FileNotFoundError:
                    pass  # another replica was quicker
                except OSError as failure:
                    _log.warning("%s could not be moved aside: %s.", path, failure.strerror)
            else:
                _log.warning("%s It is not used.", error)
            return None
        return plans


def _files(folder: Path, pattern: str) -> list[Path]:
    """In the order of their names; none of a folder that is not there or may not be looked into."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def _fingerprint(path: Path) -> Fingerprint | None:
    """The fingerprint of a stored file; None for one that cannot be read, which whoever wants its plans will report."""
    try:
        facts = JsonValue.read(path).entries()["fingerprint"].entries()
        return {key: text.text() for key, text in facts.items()}
    except (ConfigError, KeyError):
        return None
