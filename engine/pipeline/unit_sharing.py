"""`UnitSharing`: how fast an operation runs with a part of a device's execution units, the table R -> P of NanoFlow.

The paper (arXiv 2408.12757, section 4.1.1, table 3) found on an A100 that one table serves all sizes: products of
matrices lose in proportion to the units they give up, what is bound by memory or by the network loses less. Torch-free.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from engine.pipeline.schedule import ALL_UNITS


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSharing:
    """Speeds with one tenth to ten tenths of the units, relative to all of them. `name` says whose table it is."""

    name: str
    compute: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    memory: tuple[float, ...]
    network: tuple[float, ...]

    def __post_init__(self) -> None:
        assert {len(speeds) for speeds in (self.compute, self.memory, self.network)} == {ALL_UNITS}

    def speeds(self, resource: str) -> tuple[float, ...]:
        """The ten speeds of an operation bound by `resource`: compute, memory or network."""
        return {"compute": self.compute, "memory": self.memory, "network": self.network}[resource]


# The paper prints .1, .2, .8, .9 and 1; those between lie on straight lines, rounded to a fortieth.
PAPER_SHARING = UnitSharing(
    name="NanoFlow's paper",
    memory=(0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.775, 0.85, 0.95, 1.0),
    network=(0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0, 1.0),
)

# Its repository's files, a bit more optimistic; the network's end at .5, and from there on are filled in here.
REPOSITORY_SHARING = UnitSharing(
    name="NanoFlow's repository",
    memory=(0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0),
    network=(0.4, 0.6, 0.7, 0.8, 0.9, 0.9, 0.95, 0.95, 1.0, 1.0),
)


class SharingName(StrEnum):
    """The tables by name, for people who choose one."""

    PAPER = "paper"
    REPOSITORY = "repository"
    NONE = "none"


# With no table nothing is divided and nothing lost: what runs side by side runs as fast as alone.
SHARINGS: Mapping[SharingName, UnitSharing | None] = {
    SharingName.PAPER: PAPER_SHARING,
    SharingName.REPOSITORY: REPOSITORY_SHARING,
    SharingName.NONE: None,
}
