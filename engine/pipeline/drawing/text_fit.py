"""`TextFit`: puts into a box of a picture the first of several texts that fits, upright or turned."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZES = (10.0, 8.5)
_TURNED_SIZES = (8.5, 7.5)
_PADDING = 5.0  # dots on each side


class TextFit:
    """For one pair of axes, whose limits are final."""

    def __init__(self, figure: "Figure", axes: "Axes") -> None:
        self._renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
        self._axes = axes
        self._sizes: dict[tuple[str, float], tuple[float, float]] = {}

    def add(
        self, across: tuple[float, float], down: tuple[float, float], choices: Sequence[Sequence[str]], colour: str
    ) -> None:
        """Write the first text that fits the box, in the middle of it; nothing where none does.

        A choice is several texts of which all are tried upright before any is turned, and both before the next choice.
        """
        corners = self._axes.transData.transform([(across[0], down[0]), (across[1], down[1])])
        width, height = abs(corners[1] - corners[0]) - 2 * _PADDING
        found = next(
            (
                (text, size, turn)
                for texts in choices
                for turn, sizes in ((0, _SIZES), (90, _TURNED_SIZES))
                for text in texts
                for size in sizes
                if self._fits(text, size, (height, width) if turn else (width, height))
            ),
            None,
        )
        if found is not None:
            text, size, turn = found
            middle = (sum(across) / 2, sum(down) / 2)
            self._axes.text(
                *middle, text, size=size, rotation=turn, ha="center", va="center", color=colour, linespacing=1.25
            )

    def _fits(self, text: str, size: float, room: tuple[float, float]) -> bool:
        width, height = self._size(text, size)
        return width <= room[0] and height <= room[1]

    def _size(self, text: str, size: float) -> tuple[float, float]:
        """Dots that a text takes, measured once."""
        if (text, size) not in self._sizes:
            artist = self._axes.text(0, 0, text, size=size, linespacing=1.25)
            extent = artist.get_window_extent(self._renderer)
            artist.remove()
            self._sizes[text, size] = extent.width, extent.height
        return self._sizes[text, size]
