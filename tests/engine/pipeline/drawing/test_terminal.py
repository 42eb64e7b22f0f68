"""The drawing made of characters: it fits, it says what runs where, and it needs no colours."""

import pytest
from rich.cells import cell_len
from rich.text import Text

from engine.pipeline.drawing.label import names
from engine.pipeline.drawing.terminal import draw_in_terminal
from engine.pipeline.drawing.window import Window
from engine.pipeline.timeline import Timeline
from tests.engine.pipeline.drawing.timelines import layered


def lines(timeline: Timeline, width: int, window: Window | None = None) -> list[str]:
    return draw_in_terminal(timeline, width, window).plain.splitlines()


def test_boxes_lie_where_the_events_do() -> None:
    timeline = layered(1, share=9)
    upper, middle, lower = lines(timeline, 9 + 101, Window(0.0, 0.010))[1:4]
    assert upper.startswith("compute  ┌qkv_proj") and upper[9 + 50] == "╔"
    assert upper.index("┐") == 9 + 40 and upper.index("╗") == 9 + 100
    assert upper[9 + 41 : 9 + 50].isspace()
    assert "│0:256" in middle and "║256:512" in middle
    assert "└90%" in lower and "╚═══" in lower


def test_boxes_that_touch_share_a_side() -> None:
    drawn = "\n".join(lines(layered(9), 120, Window.steady(layered(9), 2)))
    assert "┬qkv_proj" in drawn and "┴90%" in drawn  # the next layer's follows at once


def test_the_lower_edge_holds_the_tokens_where_units_are_not_shared() -> None:
    drawn = lines(layered(1, share=10), 100, Window(0.0, 0.010))
    assert drawn[1].startswith("compute  ┌qkv_proj") and drawn[2].strip().startswith("└0:256─")


@pytest.mark.parametrize("width", [60, 80, 133, 200])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_no_line_is_wider_than_the_terminal(width: int, num_ranks: int) -> None:
    for line in lines(layered(9, num_ranks), width):
        assert cell_len(line) <= width


def test_a_wide_terminal_shows_two_layers() -> None:
    assert lines(layered(9), 100)[0].split() == ["│layer", "4"]
    assert lines(layered(9), 160)[0].split() == ["│layer", "3", "│layer", "4"]


def test_every_rank_has_its_lanes() -> None:
    drawn = "\n".join(lines(layered(9, 2), 120))
    for title in ("rank 0 compute", "rank 0 network", "rank 1 compute", "rank 1 network"):
        assert title in drawn


def test_the_legend_spells_out_the_short_names() -> None:
    drawn = "\n".join(lines(layered(9), 120))
    assert "attn AR  attention_all_reduce" in drawn and "double lines: the second nano-batch" in drawn


def test_what_is_shorter_than_half_a_column_is_left_out() -> None:
    timeline = layered(200)
    drawn = lines(timeline, 60, Window.whole(timeline))
    assert max(map(len, drawn)) <= 60 and len(drawn) < 20


def test_a_step_without_events_says_so() -> None:
    assert draw_in_terminal(Timeline("", (), True), 80) == Text("(nothing ran)")


def test_names_get_shorter() -> None:
    assert names("qkv_proj") == ("qkv_proj", "qkv")
    assert names("feed_forward_all_reduce") == ("feed_forward_all_reduce", "feed forward all reduce", "ffn AR")
    assert names("decode_attention")[-1] == "dec attn"
    assert names("proj") == ("proj",)
