"""Schedules on rows that are not told apart: what is cut, and that they stay right."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.model_config import Architecture
from engine.operation import TokenKind
from engine.pipeline.graph import OperationGraph
from engine.pipeline.padded_schedule import MOST_NANO_BATCHES, padded_schedule
from engine.pipeline.schedule import Schedule, ScheduleError
from engine.pipeline.verify import verify
from tests.engine.pipeline.schedule_strategies import any_graph, schedules, traced_graph

GRAPH = traced_graph(Architecture.LLAMA, 1)
# Two nano-batches, the head of the first in halves; the second one's attention of decodes too.
PLAN = Schedule.parse(
    "nano-batches: 512+512 512+512\n"
    "compute: o_proj[0:1024]*7@1 gate_up_proj[0:1024]*7@1 down_proj[0:1024]*7@1 qkv_proj[0:512] qkv_proj[512:1024]"
    " prefill_attention[512:1024] o_proj[1024:2048]@1 gate_up_proj[1024:2048]@1 down_proj[1024:2048]@1"
    " qkv_proj[1024:2048] prefill_attention[1536:2048]\n"
    "memory: decode_attention[0:512]*3 decode_attention[1024:1280] decode_attention[1280:1536]\n"
)


def test_a_plan_on_rows_of_any_kind() -> None:
    """Each half is a nano-batch, with attention of its own."""
    verify(PLAN, GRAPH)
    padded = padded_schedule(PLAN, GRAPH, 2048, 1536, 4096)
    rows = [(each.num_tokens, each.num_lanes, each.num_chunks) for each in padded.bucket.nano_batches]
    assert rows == [(512, 384, 64)] * 4
    assert str(padded.schedule) == (
        "nano-batches: 384+128 384+128 384+128 384+128\n"
        "compute: o_proj[0:1024]*7@1 gate_up_proj[0:1024]*7@1 down_proj[0:1024]*7@1 qkv_proj[0:512] qkv_proj[512:1024]"
        " prefill_attention[0:512] prefill_attention[512:1024] o_proj[1024:2048]@1 gate_up_proj[1024:2048]@1"
        " down_proj[1024:2048]@1 qkv_proj[1024:2048] prefill_attention[1024:1536] prefill_attention[1536:2048]\n"
        "memory: decode_attention[0:384]*3 decode_attention[512:896]*3 decode_attention[1024:1408]"
        " decode_attention[1536:1920]\n"
    )
    verify(padded.schedule, GRAPH)


@pytest.mark.parametrize(
    ("num_tokens", "max_sequences", "borders", "lanes"),
    [
        (2048, 1024, (0, 512, 1024, 1536, 2048), (256, 256, 256, 256)),
        (1920, 1024, (0, 512, 960, 1408, 1920), (274, 239, 239, 274)),
        (1152, 1024, (0, 256, 576, 896, 1152), (228, 285, 285, 228)),
        (100, 1024, (0, 24, 48, 76, 100), (23, 23, 27, 23)),
    ],
)
def test_borders_are_where_tiles_end_and_lanes_are_dealt_as_the_plan_deals_decodes(
    num_tokens: int, max_sequences: int, borders: tuple[int, ...], lanes: tuple[int, ...]
) -> None:
    bucket = padded_schedule(PLAN, GRAPH, num_tokens, num_tokens, max_sequences).bucket
    assert bucket.borders == borders
    assert tuple(each.num_lanes for each in bucket.nano_batches) == lanes


@pytest.mark.parametrize(
    ("heads", "decodes", "borders"),
    [
        ((0, 512, 1024), (0, 256, 320), (0, 512, 1024)),  # as many pieces: each meets its own, whatever their sizes
        ((0, 1024), (0, 256, 320), (0, 832, 1024)),
        ((0, 384, 640, 1024), (0, 200, 320), (0, 384, 640, 1024)),  # near the second border
        ((0, 384, 640, 1024), (0, 64, 320), (0, 192, 384, 640, 1024)),
    ],
)
def test_pieces_of_decode_attention_have_their_part_of_the_decodes(
    heads: tuple[int, ...], decodes: tuple[int, ...], borders: tuple[int, ...]
) -> None:
    head = " ".join(f"qkv_proj[{start}:{stop}]" for start, stop in pairwise(heads))
    attention = " ".join(f"decode_attention[{start}:{stop}]" for start, stop in pairwise(decodes))
    schedule = Schedule.parse(
        f"nano-batches: 320+704\ncompute: {head} prefill_attention[320:1024] o_proj[0:1024]"
        f" gate_up_proj[0:1024] down_proj[0:1024]\nmemory: {attention}\n"
    )
    verify(schedule, GRAPH)
    padded = padded_schedule(schedule, GRAPH, 1024, 768, 1024)
    verify(padded.schedule, GRAPH)
    assert padded.bucket.borders == borders


@pytest.mark.parametrize(
    ("text", "num_tokens", "words"),
    [
        (str(PLAN), 4, "4 rows are too few to be cut like 2048 tokens"),
        (str(PLAN).replace("qkv_proj[0:512]", "unknown[0:512]"), 2048, "no such node"),
        ("nano-batches: 512+0 0+512\ncompute: qkv_proj[0:1024]\n", 1024, "a place for one mix alone"),
        (
            "nano-batches: 512+512\ncompute: "
            + " ".join(f"qkv_proj[{start}:{start + 64}]" for start in range(0, 1024, 64)),
            1024,
            f"in 16 parts: a graph can have at most {MOST_NANO_BATCHES}",
        ),
    ],
)
def test_what_cannot_be_padded_is_told(text: str, num_tokens: int, words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        padded_schedule(Schedule.parse(text), GRAPH, num_tokens, num_tokens, 1024)


@pytest.mark.parametrize(("text", "lanes", "chunks"), [("512+0 512+0", 512, 0), ("0+512 0+512", 0, 64)])
def test_batches_of_one_kind_have_a_place_for_that_alone(text: str, lanes: int, chunks: int) -> None:
    node = "decode_attention" if lanes else "prefill_attention"
    schedule = Schedule.parse(
        f"nano-batches: {text}\ncompute: qkv_proj[0:512] {node}[0:512] qkv_proj[512:1024] {node}[512:1024]"
        " o_proj[0:1024] gate_up_proj[0:1024] down_proj[0:1024]\n"
    )
    padded = padded_schedule(schedule, GRAPH, 1024, 1024, 1024)
    assert {(each.num_lanes, each.num_chunks) for each in padded.bucket.nano_batches} == {(lanes, chunks)}
    verify(padded.schedule, GRAPH)


def test_decodes_may_have_a_nano_batch_of_their_own() -> None:
    """As planners like it: the other one takes the rest of them, and all prefill tokens."""
    schedule = Schedule.parse(
        "nano-batches: 512+0 256+1280\ncompute: qkv_proj[0:512] qkv_proj[512:2048] prefill_attention[768:2048]"
        " o_proj[0:512] gate_up_proj[0:512] down_proj[0:512] o_proj[512:2048] gate_up_proj[512:2048]"
        " down_proj[512:2048]\nmemory: decode_attention[0:512] decode_attention[512:768]\n"
    )
    padded = padded_schedule(schedule, GRAPH, 2048, 1535, 1024)
    rows = [(each.num_tokens, each.num_lanes, each.num_chunks) for each in padded.bucket.nano_batches]
    assert rows == [(512, 512, 0), (1536, 512, 64)]
    verify(padded.schedule, GRAPH)


def test_an_order_of_starts_that_parts_cannot_keep_is_left_out() -> None:
    """All decodes are in the first half of the head as planned, and may be in both here."""
    schedule = Schedule.parse(
        "nano-batches: 256+768\ncompute: qkv_proj[0:512] qkv_proj[512:1024] prefill_attention[256:1024] o_proj[0:1024]"
        " gate_up_proj[0:1024] down_proj[0:1024]\nmemory: decode_attention[0:256]\nstarts: CMCCCCC\n"
    )
    verify(schedule, GRAPH)
    padded = padded_schedule(schedule, GRAPH, 1024, 768, 1024)
    assert padded.schedule.starts == ()
    verify(padded.schedule, GRAPH)
    in_order = Schedule.parse(str(schedule).replace("CMCCCCC", "CCMCCCC"))
    kept = padded_schedule(in_order, GRAPH, 1024, 768, 1024).schedule
    assert "starts: CCMMCCCCC\n" in str(kept)
    verify(kept, GRAPH)


@given(graph=any_graph(), data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_padded_schedule_is_right_whatever_its_rows_hold(graph: OperationGraph, data: st.DataObject) -> None:
    """Steps of both kinds have whole nano-batches, so that whichever rows attention takes, it waits for them."""
    schedule = data.draw(schedules(graph))
    try:
        padded = padded_schedule(schedule, graph, data.draw(st.integers(20, 99)), 40, 64)
        verify(padded.schedule, graph)
    except ScheduleError:
        return
    bucket, kinds = padded.bucket, {node.name: node.tokens for node in graph.nodes}
    assert bucket.borders == padded.schedule.cut.borders
    for _, step in padded.schedule.steps:
        number = max(index for index, border in enumerate(bucket.borders) if border <= step.start)
        if kinds[step.node] is not TokenKind.DECODE:
            assert {step.start, step.stop} <= set(bucket.borders)
        else:
            assert step.start == bucket.borders[number]
            assert step.stop == step.start + bucket.nano_batches[number].num_lanes
        if kinds[step.node] is TokenKind.PREFILL:
            assert step.stop == bucket.borders[number + 1] and bucket.nano_batches[number].num_chunks
