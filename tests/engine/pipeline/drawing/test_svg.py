"""The picture for a browser: well-formed, every box where its event is, nothing that a title says is markup."""

import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from engine.pipeline.drawing.svg import WIDTH, draw_svg, notice_svg
from engine.pipeline.drawing.window import Window
from engine.pipeline.schedule import Lane
from engine.pipeline.timeline import Timeline
from tests.engine.pipeline.drawing.timelines import event, layered

SVG = "{http://www.w3.org/2000/svg}"


def boxes(picture: str) -> list[tuple[float, float, float]]:
    """Left, right and top of every event's box."""
    found = [each for each in ElementTree.fromstring(picture).iter(f"{SVG}rect") if each.get("class") == "b"]
    return [
        (float(each.attrib["x"]), float(each.attrib["x"]) + float(each.attrib["width"]), float(each.attrib["y"]))
        for each in found
    ]


def texts(picture: str) -> list[str]:
    return ["".join(each.itertext()) for each in ElementTree.fromstring(picture).iter(f"{SVG}text")]


def test_boxes_have_the_times_of_their_events() -> None:
    timeline = layered(9)
    window = Window.steady(timeline, 2)
    found = sorted(boxes(draw_svg(timeline, "", window)))
    left = min(start for start, _, _ in found)
    scale = (max(end for _, end, _ in found) - left) / 20
    spans = sorted((round((start - left) / scale), round((end - left) / scale)) for start, end, _ in found)
    assert spans == [(0, 4), (4, 9), (5, 10), (10, 14), (14, 19), (15, 20)]
    assert all(0 < start < end <= WIDTH for start, end, _ in found)


def test_ranks_and_lanes_have_rows_of_their_own() -> None:
    picture = draw_svg(layered(9, num_ranks=2), "recorded")
    shown = texts(picture)
    assert {"rank 0 compute", "rank 1 compute", "recorded"} <= set(shown)
    assert any(text.startswith("layer ") for text in shown)
    by_row: dict[float, list[tuple[float, float]]] = {}
    for start, end, top in boxes(picture):
        by_row.setdefault(top, []).append((start, end))
    assert len(by_row) >= 4
    for row in by_row.values():
        assert all(first[1] <= second[0] + 0.02 for first, second in pairwise(sorted(row)))


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "a & b", 'x" onload="y', "]]>"])
def test_what_it_shows_is_text(text: str) -> None:
    events = (event(text, Lane.COMPUTE, 0.0, 100.0),)
    for picture in (draw_svg(Timeline(text, events, False), text), notice_svg(text, text)):
        root = ElementTree.fromstring(picture)
        assert not [each.tag for each in root.iter() if "script" in each.tag]
        assert text in texts(picture)
        assert not any("onload" in each.attrib for each in root.iter())


def test_nothing_ran() -> None:
    assert "idle" in texts(draw_svg(Timeline("m", (), False), "idle"))
