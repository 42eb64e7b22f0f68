"""A `Timeline` as SVG, for a browser: a row of boxes for each lane, time from left to right, light or dark.

Written by hand, as text: it costs a server a few milliseconds and no library of pictures. Whatever it shows is escaped.
"""

from collections.abc import Iterator, Sequence
from html import escape

from engine.pipeline.drawing.label import names, tokens
from engine.pipeline.drawing.palette import Palette, hexadecimal, ink
from engine.pipeline.drawing.scale import milliseconds, ticks
from engine.pipeline.drawing.track import Track, tracks
from engine.pipeline.drawing.window import Window
from engine.pipeline.timeline import Timeline, TimelineEvent

WIDTH = 960  # all lengths in pixels, until the browser scales them
_LEFT, _RIGHT, _HEAD, _FOOT, _ROW, _BOX, _GAP_OF_RANKS = 118, 14, 62, 30, 34, 28, 10
_CHARACTER = 6.3  # of small letters; a little more than most fonts take
_LEGEND_ROW, _LEGEND_CHARACTER, _LEGEND_MARK = 20, 6.8, 28
_MOST_TICKS, _MOST_LAYERS = 10, 12
_STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#222}.t{font-size:14px;font-weight:600}.f{fill:#5b626c}"
    ".l{fill:#eef0f3}.n{stroke:#222;stroke-width:.8;stroke-dasharray:4 3}.b{stroke:#fff;stroke-width:.6}"
    "@media(prefers-color-scheme:dark){text{fill:#e6e8eb}.f{fill:#a2aab5}.l{fill:#23272e}.n{stroke:#e6e8eb}"
    ".b{stroke:#15181c}}"
)


def draw_svg(timeline: Timeline, heading: str, window: Window | None = None) -> str:
    """The picture, of two layers of the steady state or of `window`, under the timeline's title and `heading`."""
    window = window or Window.steady(timeline, 2)
    events = window.events(timeline)
    rows, palette = tracks(events), Palette(events)
    places = _places(rows)
    below = _HEAD + (places[-1] + _ROW if places else _ROW)
    legend, legend_height = _legend(palette, below + _FOOT + 12)
    height = below + _FOOT + legend_height
    scale = (WIDTH - _LEFT - _RIGHT) / window.seconds if window.seconds > 0 else 0.0
    parts = [
        _text(_LEFT, 20, timeline.title, "t"),
        _text(_LEFT, 38, heading, "f"),
        *(part for row, place in zip(rows, places, strict=True) for part in _row(row, place, window, scale, palette)),
        *_layers(window, scale, below),
        *_axis(window, scale, below),
        *legend,
    ]
    return _document(height, f"{timeline.title}. {heading}", parts)


def notice_svg(title: str, text: str) -> str:
    """A picture that only says something, where there is no timeline to draw."""
    return _document(90, f"{title}. {text}", [_text(20, 36, title, "t"), _text(20, 60, text, "f")])


def _document(height: float, description: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
        f'height="{height:.0f}" role="img"><title>{escape(description)}</title><style>{_STYLE}</style>'
        + "".join(parts)
        + "</svg>\n"
    )


def _places(rows: Sequence[Track]) -> list[float]:
    """How far below the first row each one lies; between ranks there is a gap."""
    places: list[float] = []
    for index, row in enumerate(rows):
        is_new_rank = index > 0 and row.rank != rows[index - 1].rank
        places.append(places[-1] + _ROW + (_GAP_OF_RANKS if is_new_rank else 0.0) if places else 0.0)
    return places


def _row(row: Track, place: float, window: Window, scale: float, palette: Palette) -> Iterator[str]:
    """A lane's name, the ground that shows where it is idle, and its boxes."""
    top = _HEAD + place + (_ROW - _BOX) / 2
    yield _text(_LEFT - 10, top + _BOX / 2 + 4, f"rank {row.rank} {row.name}", anchor="end")
    yield f'<rect class="l" x="{_LEFT}" y="{top:.1f}" width="{WIDTH - _LEFT - _RIGHT}" height="{_BOX}"/>'
    for event in row.events:
        yield from _box(event, top, window, scale, palette)


def _box(event: TimelineEvent, top: float, window: Window, scale: float, palette: Palette) -> Iterator[str]:
    start = _LEFT + (event.start - window.start) * scale
    width = (event.end - event.start) * scale
    colour = palette.of(event.operation, event.nano_batch)
    told = f"{event.operation} {tokens(event)}: {milliseconds(event.end - event.start)} ms".replace(" :", ":")
    yield (
        f'<rect class="b" x="{start:.2f}" y="{top:.1f}" width="{width:.2f}" height="{_BOX}" '
        f'fill="{hexadecimal(colour)}"><title>{escape(told)}</title></rect>'
    )
    room = int((width - 6) / _CHARACTER)
    shown = next((name for name in names(event.operation) if len(name) <= room), None)
    if shown is not None:
        x, y, fill = start + width / 2, top + _BOX / 2 + 4, hexadecimal(ink(colour))
        yield f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" style="fill:{fill}">{escape(shown)}</text>'


def _layers(window: Window, scale: float, below: float) -> Iterator[str]:
    """A line where each layer begins."""
    for layer, begin in window.begins:
        x = _LEFT + (begin - window.start) * scale
        yield f'<path class="n" d="M{x:.1f} {_HEAD - 6}V{below:.1f}"/>'
        if len(window.begins) <= _MOST_LAYERS:
            yield _text(x + 3, _HEAD - 8, f"layer {layer}", "f")


def _axis(window: Window, scale: float, below: float) -> Iterator[str]:
    """Round times since the window began."""
    yield _text(_LEFT - 10, below + 18, "ms", "f", "end")
    for tick in ticks(window.seconds, _MOST_TICKS):
        yield _text(_LEFT + tick * scale, below + 18, milliseconds(tick), "f", "middle")


def _legend(palette: Palette, top: float) -> tuple[list[str], float]:
    """What the colours mean, in as many lines as it takes, and their height."""
    parts: list[str] = []
    x, y = float(_LEFT), top
    for operation in palette.operations:
        width = _LEGEND_MARK + _LEGEND_CHARACTER * len(operation)
        if x > _LEFT and x + width > WIDTH - _RIGHT:
            x, y = float(_LEFT), y + _LEGEND_ROW
        parts.append(
            f'<rect x="{x:.1f}" y="{y - 9:.1f}" width="11" height="11" fill="{hexadecimal(palette.of(operation))}"/>'
        )
        parts.append(_text(x + 16, y, operation))
        x += width
    return parts, y - top + _LEGEND_ROW


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text{style} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
