from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.operation import TokenKind
from engine.pipeline.dependencies import Dependencies, has_tokens, kind_ranges
from engine.pipeline.graph import LAYER_INPUT, OperationGraph
from engine.pipeline.nano_batch import Cut, NanoBatch
from engine.pipeline.schedule import Schedule, Step
from tests.engine.pipeline.schedule_strategies import any_graph, cuts, graphs, schedules, sequential


def _tokens(cut: Cut, start: int, stop: int, kind: TokenKind) -> set[int]:
    """Positions of this kind, counted one by one."""
    kinds: list[TokenKind] = []
    for part in cut.nano_batches:
        kinds += [TokenKind.DECODE] * part.num_decodes + [TokenKind.PREFILL] * part.num_prefills
    return {position for position in range(start, stop) if kind in (TokenKind.ALL, kinds[position])}


@given(cuts(), st.sampled_from(list(TokenKind)), st.data())
def test_ranges_of_a_kind_hold_exactly_its_tokens(cut: Cut, kind: TokenKind, data: st.DataObject) -> None:
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, cut.num_tokens)] * 2)))
    ranges = kind_ranges(cut, start, stop, kind)
    tokens = _tokens(cut, start, stop, kind)
    assert [position for first, last in ranges for position in range(first, last)] == sorted(tokens)
    assert all(earlier[1] < later[0] for earlier, later in pairwise(ranges))
    assert has_tokens(cut, start, stop, kind) is bool(tokens)


@given(st.data())
@settings(max_examples=60)
def test_steps_wait_for_the_tokens_they_read_and_for_nothing_else(data: st.DataObject) -> None:
    """Token by token: values of the same token, the layer before, and the KV cache of all earlier prompt tokens."""
    graph = data.draw(any_graph())
    schedule = data.draw(schedules(graph, 12))
    dependencies = Dependencies.of(schedule, graph)
    for consumer, waits in zip(dependencies.steps, dependencies.waits, strict=True):
        expected = {
            (producer.index, lag)
            for producer in dependencies.steps
            for lag in (0, 1)
            if _needs(schedule.cut, graph, producer.step, consumer.step, lag)
        }
        assert set(waits) == expected
        assert len(waits) == len(expected)


def _needs(cut: Cut, graph: OperationGraph, producer: Step, consumer: Step, lag: int) -> bool:
    writer, reader = graph.by_name[producer.node], graph.by_name[consumer.node]
    made = _tokens(cut, producer.start, producer.stop, writer.tokens)
    used = _tokens(cut, consumer.start, consumer.stop, reader.tokens)
    if lag:
        return LAYER_INPUT in reader.inputs and graph.output in writer.outputs and bool(made & used)
    if set(writer.outputs) & set(reader.inputs) and made & used:
        return True
    if not (writer.cache_writes and reader.cache_reads and reader.tokens is not TokenKind.DECODE and used):
        return False
    return any(token < consumer.stop for token in made & _tokens(cut, 0, cut.num_tokens, TokenKind.PREFILL))


def test_attention_of_a_chunk_waits_for_the_writes_before_it_and_not_for_those_after() -> None:
    graph = graphs()["llama-1"]
    schedule = sequential(graph, NanoBatch(1, 3), NanoBatch(1, 3))
    waits = _waits(schedule, graph)
    assert waits["prefill_attention[0:4]"] == {"qkv_proj[0:4]"}
    assert waits["prefill_attention[4:8]"] == {"qkv_proj[0:4]", "qkv_proj[4:8]"}
    assert waits["decode_attention[4:8]"] == {"qkv_proj[4:8]"}
    assert waits["o_proj[0:4]"] == {"decode_attention[0:4]", "prefill_attention[0:4]"}


def test_differently_cut_nodes_wait_for_all_ranges_that_meet_theirs() -> None:
    graph = graphs()["one-node"]
    text = "nano-batches: 8+0\ncompute: all[0:3] all[3:8]\n"
    dependencies = Dependencies.of(Schedule.parse(text), graph)
    assert dependencies.waits == (((0, 1),), ((1, 1),))


def _waits(schedule: Schedule, graph: OperationGraph) -> dict[str, set[str]]:
    """Within a layer, by the text of the steps."""
    dependencies = Dependencies.of(schedule, graph)
    return {
        str(placed.step): {str(dependencies.steps[producer].step) for producer, lag in waits if lag == 0}
        for placed, waits in zip(dependencies.steps, dependencies.waits, strict=True)
    }
