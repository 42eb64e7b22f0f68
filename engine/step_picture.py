"""What the ranks of a group recorded of one step, as a picture for a browser."""

from collections.abc import Sequence

from engine.pipeline.drawing.svg import draw_svg, notice_svg
from engine.recorded_step import RecordedStep, joined


def draw_recorded_step(ranks: Sequence[RecordedStep], title: str, note: str = "") -> str:
    """SVG of the layers in the middle of a step; `ranks` has at least one."""
    return draw_svg(joined(ranks, title), ranks[0].heading + note)


def draw_notice(title: str, text: str) -> str:
    """SVG that says why there is no step to draw."""
    return notice_svg(title, text)
