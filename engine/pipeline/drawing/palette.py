"""`Palette`: a colour for each operation, in a shade for each nano-batch. The same operations get the same colours."""

from collections.abc import Iterable

from engine.pipeline.schedule import Lane
from engine.pipeline.timeline import TimelineEvent

Colour = tuple[int, int, int]

# Ten colours that differ in hue and lightness, also for most colour-blind readers.
_COLOURS: tuple[Colour, ...] = (
    (58, 110, 165),
    (222, 130, 45),
    (78, 154, 78),
    (200, 72, 74),
    (140, 108, 176),
    (60, 160, 165),
    (200, 165, 40),
    (175, 95, 140),
    (125, 100, 80),
    (110, 118, 128),
)
# How much white the shades of the nano-batches have; a fifth one looks like the first again.
_WHITE = (0.0, 0.42, 0.22, 0.6)


class Palette:
    """Colours for the operations of some events."""

    def __init__(self, events: Iterable[TimelineEvent]) -> None:
        order = list(Lane)
        operations = sorted({(order.index(event.lane), event.operation) for event in events})
        self._colours = {
            operation: _COLOURS[index % len(_COLOURS)]
            for index, operation in enumerate(dict.fromkeys(name for _, name in operations))
        }

    @property
    def operations(self) -> tuple[str, ...]:
        """All that have a colour, lane by lane."""
        return tuple(self._colours)

    def of(self, operation: str, nano_batch: int = 0) -> Colour:
        """The colour of a box."""
        white = _WHITE[nano_batch % len(_WHITE)]
        red, green, blue = (round(part + (255 - part) * white) for part in self._colours[operation])
        return red, green, blue


def ink(background: Colour) -> Colour:
    """Black or white, whichever reads better on `background`."""
    red, green, blue = background
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


def hexadecimal(colour: Colour) -> str:
    """As "#rrggbb"."""
    return "#{:02x}{:02x}{:02x}".format(*colour)
