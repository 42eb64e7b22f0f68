"""A `Timeline` drawn with characters: a row of boxes for each lane, time from left to right.

    compute  ┌qkv_proj────┐        ┌o_proj──────╦qkv_proj═══╗
             │0:768       │        │0:768       ║768:2048   ║
             └40%─────────┘        └────────────╩90%════════╝

The tokens are in the lower edge where there are no shares of the execution units to tell. Boxes of every other
nano-batch have double lines, so that the drawing reads without colours, too. What is shorter than half a column is
left out.
"""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text

from engine.pipeline.drawing.label import names, share, tokens
from engine.pipeline.drawing.palette import Colour, Palette, hexadecimal, ink
from engine.pipeline.drawing.scale import milliseconds, ticks
from engine.pipeline.drawing.track import Track, tracks
from engine.pipeline.drawing.window import Window
from engine.pipeline.schedule import ALL_UNITS
from engine.pipeline.timeline import Timeline, TimelineEvent

_COLUMNS_PER_TICK = 12
_WIDE = 150


@dataclass(frozen=True, slots=True)
class _Line:
    """Characters of one line of a box: what fills it, its left side, that beside another box, its right side."""

    fill: str
    left: str
    junction: str
    right: str


_SINGLE = (_Line(*"─┌┬┐"), _Line(*" │││"), _Line(*"─└┴┘"))
_DOUBLE = (_Line(*"═╔╦╗"), _Line(*" ║║║"), _Line(*"═╚╩╝"))


@dataclass(frozen=True, slots=True)
class _Box:
    """An event from column `first` to column `last`, where the next box may begin. `texts`: for each line, several
    to choose from, the longest first.
    """

    first: int
    last: int
    texts: tuple[tuple[str, ...], ...]
    style: str
    is_double: bool

    def line(self, number: int, *, is_joined: bool) -> str:
        """One of its lines with both sides; `is_joined` where another box ends at its left side."""
        # The last line of two is the lower edge as well.
        line = (_DOUBLE if self.is_double else _SINGLE)[number if number < len(self.texts) - 1 else -1]
        room = self.last - self.first - 1
        text = _fitting(self.texts[number], room)
        return (line.junction if is_joined else line.left) + text.ljust(room, line.fill) + line.right


def draw_in_terminal(timeline: Timeline, width: int, window: Window | None = None) -> Text:
    """The drawing, no line longer than `width` columns; by default of one layer, or two where the terminal is wide."""
    window = window or Window.steady(timeline, 2 if width >= _WIDE else 1)
    events = window.events(timeline)
    if not events:
        return Text("(nothing ran)")
    rows, palette = tracks(events), Palette(events)
    has_ranks = len({row.rank for row in rows}) > 1
    titles = [f"rank {row.rank} {row.name}" if has_ranks else row.name for row in rows]
    margin = max(map(len, titles)) + 2
    columns = max(20, width - margin)
    scale = (columns - 1) / window.seconds
    lines = [Text(" " * margin + _layers(window, columns, scale))]
    has_shares = any(event.share < ALL_UNITS for event in events)
    for title, row in zip(titles, rows, strict=True):
        boxes = _boxes(row, window, scale, palette, has_shares=has_shares)
        for number in range(3 if has_shares else 2):
            lines.append(Text((title if number == 0 else "").ljust(margin)) + _row(boxes, number, columns))
    lines.append(Text("ms".ljust(margin) + _axis(window, columns, scale)))
    return Text("\n").join([*lines, *_legend(palette, width), *_explanation(events, width)])


def _boxes(row: Track, window: Window, scale: float, palette: Palette, *, has_shares: bool) -> list[_Box]:
    boxes: list[_Box] = []
    for event in row.events:
        first = round((event.start - window.start) * scale)
        last = round((event.end - window.start) * scale)
        first = max(first, boxes[-1].last) if boxes else first
        if last <= first:
            continue
        background = palette.of(event.operation, event.nano_batch)
        texts = (names(event.operation), (tokens(event), ""), *([(share(event), "")] if has_shares else []))
        boxes.append(_Box(first, last, texts, _style(background), event.nano_batch % 2 == 1))
    return boxes


def _row(boxes: Sequence[_Box], number: int, columns: int) -> Text:
    """Line `number` of the boxes of a lane."""
    row, reached = Text(), -1
    for box in boxes:
        is_joined = box.first == reached
        if is_joined:
            row.right_crop(1)
        row.append(" " * (box.first - len(row)))
        row.append(box.line(number, is_joined=is_joined), box.style)
        reached = box.last
    row.truncate(columns)
    return row


def _style(background: Colour) -> str:
    return f"{hexadecimal(ink(background))} on {hexadecimal(background)}"


def _fitting(texts: Sequence[str], room: int) -> str:
    """The first of the texts that fits, else what fits of the last one."""
    return next((text for text in texts if len(text) <= room), texts[-1][:room])


def _layers(window: Window, columns: int, scale: float) -> str:
    """Where each layer begins."""
    line = ""
    for layer, start in window.begins:
        column = round((start - window.start) * scale)
        if column > len(line) or not line:
            line = line.ljust(column) + f"│layer {layer}"
    return line[:columns]


def _axis(window: Window, columns: int, scale: float) -> str:
    """Marks at round times since the window began."""
    line = ""
    for tick in ticks(window.seconds, columns // _COLUMNS_PER_TICK):
        line = line.ljust(round(tick * scale)) + f"╵{milliseconds(tick)}"
    return line[:columns]


def _legend(palette: Palette, width: int) -> Iterator[Text]:
    """What the short names mean."""
    line = Text()
    for operation in palette.operations:
        entry = Text(f" {names(operation)[-1]} ", _style(palette.of(operation)))
        entry = Text.assemble(entry, f" {operation}")
        if line and len(line) + 3 + len(entry) > width:
            yield line
            line = Text()
        line = Text.assemble(line, "   " if line else "", entry)
    yield line


def _explanation(events: Sequence[TimelineEvent], width: int) -> Iterator[Text]:
    """How to read a box."""
    parts = [f"{range_} are positions in the batch" for range_ in list(filter(None, map(tokens, events)))[:1]]
    parts += [f"{part} is the share of the execution units" for part in list(filter(None, map(share, events)))[:1]]
    if any(event.nano_batch for event in events):
        parts.append("double lines: the second nano-batch")
    yield from map(Text, textwrap.wrap("; ".join(parts) + ".", width))
