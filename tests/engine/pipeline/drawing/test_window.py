"""Which part of a step a drawing shows, and its rows."""

import pytest

from engine.pipeline.drawing.scale import milliseconds, ticks
from engine.pipeline.drawing.track import tracks
from engine.pipeline.drawing.window import Window
from engine.pipeline.schedule import Lane
from engine.pipeline.timeline import Timeline
from tests.engine.pipeline.drawing.timelines import event, layered


def test_the_window_is_some_layers_from_the_middle() -> None:
    window = Window.steady(layered(9), 2)
    assert (window.start, window.end) == pytest.approx((0.030, 0.050))
    assert [layer for layer, _ in window.begins] == [3, 4]


def test_a_short_step_is_shown_whole() -> None:
    timeline = layered(3)
    assert Window.steady(timeline, 2) == Window.whole(timeline)
    assert Window.whole(timeline).seconds == pytest.approx(timeline.seconds)


def test_events_are_cut_off_at_the_borders_and_empty_ones_left_out() -> None:
    timeline = Timeline(
        "", (event("a", Lane.COMPUTE, 0, 4), event("b", Lane.COMPUTE, 4, 4), event("c", Lane.COMPUTE, 4, 9)), True
    )
    events = Window(0.002, 0.005).events(timeline)
    assert [found.operation for found in events] == ["a", "c"]
    assert [time for found in events for time in (found.start, found.end)] == pytest.approx(
        [0.002, 0.004, 0.004, 0.005]
    )


def test_events_in_flight_together_get_rows_of_their_own() -> None:
    events = [
        event("x", Lane.NETWORK, 0, 5),
        event("y", Lane.NETWORK, 2, 6),
        event("z", Lane.NETWORK, 5, 7),
        event("w", Lane.COMPUTE, 0, 7),
        event("v", Lane.COMPUTE, 0, 7, rank=1),
    ]
    rows = tracks(events)
    assert [(row.rank, row.name, [found.operation for found in row.events]) for row in rows] == [
        (0, "compute", ["w"]),
        (0, "network", ["x", "z"]),
        (0, "network 2", ["y"]),
        (1, "compute", ["v"]),
    ]


def test_ticks_are_round_and_few() -> None:
    assert ticks(2.61e-3, 5) == pytest.approx((0.0, 0.001, 0.002))
    assert ticks(2.61e-3, 6) == pytest.approx((0.0, 0.0005, 0.001, 0.0015, 0.002, 0.0025))
    assert ticks(0.0, 5) == (0.0,)
    for most in range(2, 15):
        assert 2 <= len(ticks(0.0731, most)) <= most + 1
    assert milliseconds(0.0005) == "0.5"
