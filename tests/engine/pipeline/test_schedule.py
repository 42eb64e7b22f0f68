from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine.pipeline.nano_batch import Cut, NanoBatch
from engine.pipeline.schedule import Lane, Mechanism, Schedule, ScheduleError, Step
from engine.pipeline.verify import verify
from tests.engine.pipeline.schedule_strategies import any_graph, cuts, schedules

HEAD = "nano-batches: 4+4\n"


@given(st.data())
@settings(max_examples=60)
def test_the_text_form_is_exact(data: st.DataObject) -> None:
    schedule = data.draw(schedules(data.draw(any_graph())))
    again = Schedule.parse(str(schedule))
    assert again == schedule
    assert str(again) == str(schedule)
    assert list(again.steps) == list(schedule.steps)


@given(
    cuts(),
    st.dictionaries(
        st.sampled_from(list(Lane)),
        st.lists(
            st.builds(
                lambda node, start, length, share, delay: Step(node, start, start + length, share, delay),
                st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True),
                st.integers(0, 10**6),
                st.integers(1, 10**6),
                st.integers(1, 10),
                st.integers(0, 3),
            ),
            max_size=5,
        ).map(tuple),
    ),
    st.sampled_from(Mechanism),
)
def test_the_text_form_is_exact_for_what_no_graph_has(
    cut: Cut, lanes: dict[Lane, tuple[Step, ...]], mechanism: Mechanism
) -> None:
    schedule = Schedule(cut, lanes, mechanism=mechanism)
    assert Schedule.parse(str(schedule)) == schedule


def test_lanes_overlap_by_streams_where_nothing_is_said() -> None:
    text = HEAD + "compute: up[0:8]\n"
    assert Schedule.parse(text) == Schedule.parse(HEAD + "overlap: streams\ncompute: up[0:8]\n")
    assert str(Schedule.parse(text)) == text
    green = Schedule.parse(HEAD + "overlap: green\ncompute: up[0:8]*7\nmemory: down[0:8]*3\n")
    assert green.mechanism is Mechanism.GREEN and green != replace(green, mechanism=Mechanism.CORESIDENT)
    assert hash(green) != hash(replace(green, mechanism=Mechanism.CORESIDENT))


def test_comments_and_blank_lines_do_not_count() -> None:
    text = "# a plan\n\nnano-batches: 480+288 800+480  # two\ncompute: qkv[0:768] o[768:2048]*7@1\nnetwork:\n"
    schedule = Schedule.parse(text)
    assert schedule.cut == Cut((NanoBatch(480, 288), NanoBatch(800, 480)))
    assert schedule.lanes == {
        Lane.COMPUTE: (Step("qkv", 0, 768), Step("o", 768, 2048, share=7, delay=1)),
        Lane.NETWORK: (),
    }


def test_equal_schedules_have_equal_hashes_in_whatever_order_their_lanes_are() -> None:
    lanes = {Lane.COMPUTE: (Step("up", 0, 8),), Lane.NETWORK: (Step("reduce", 0, 8),)}
    first = Schedule(Cut((NanoBatch(4, 4),)), lanes)
    second = replace(first, lanes=dict(reversed(lanes.items())))
    assert first == second
    assert hash(first) == hash(second)
    assert hash(first) != hash(replace(first, lanes={}))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            HEAD + "gpu: up[0:8]\n",
            r"line 2: expected 'nano-batches:'.* or a lane \(compute, memory, network\), not 'gpu",
        ),
        (HEAD + "compute up[0:8]\n", r"line 2: expected"),
        (HEAD + "\ncompute: up[0:8\n", r"line 3: a step is written node\[start:stop\].* not 'up\[0:8'"),
        (HEAD + "compute: up[0:8] down[8:8]\n", r"line 2: 'down\[8:8\]' has no tokens"),
        (HEAD + "compute: up[0:8]*11\n", r"line 2: the share of 'up\[0:8\]\*11' must be 1 to 10"),
        (HEAD + "compute: up[0:8]*0\n", r"line 2: the share of .* must be 1 to 10"),
        (HEAD + "compute: up[0:8]@-1\n", r"line 2: a step is written"),
        (HEAD + "compute: up[0:8]\ncompute: down[0:8]\n", r"line 3: 'compute' appears a second time"),
        (HEAD + HEAD, r"line 2: 'nano-batches' appears a second time"),
        ("nano-batches: 4\n", r"line 1: nano-batches are written decodes\+prefills, such as 480\+288, not '4'"),
        ("# nothing\nnano-batches:\n", r"line 2: nano-batches are written"),
        (HEAD + "overlap: blue\n", r"line 2: lanes overlap by streams, green, coresident, not by 'blue'"),
        (HEAD + "overlap: green\noverlap: green\n", r"line 3: 'overlap' appears a second time"),
        (HEAD + "compute: up[0:8]\nstarts: CX\n", r"line 3: the starts are written as letters CMN, not 'CX'"),
        (HEAD + "compute: up[0:8]\nstarts: CN\n", r"must have one letter for every step of every lane"),
        ("compute: up[0:8]\n", r"the line 'nano-batches: decodes\+prefills \.\.\.' is missing"),
        ("", r"is missing"),
    ],
)
def test_errors_name_the_line_and_what_would_be_right(text: str, error: str) -> None:
    with pytest.raises(ScheduleError, match=error):
        Schedule.parse(text)


@given(st.data())
@settings(max_examples=100)
def test_a_scaled_schedule_is_as_right_as_the_one_it_comes_from(data: st.DataObject) -> None:
    graph = data.draw(any_graph())
    schedule = data.draw(schedules(graph))
    sizes = data.draw(st.tuples(st.integers(0, 60), st.integers(0, 60)))
    assume(schedule.fits(*sizes) and any(sizes))
    scaled = schedule.scaled(*sizes)
    assert (scaled.cut.num_decodes, scaled.cut.num_prefills) == sizes
    verify(scaled, graph)


@given(st.data())
@settings(max_examples=30)
def test_scaling_to_its_own_size_changes_nothing(data: st.DataObject) -> None:
    schedule = data.draw(schedules(data.draw(any_graph())))
    assert schedule.scaled(schedule.cut.num_decodes, schedule.cut.num_prefills) == schedule


@pytest.mark.parametrize(("part", "sizes", "fits"), [((4, 0), (9, 0), True), ((4, 0), (4, 1), False)])
def test_a_schedule_fits_batches_whose_kinds_it_has(part: tuple[int, int], sizes: tuple[int, int], fits: bool) -> None:
    assert Schedule(Cut((NanoBatch(*part),)), {}).fits(*sizes) is fits
