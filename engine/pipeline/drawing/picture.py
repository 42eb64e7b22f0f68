"""A `Timeline` as a picture: a row of boxes for each lane, time from left to right, as in figure 6 of NanoFlow's paper.

Needs matplotlib, which is imported when a picture is drawn. No text is wider than its box: what does not fit is
shortened, turned, or left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import ConfigError
from engine.pipeline.drawing.label import names, share, tokens
from engine.pipeline.drawing.palette import Palette, hexadecimal, ink
from engine.pipeline.drawing.scale import milliseconds, ticks
from engine.pipeline.drawing.text_fit import TextFit
from engine.pipeline.drawing.track import Track, tracks
from engine.pipeline.drawing.window import Window
from engine.pipeline.schedule import ALL_UNITS
from engine.pipeline.timeline import Timeline, TimelineEvent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 15.0  # inches, as all lengths that are not times
_ROW, _HEAD, _FOOT, _MARGIN, _GAP_OF_RANKS = 0.95, 1.05, 1.05, 1.15, 0.35
_BOX = 0.88  # of a row
_DOTS_PER_INCH = 120
_MOST_TICKS, _MOST_COLUMNS = 12, 8
_INK, _FAINT, _LANE = "#222222", "#8a8f98", "#f1f3f5"


def check_matplotlib() -> None:
    """Raise `ConfigError` where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("drawing a picture needs matplotlib: pip install matplotlib.") from error


def write_picture(timeline: Timeline, path: Path, heading: str, window: Window | None = None) -> None:
    """Draw two layers of the steady state, or `window`, under the timeline's title and `heading`.

    The ending of `path` (.png, .pdf, .svg) says in which format. Raises `ConfigError` where matplotlib is not
    installed, the format is unknown or the file cannot be written.
    """
    figure = draw_picture(timeline, heading, window or Window.steady(timeline, 2))
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"The picture cannot be written to {path}: {error}.") from error


def draw_picture(timeline: Timeline, heading: str, window: Window) -> "Figure":
    """The figure; raises `ConfigError` where matplotlib is not installed."""
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    events = window.events(timeline)
    rows = tracks(events)
    places = _places(rows)
    height = _HEAD + _FOOT + _ROW + (places[-1] if rows else 0.0)
    figure = Figure(figsize=(_WIDTH, height), dpi=_DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    picture = _Picture(figure, window, Palette(events), height)
    for row, place in zip(rows, places, strict=True):
        picture.add_row(row, place, has_ranks=rows[-1].rank > 0)
    picture.add_layers()
    picture.add_heading(timeline.title, heading)
    picture.add_legend(events)
    return figure


def _places(rows: Sequence[Track]) -> list[float]:
    """How far below the first row each one lies, in inches; between ranks there is a gap."""
    places: list[float] = []
    for index, row in enumerate(rows):
        is_new_rank = index > 0 and row.rank != rows[index - 1].rank
        places.append(places[-1] + _ROW + (_GAP_OF_RANKS if is_new_rank else 0.0) if places else 0.0)
    return places


@dataclass
class _Picture:
    """A figure that is being drawn: x in milliseconds since the window began, y in inches from the top, downwards."""

    figure: "Figure"
    window: Window
    palette: Palette
    height: float

    def __post_init__(self) -> None:
        bottom, top = _FOOT / self.height, 1 - _HEAD / self.height
        self.axes: Axes = self.figure.add_axes((_MARGIN / _WIDTH, bottom, 1 - (_MARGIN + 0.3) / _WIDTH, top - bottom))
        self.axes.set_xlim(0, 1e3 * self.window.seconds)
        self.axes.set_ylim(self.height - _HEAD - _FOOT, 0)
        self.axes.set_yticks([])
        marks = ticks(self.window.seconds, _MOST_TICKS)
        self.axes.set_xticks([1e3 * mark for mark in marks], [milliseconds(mark) for mark in marks])
        self.axes.tick_params(colors=_FAINT, labelcolor=_INK, labelsize=9)
        for side, spine in self.axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(_FAINT)
        # In the margin, level with the marks, where no mark can be.
        self.axes.annotate(
            "ms", (0, 0), (-14, -5), "axes fraction", "offset points", ha="right", va="top", size=9, color=_INK
        )
        self._fit = TextFit(self.figure, self.axes)

    def add_row(self, row: Track, place: float, *, has_ranks: bool) -> None:
        """The boxes of a lane, on a grey ground that shows where it is idle."""
        from matplotlib.patches import Rectangle

        top, length = place + _ROW * (1 - _BOX) / 2, _ROW * _BOX
        self.axes.add_patch(Rectangle((0, top), 1e3 * self.window.seconds, length, color=_LANE, linewidth=0, zorder=0))
        title = f"rank {row.rank}\n{row.name}" if has_ranks else row.name
        self.axes.annotate(
            title,
            (0, place + _ROW / 2),
            (-12, 0),
            ("axes fraction", "data"),
            "offset points",
            ha="right",
            va="center",
            size=11,
            color=_INK,
            linespacing=1.4,
        )
        for event in row.events:
            self._add_box(event, top, length)

    def _add_box(self, event: TimelineEvent, top: float, length: float) -> None:
        from matplotlib.patches import Rectangle

        start, stop = (1e3 * (time - self.window.start) for time in (event.start, event.end))
        colour = self.palette.of(event.operation, event.nano_batch)
        box = Rectangle(
            (start, top), stop - start, length, facecolor=hexadecimal(colour), edgecolor="white", linewidth=0.8
        )
        self.axes.add_patch(box)
        ways, details = names(event.operation), [text for text in (tokens(event), share(event)) if text]
        in_lines = ["\n".join([name, *details]) for name in ways]
        in_a_line = [" ".join([ways[-1], *details]), " ".join([ways[-1], *details[:1]])]
        choices = ([*in_lines, *in_a_line], [ways[-1]])
        self._fit.add((start, stop), (top, top + length), choices, hexadecimal(ink(colour)))

    def add_layers(self) -> None:
        """A line where each layer begins."""
        for layer, begin in self.window.begins:
            time = 1e3 * (begin - self.window.start)
            self.axes.axvline(time, color=_INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0.5)
            if len(self.window.begins) <= _MOST_TICKS:
                self.axes.annotate(
                    f"layer {layer}", (time, 0), (3, 4), ("data", "data"), "offset points", size=9, color=_INK
                )

    def add_heading(self, title: str, heading: str) -> None:
        """Two lines above the lanes."""
        left = _MARGIN / _WIDTH
        self.figure.text(left, 1 - 0.36 / self.height, title, size=14, weight="bold", color=_INK)
        self.figure.text(left, 1 - 0.63 / self.height, heading, size=10.5, color=_INK)

    def add_legend(self, events: Sequence[TimelineEvent]) -> None:
        """Colours, and how to read a box, below the lanes."""
        from matplotlib.patches import Patch

        patches = [
            Patch(facecolor=hexadecimal(self.palette.of(operation)), label=operation)
            for operation in self.palette.operations
        ]
        self.figure.legend(
            handles=patches,
            loc="upper left",
            bbox_to_anchor=(_MARGIN / _WIDTH, 0.66 / self.height),
            ncols=_MOST_COLUMNS if len(patches) <= _MOST_COLUMNS else -(-len(patches) // 2),
            frameon=False,
            fontsize=9,
            handlelength=1.2,
            columnspacing=1.3,
            borderaxespad=0,
            borderpad=0,
        )
        notes = ["A box: operation, positions in the batch"]
        if any(event.share < ALL_UNITS for event in events):
            notes.append("share of the execution units where not all")
        if any(event.nano_batch for event in events):
            notes.append("lighter: another nano-batch")
        self.figure.text(_MARGIN / _WIDTH, 0.12 / self.height, "; ".join(notes) + ". Grey: idle.", size=9, color=_FAINT)
