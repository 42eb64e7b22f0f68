import re
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.operation import TokenKind
from engine.pipeline.dependencies import Dependencies
from engine.pipeline.dispatch import dispatch_order
from engine.pipeline.graph import LAYER_INPUT, OperationGraph
from engine.pipeline.nano_batch import Cut, NanoBatch
from engine.pipeline.schedule import Lane, Schedule, ScheduleError, Step
from engine.pipeline.verify import verify, verify_group
from tests.engine.pipeline.broken_schedules import MUTATIONS, Mutation, broken_schedules
from tests.engine.pipeline.schedule_strategies import any_graph, graphs, node, schedules, sequential

LLAMA = "llama-2"
TWO = (NanoBatch(3, 2), NanoBatch(2, 4))


@given(st.data())
def test_random_schedules_pass(data: st.DataObject) -> None:
    graph = data.draw(any_graph())
    verify(data.draw(schedules(graph)), graph)


@given(st.data())
@settings(max_examples=60)
def test_broken_schedules_are_rejected_with_their_own_sentence(data: st.DataObject) -> None:
    graph = data.draw(any_graph())
    for mutation, broken in broken_schedules(data.draw(schedules(graph)), graph).items():
        with pytest.raises(ScheduleError, match=mutation.error):
            verify(broken, graph)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_mutation_breaks_the_schedule_of_a_model(mutation: Mutation) -> None:
    schedule = sequential(graphs()[LLAMA], *TWO)
    verify(schedule, graphs()[LLAMA])
    broken = mutation.apply(schedule, graphs()[LLAMA])
    assert broken is not None
    with pytest.raises(ScheduleError, match=mutation.error):
        verify(broken, graphs()[LLAMA])


@given(st.data())
@settings(max_examples=150)
def test_whatever_passes_runs_and_whatever_deadlocks_is_rejected(data: st.DataObject) -> None:
    """Lanes shuffled at random, against the run itself, which knows nothing of periods."""
    graph = data.draw(any_graph())
    schedule = data.draw(schedules(graph, 8))
    lanes = {lane: tuple(data.draw(st.permutations(steps))) for lane, steps in schedule.lanes.items()}
    shuffled = Schedule(schedule.cut, lanes)
    try:
        dispatch_order(shuffled, graph, 5)
    except ScheduleError:
        with pytest.raises(ScheduleError, match=r"broken dependency|cycle between lanes"):
            verify(shuffled, graph)
    else:
        verify(shuffled, graph)


def test_a_step_is_named_with_its_lane_and_what_would_be_right() -> None:
    graph = graphs()[LLAMA]
    text = str(sequential(graph, NanoBatch(3, 5))).replace("o_proj[0:8]", "o_proj[0:6]", 1)
    with pytest.raises(ScheduleError, match=r"missing step: nothing computes o_proj\[6:8\]"):
        verify(Schedule.parse(text), graph)


def test_attention_of_a_later_range_waits_for_the_writes_of_earlier_ones() -> None:
    graph = graphs()[LLAMA]
    schedule = sequential(graph, NanoBatch(0, 4), NanoBatch(0, 4))
    order = "qkv_proj[4:8] prefill_attention[4:8] qkv_proj[0:4] prefill_attention[0:4]"
    text = str(schedule).replace("qkv_proj[0:4] qkv_proj[4:8] prefill_attention[0:4] prefill_attention[4:8]", order)
    with pytest.raises(ScheduleError, match=r"prefill_attention\[4:8\] reads the KV cache written by qkv_proj\[0:4\]"):
        verify(Schedule.parse(text), graph)


def test_decodes_do_not_wait_for_the_writes_of_others() -> None:
    graph = graphs()[LLAMA]
    text = str(sequential(graph, NanoBatch(4, 0), NanoBatch(4, 0)))
    verify(
        Schedule.parse(
            text.replace(
                "qkv_proj[0:4] qkv_proj[4:8] decode_attention[0:4] decode_attention[4:8]",
                "qkv_proj[4:8] decode_attention[4:8] qkv_proj[0:4] decode_attention[0:4]",
            )
        ),
        graph,
    )


def test_the_tail_of_a_layer_may_overlap_the_head_of_the_next() -> None:
    graph = OperationGraph((node("head", LAYER_INPUT), node("tail", "head")), "tail")
    verify(Schedule.parse("nano-batches: 4+0\ncompute: tail[0:4]@1 head[0:4]\n"), graph)
    with pytest.raises(ScheduleError, match=r"broken dependency .*head\[0:4\] needs the result of tail\[0:4\]@1"):
        verify(Schedule.parse("nano-batches: 4+0\ncompute: head[0:4] tail[0:4]@1\n"), graph)
    with pytest.raises(ScheduleError, match=r"later period: give it a delay of at least 1"):
        verify(Schedule.parse("nano-batches: 4+0\ncompute: head[0:4] tail[0:4]@2\n"), graph)


def test_a_cycle_may_pass_through_a_delay() -> None:
    """Each lane is in order by itself, but the tail of one layer and the head of the next wait for each other."""
    nodes = (node("a", LAYER_INPUT), node("b", "a"), node("c", LAYER_INPUT), node("d", "b c"))
    graph = OperationGraph(nodes, "d")
    text = "nano-batches: 1+0\ncompute: {}\nmemory: {}\n"
    verify(Schedule.parse(text.format("d[0:1]@1 a[0:1]", "b[0:1]@1 c[0:1]")), graph)
    with pytest.raises(ScheduleError, match="a cycle between lanes"):
        verify(Schedule.parse(text.format("d[0:1]@1 a[0:1]", "c[0:1] b[0:1]@1")), graph)


def test_a_nano_batch_takes_one_branch_and_all_of_it() -> None:
    graph = graphs()["two-way"]
    for branch in range(2):
        verify(sequential(graph, *TWO, branch=branch), graph)
    first, second = (sequential(graph, *TWO, branch=branch) for branch in range(2))
    mixed = {lane: tuple(dict.fromkeys(first.lanes[lane] + second.lanes[lane])) for lane in first.lanes}
    with pytest.raises(ScheduleError, match=r"different branches: nano-batch \[0:5\] must take one of gather, reduce"):
        verify(Schedule(first.cut, mixed), graph)
    none = {lane: tuple(step for step in first.lanes[lane] if "gather" not in step.node) for lane in first.lanes}
    none[Lane.COMPUTE] = tuple(step for step in none[Lane.COMPUTE] if step.node != "o_columns")
    with pytest.raises(ScheduleError, match="takes none of the branches gather, reduce"):
        verify(Schedule(first.cut, none), graph)
    part = {lane: tuple(step for step in first.lanes[lane] if step.node != "gather_heads") for lane in first.lanes}
    with pytest.raises(ScheduleError, match=r"nothing computes gather_heads\[0:5\] of branch gather"):
        verify(Schedule(first.cut, part), graph)


def test_ranks_start_collectives_in_the_same_order() -> None:
    graph = graphs()[LLAMA]
    schedule = sequential(graph, *TWO)
    verify_group([schedule, schedule], graph)
    first, second, *rest = schedule.lanes[Lane.NETWORK]
    crossed = Schedule(schedule.cut, {**schedule.lanes, Lane.NETWORK: (second, first, *rest)})
    verify(crossed, graph)
    with pytest.raises(ScheduleError, match=r"crossed collectives: .* rank 1 has \w+\[5:11\] where rank 0 has"):
        verify_group([schedule, crossed], graph)
    other = sequential(graph, NanoBatch(2, 3), NanoBatch(3, 3))
    with pytest.raises(ScheduleError, match="rank 1 cuts the batch otherwise"):
        verify_group([schedule, other], graph)
    merged = (Step(first.node, 0, second.stop), *rest)
    with pytest.raises(ScheduleError, match="crossed collectives"):
        verify_group([schedule, Schedule(schedule.cut, {**schedule.lanes, Lane.NETWORK: merged})], graph)


@given(st.data())
@settings(max_examples=60)
def test_each_token_of_a_kind_is_computed_once(data: st.DataObject) -> None:
    """Coverage counted token by token, over schedules with steps taken out and put in at random."""
    graph = graphs()[data.draw(st.sampled_from([LLAMA, "mixtral-1"]))]
    schedule = data.draw(schedules(graph, 8))
    lane, steps = data.draw(st.sampled_from([item for item in schedule.lanes.items() if item[1]]))
    place = data.draw(st.integers(0, len(steps) - 1))
    copies = data.draw(st.integers(0, 2))
    changed = Schedule(
        schedule.cut, {**schedule.lanes, lane: steps[:place] + (steps[place],) * copies + steps[place + 1 :]}
    )
    counts: dict[tuple[str, int], int] = defaultdict(int)
    for _, step in changed.steps:
        for position in range(step.start, step.stop):
            counts[step.node, position] += 1
    complete = all(
        counts[item.name, position] == 1
        for item in graph.nodes
        for position in range(changed.cut.num_tokens)
        if item.tokens in (TokenKind.ALL, _kind(changed.cut, position))
    )
    if complete:
        verify(changed, graph)
    else:
        with pytest.raises(ScheduleError, match="missing step" if copies == 0 else "doubled step"):
            verify(changed, graph)


def _kind(cut: Cut, position: int) -> TokenKind:
    is_decode = cut.decodes_before(position + 1) > cut.decodes_before(position)
    return TokenKind.DECODE if is_decode else TokenKind.PREFILL


@given(st.data())
@settings(max_examples=40)
def test_no_dependency_points_to_a_later_period(data: st.DataObject) -> None:
    """What the search for circles within one period rests on."""
    graph = data.draw(any_graph())
    dependencies = Dependencies.of(data.draw(schedules(graph)), graph)
    for consumer, waits in zip(dependencies.steps, dependencies.waits, strict=True):
        for producer, lag in waits:
            assert dependencies.steps[producer].step.delay <= consumer.step.delay + lag


@pytest.mark.parametrize(
    ("overlap", "compute", "memory", "error"),
    [
        ("green", "*7", "*3", None),
        ("green", "*5", "*5", None),
        ("coresident", "", "", None),
        ("green", "*7", "*4", "both shares make 10 tenths, such as 7 and 3; compute has 7, memory has 4"),
        ("green", "", "", "compute has 10, memory has 10"),
        ("coresident", "*7", "*3", "their steps have no shares, but these have 3 and 7 tenths: leave out the shares"),
        ("green", "*7", None, "of which one has no steps: leave out the line"),
        ("coresident", "", None, "of which one has no steps"),
    ],
)
def test_a_mechanism_wants_both_lanes_and_the_shares_that_it_can_give(
    overlap: str, compute: str, memory: str | None, error: str | None
) -> None:
    graph = OperationGraph((node("up", LAYER_INPUT), node("attend", "up"), node("down", "attend")), "down")
    text = f"nano-batches: 2+0\noverlap: {overlap}\ncompute: up[0:2]{compute} down[0:2]{compute}\n"
    if memory is None:
        text += f"compute: up[0:2]{compute} attend[0:2]{compute} down[0:2]{compute}\n"
        text = text.replace(f"compute: up[0:2]{compute} down[0:2]{compute}\n", "", 1)
    else:
        text += f"memory: attend[0:2]{memory}\n"
    if error is None:
        verify(Schedule.parse(text), graph)
        return
    with pytest.raises(ScheduleError, match=re.escape(error)):
        verify(Schedule.parse(text), graph)
