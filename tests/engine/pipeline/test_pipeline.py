"""Whatever the schedule, a step computes what the plain model does: hidden states, cache and greedy tokens.

The twin of every fast path here is the plain model's own `forward`, run on one rank or, slowly, on two.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig, PipelineMode
from engine.local_group import LocalGroup
from engine.model_config import Architecture, DType, ModelConfig
from engine.pipeline.graph import OperationGraph
from engine.pipeline.schedule import Schedule, ScheduleError
from engine.pipeline.sequential import sequential_schedule
from tests.engine.pipeline.batch_strategies import batches
from tests.engine.pipeline.equal_runs import (
    Outcome,
    RandomBatch,
    compare,
    compare_on_rank,
    planned_graph,
    write_checkpoints,
)
from tests.engine.pipeline.schedule_strategies import schedules

SLACK = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
MIXED = RandomBatch(decode_lengths=(5, 9, 20), chunks=((0, 7), (4, 9), (3, 1)), shares_prefix=True, seed=3)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[Architecture, Path]:
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def ranks(checkpoints: dict[Architecture, Path]) -> Iterator[LocalGroup]:
    """Two ranks that stay; what they were started with does not matter, they load each model when asked."""
    path = checkpoints[Architecture.LLAMA]
    config = EngineConfig(
        model=ModelConfig.from_checkpoint(path),
        checkpoint=path,
        dtype=DType.FLOAT32,
        tensor_parallel=2,
        max_model_len=64,
        num_blocks=64,
        num_threads=1,
        pipeline=PipelineMode.SEQUENTIAL,
    )
    with LocalGroup(config) as group:
        yield group


def assert_equal(outcome: Outcome, dtype: DType) -> None:
    if dtype is DType.FLOAT64:
        assert outcome.relative_error <= 1e-12
        assert outcome.cache_error <= 1e-12
    else:
        assert outcome.relative_error <= 1e-5
    assert outcome.pipeline_tokens == outcome.plain_tokens


@pytest.mark.parametrize("architecture", Architecture)
@pytest.mark.parametrize("dtype", [DType.FLOAT64, DType.FLOAT32])
def test_random_schedules_on_one_rank(
    architecture: Architecture, dtype: DType, checkpoints: dict[Architecture, Path]
) -> None:
    graph = planned_graph(checkpoints[architecture], 1)

    @settings(SLACK, max_examples=30)
    @given(schedule=schedules(graph), batch=batches(), overlaps=st.booleans())
    def check(schedule: Schedule, batch: RandomBatch, overlaps: bool) -> None:
        assume(schedule.fits(len(batch.decode_lengths), batch.num_prefills))
        assert_equal(compare(checkpoints[architecture], dtype, batch, str(schedule), overlaps=overlaps), dtype)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", Architecture)
@pytest.mark.parametrize("dtype", [DType.FLOAT64, DType.FLOAT32])
def test_random_schedules_on_two_ranks(
    architecture: Architecture, dtype: DType, checkpoints: dict[Architecture, Path], ranks: LocalGroup
) -> None:
    graph = planned_graph(checkpoints[architecture], 2)

    @settings(SLACK, max_examples=20)
    @given(schedule=schedules(graph), batch=batches(), overlaps=st.booleans())
    def check(schedule: Schedule, batch: RandomBatch, overlaps: bool) -> None:
        assume(schedule.fits(len(batch.decode_lengths), batch.num_prefills))
        outcomes = ranks.run(compare_on_rank, checkpoints[architecture], dtype, batch, str(schedule), overlaps)
        for outcome in outcomes:
            assert_equal(outcome, dtype)
        assert outcomes[0].pipeline_tokens == outcomes[1].pipeline_tokens

    check()


@pytest.mark.parametrize("architecture", Architecture)
@pytest.mark.parametrize("dtype", [DType.FLOAT64, DType.FLOAT32, DType.BFLOAT16])
def test_one_operation_after_the_other_is_the_plain_model_to_the_bit(
    architecture: Architecture, dtype: DType, checkpoints: dict[Architecture, Path]
) -> None:
    schedule = sequential_schedule(planned_graph(checkpoints[architecture], 1))
    outcome = compare(checkpoints[architecture], dtype, MIXED, str(schedule), overlaps=True)
    assert outcome.is_identical
    assert outcome.cache_error == 0


@pytest.mark.parametrize("architecture", Architecture)
@pytest.mark.parametrize("wanted", [(0, 2, 12), (19,), (), (5, 4, 3)])
def test_rows_that_nobody_wants_end_at_the_last_attention(
    architecture: Architecture, wanted: tuple[int, ...], checkpoints: dict[Architecture, Path]
) -> None:
    schedule = str(sequential_schedule(planned_graph(checkpoints[architecture], 1)))
    outcome = compare(checkpoints[architecture], DType.FLOAT64, MIXED, schedule, overlaps=True, wanted=wanted)
    assert outcome.num_rows == len(wanted)
    assert_equal(outcome, DType.FLOAT64)
    assert outcome.cache_error == 0


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [(0, 19), ()])
def test_rows_that_nobody_wants_on_two_ranks(
    wanted: tuple[int, ...], checkpoints: dict[Architecture, Path], ranks: LocalGroup
) -> None:
    path = checkpoints[Architecture.QWEN3_MOE]
    schedule = str(sequential_schedule(planned_graph(path, 2)))
    for outcome in ranks.run(compare_on_rank, path, DType.FLOAT64, MIXED, schedule, True, wanted):
        assert outcome.num_rows == len(wanted)
        assert_equal(outcome, DType.FLOAT64)


def test_rows_are_left_out_only_where_that_is_most_of_them(checkpoints: dict[Architecture, Path]) -> None:
    schedule = str(sequential_schedule(planned_graph(checkpoints[Architecture.LLAMA], 1)))
    outcome = compare(
        checkpoints[Architecture.LLAMA], DType.FLOAT64, MIXED, schedule, overlaps=True, wanted=tuple(range(10))
    )
    assert outcome.num_rows == MIXED.num_tokens == 20


def test_attention_before_the_writes_it_reads_computes_something_else(
    checkpoints: dict[Architecture, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: without the rule about the KV cache a schedule may be wrong, and the comparison above sees it."""
    path = checkpoints[Architecture.LLAMA]
    wrong = Schedule.parse(
        "nano-batches: 0+7 3+10\n"
        "compute: qkv_proj[7:20] decode_attention[7:20] prefill_attention[7:20] qkv_proj[0:7] prefill_attention[0:7]"
        " o_proj[0:20] gate_up_proj[0:20] down_proj[0:20]\n"
    )
    with pytest.raises(ScheduleError, match="KV"):
        compare(path, DType.FLOAT64, MIXED, str(wrong), overlaps=True)
    compare.__globals__["_loaded"].cache_clear()
    monkeypatch.setattr(OperationGraph, "cache_edges", ())
    assert compare(path, DType.FLOAT64, MIXED, str(wrong), overlaps=True).relative_error > 1e-6
