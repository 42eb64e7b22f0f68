"""The picture: every box where its event is, no text wider than its box, no two texts on each other."""

import sys
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.patches import Rectangle

from engine.errors import ConfigError
from engine.pipeline.drawing.picture import draw_picture, write_picture
from engine.pipeline.drawing.window import Window
from engine.pipeline.schedule import Lane
from engine.pipeline.timeline import Timeline
from tests.engine.pipeline.drawing.timelines import event, layered


def test_a_picture_is_written(tmp_path: Path) -> None:
    write_picture(layered(9, num_ranks=2), tmp_path / "a.png", "predicted: 90 ms a step")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_boxes_have_the_times_of_their_events() -> None:
    figure = draw_picture(layered(9), "", Window.steady(layered(9), 2))
    boxes = [box for box in figure.axes[0].patches if isinstance(box, Rectangle) and box.get_zorder() >= 1]
    spans = sorted((round(box.get_x(), 6), round(box.get_x() + box.get_width(), 6)) for box in boxes)
    assert spans == [(0, 4), (4, 9), (5, 10), (10, 14), (14, 19), (15, 20)]
    assert figure.axes[0].get_xlim() == pytest.approx((0, 20))


@pytest.mark.parametrize("width", [0.02, 0.2, 0.5, 1.0, 3.0])
def test_texts_lie_inside_their_boxes_and_never_on_each_other(width: float) -> None:
    events = tuple(
        event(
            "feed_forward_all_reduce", Lane.NETWORK, number * width, (number + 1) * width, tokens=(1024, 2048), share=3
        )
        for number in range(int(20 / width))
    )
    figure = draw_picture(Timeline("t", events, True), "h", Window(0.0, 0.020))
    figure.canvas.draw()
    axes = figure.axes[0]
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    boxes = [patch.get_window_extent(renderer) for patch in axes.patches if patch.get_zorder() >= 1]
    texts = [text.get_window_extent(renderer) for text in axes.texts if text.get_text() and text.get_zorder() >= 3]
    inside = [text for text in texts if any(box.x0 <= text.x0 and text.x1 <= box.x1 for box in boxes)]
    assert len(boxes) == len(events)
    assert len(inside) == (len(events) if width >= 0.5 else 0)
    assert not any(first.overlaps(second) for first, second in combinations(inside, 2))


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written to"):
        write_picture(layered(4), tmp_path / "gone" / "a.png", "")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="needs matplotlib"):
        write_picture(layered(4), tmp_path / "a.png", "")
