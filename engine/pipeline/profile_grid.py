"""`ProfileGrid`: at which sizes and contexts the operations of a layer are measured, and for about how long."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileGrid:
    """What is measured, and for about how long in all: making the inputs and the least repetitions come on top.

    `sizes` are fractions of the dense batch (for decodes: of the most sequences), `contexts` of the longest sequence.
    """

    name: str
    seconds: float
    sizes: tuple[float, ...]
    contexts: tuple[float, ...]


QUICK = ProfileGrid(name="quick", seconds=4.0, sizes=(1 / 32, 1 / 8, 1 / 4, 1 / 2, 1.0), contexts=(1 / 8, 1 / 2))
THOROUGH = ProfileGrid(
    name="thorough",
    seconds=60.0,
    sizes=(1 / 128, 1 / 64, 1 / 32, *(part / 16 for part in range(1, 17))),
    contexts=(1 / 16, 1 / 4, 3 / 4),
)
