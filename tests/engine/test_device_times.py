"""The time of a step on a GPU, shared out: what was measured as a whole stays so, and overlap counts as it should."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Batch, StepTimes
from engine.device_times import DeviceTimes, StepPart, parts_beside, shared_out
from engine.loss import Loss
from engine.loss_ledger import FinishedStep, LossLedger
from engine.loss_waterfall import LossWaterfall
from engine.model_config import Architecture
from engine.optimum import Optimum
from engine.pipeline.nano_batch import Cut, NanoBatch
from engine.pipeline.planned_model import trace_planned_layer
from engine.pipeline.schedule import Lane, Schedule
from engine.pipeline.sequential import sequential_schedule
from engine.pipeline.split_schedule import split_schedule
from engine.random_checkpoint import sized_config
from engine.stats import EngineStats
from engine.step_work import StepWork, mean_seen

GRAPH = trace_planned_layer(sized_config(Architecture.LLAMA), 2).graph
SEQUENTIAL = sequential_schedule(GRAPH)


@dataclass(frozen=True)
class Linear:
    """A law in proportion."""

    per_token: float
    per_seen: float = 0.0

    def seconds(self, tokens: float, context: float) -> float:
        return tokens * (self.per_token + self.per_seen * context)


TIMES = DeviceTimes(
    laws={
        StepPart.PRODUCTS: Linear(4e-6),
        StepPart.DECODE_ATTENTION: Linear(0.0, 1e-8),
        StepPart.PREFILL_ATTENTION: Linear(1e-7, 1e-9),
        StepPart.COLLECTIVES: Linear(1e-6),
        StepPart.REST: Linear(5e-7),
        StepPart.HEAD_PRODUCT: Linear(2e-6),
        StepPart.DRAWING: Linear(1e-6),
    },
    graph=GRAPH,
    windows=(None,),
)


def batch_of(decodes: list[int], chunks: list[tuple[int, int]], num_drawn: int | None = None) -> Batch:
    """Decodes by how many tokens they see, chunks by their first token and size."""
    starts = [length - 1 for length in decodes] + [start for start, _ in chunks]
    counts = [1] * len(decodes) + [size for _, size in chunks]
    return Batch(
        step=0,
        admissions=(),
        block_updates=np.zeros((0, 3), np.int32),
        rows=np.arange(len(counts), dtype=np.int32),
        starts=np.array(starts, np.int32),
        counts=np.array(counts, np.int32),
        num_decodes=len(decodes),
        sampled=np.arange(len(counts) if num_drawn is None else num_drawn, dtype=np.int32),
    )


def test_a_sequential_step_is_shared_out_in_proportion() -> None:
    batch = batch_of([100] * 10, [(50, 20)])
    times = TIMES.of_step(batch, SEQUENTIAL, 2, False)
    attention = 10 * 100 * 1e-8 + 20 * (1e-7 + 60.5e-9)
    gemm, network = 32 * 4e-6 + 11 * 2e-6, 32 * 1e-6
    total = gemm + network + attention + 32 * 5e-7 + 11 * 1e-6
    found = times(3 * total)
    assert found.gemm_seconds == pytest.approx(3 * gemm)
    assert found.attention_seconds == pytest.approx(3 * attention)
    assert found.exposed_network_seconds == found.network_seconds == pytest.approx(3 * network)


def test_each_nano_batch_has_its_own_products() -> None:
    """Reading the weights twice costs twice: a law with a fixed part is met once for each."""

    @dataclass(frozen=True)
    class Fixed:
        def seconds(self, tokens: float, context: float) -> float:
            return 1.0

    times = replace(TIMES, laws={StepPart.PRODUCTS: Fixed()})
    batch = batch_of([5, 6, 7], [])
    for num_nano_batches in (1, 2, 3):
        cut = Cut((NanoBatch(1, 0),) * num_nano_batches)
        work = StepWork.of(batch, cut, (None,))
        assert sum(work.num_rows) == 3 and times.alone(work)[StepPart.PRODUCTS] == num_nano_batches


@pytest.mark.parametrize(
    ("seconds", "gemm", "attention", "network", "in_flight"),
    [
        (0.8, 0.8, 0.0, 0.0, 0.2),  # faster than its products alone: nothing is exposed
        (1.0, 1.0, 0.0, 0.0, 0.2),
        (1.3, 1.0, 0.2, 0.1, 0.2),  # half of what ran beside came on top
        (1.6, 1.0, 0.4, 0.2, 0.2),  # all of it
        (3.2, 2.0, 0.8, 0.4, 0.4),  # worse than one after the other
    ],
)
def test_what_runs_beside_counts_with_what_the_step_takes_longer(
    seconds: float, gemm: float, attention: float, network: float, in_flight: float
) -> None:
    alone = {StepPart.PRODUCTS: 1.0, StepPart.DECODE_ATTENTION: 0.4, StepPart.COLLECTIVES: 0.2}
    times = shared_out(seconds, alone, {StepPart.DECODE_ATTENTION, StepPart.COLLECTIVES})
    assert times.gemm_seconds == pytest.approx(gemm)
    assert times.attention_seconds == pytest.approx(attention)
    assert times.exposed_network_seconds == pytest.approx(network)
    assert times.network_seconds == pytest.approx(in_flight)


@given(
    st.floats(0, 1e3),
    st.dictionaries(st.sampled_from(list(StepPart)), st.floats(0, 1e3)),
    st.sets(st.sampled_from([StepPart.DECODE_ATTENTION, StepPart.PREFILL_ATTENTION, StepPart.COLLECTIVES])),
)
def test_parts_are_no_more_than_the_whole(seconds: float, alone: dict[StepPart, float], beside: set[StepPart]) -> None:
    times = shared_out(seconds, alone, beside)
    parts = times.gemm_seconds, times.attention_seconds, times.exposed_network_seconds
    assert min(*parts, times.network_seconds) >= 0
    assert sum(parts) <= seconds * (1 + 1e-9) + 1e-12
    assert times.network_seconds <= seconds
    assert times.exposed_network_seconds <= times.network_seconds * (1 + 1e-9) + 1e-12


def test_which_parts_run_beside_is_what_the_schedule_says() -> None:
    halves = Cut((NanoBatch(8, 8),) * 2)
    assert parts_beside(SEQUENTIAL, GRAPH) == set(), "it names a lane of the network, which never runs beside"
    lanes = dict(split_schedule(GRAPH, halves).lanes)
    moved = tuple(step for step in lanes[Lane.COMPUTE] if step.node == "decode_attention")
    assert moved
    kept = tuple(step for step in lanes[Lane.COMPUTE] if step not in moved)
    planned = Schedule(halves, lanes | {Lane.COMPUTE: kept, Lane.MEMORY: moved})
    assert parts_beside(planned, GRAPH) == {StepPart.DECODE_ATTENTION, StepPart.COLLECTIVES}
    batch = batch_of([1000] * 16, [(0, 16)])
    alone = TIMES.alone(StepWork.of(batch, halves, (None,)))
    compute = sum(alone.values()) - alone[StepPart.DECODE_ATTENTION] - alone[StepPart.COLLECTIVES]
    hidden = TIMES.of_step(batch, planned, 0, True)(compute)
    assert hidden.exposed_network_seconds == pytest.approx(0, abs=1e-15)
    assert hidden.network_seconds == pytest.approx(32e-6)
    assert hidden.attention_seconds == pytest.approx(alone[StepPart.PREFILL_ATTENTION])
    in_turn = TIMES.of_step(batch, planned, 0, False)(sum(alone.values()))
    assert in_turn.exposed_network_seconds == pytest.approx(32e-6)


@pytest.mark.parametrize("windows", [(None,), (7,), (3, None, 3)])
def test_what_tokens_see(windows: tuple[int | None, ...]) -> None:
    """Each token by itself: all before it and itself, as far as the window reaches."""
    starts, counts = np.array([0, 5, 2, 40], np.int32), np.array([1, 1, 9, 4], np.int32)
    seen = [
        np.mean([position + 1 if window is None else min(position + 1, window) for window in windows])
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True)
        for position in range(start, start + count)
    ]
    assert mean_seen(starts, counts, windows) == pytest.approx(np.mean(seen))
    assert mean_seen(starts[:0], counts[:0], windows) == 0


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(1, 4000), max_size=20),
            st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 300)), max_size=4),
            st.integers(0, 60),  # padding
            st.floats(1e-5, 0.2),  # device seconds
            st.floats(0, 0.05),  # the device idle behind it
            st.booleans(),
        ).filter(lambda step: step[0] or step[1]),
        min_size=1,
        max_size=12,
    )
)
def test_the_waterfall_of_a_device_adds_up(
    steps: list[tuple[list[int], list[tuple[int, int]], int, float, float, bool]],
) -> None:
    """All parts have names, and together they are the wall clock, with whatever the device took."""
    # So fast that no step can seem to beat it, which would be told as unexplained.
    optimum = Optimum(tokens_per_second=1e12, dense_tokens_per_second=5e7, head_share=0.2)
    ledger = LossLedger(optimum, dense_batch=256, now=0.0)
    ledger.request_came(0.0)
    now, idle = 0.0, 0.0
    for decodes, chunks, num_padding, seconds, pause, overlaps in steps:
        batch = batch_of(decodes, chunks)
        times = TIMES.of_step(batch, SEQUENTIAL, num_padding, overlaps)(seconds)
        now, idle = now + seconds + pause, idle + pause
        finished = FinishedStep(
            num_tokens=batch.num_tokens,
            num_drawn=len(batch.sampled),
            limit=Loss.TRAFFIC_LIMITED_BATCH,
            device_seconds=seconds,
            times=times,
            num_padding_tokens=num_padding,
        )
        ledger.step_ended(finished, now)
    totals = ledger.totals(now)
    later = EngineStats(
        accounted_seconds=totals.accounted_seconds,
        ideal_seconds=totals.ideal_seconds,
        skipped_head_seconds=totals.skipped_head_seconds,
        loss_seconds=totals.loss_seconds,
        optimal_tokens_per_second=totals.optimal_tokens_per_second,
    )
    waterfall = LossWaterfall.between(EngineStats(), later)
    assert waterfall is not None
    assert waterfall.seconds[Loss.CPU_GAP] == pytest.approx(idle, abs=1e-9)
    assert waterfall.unexplained_seconds == pytest.approx(0, abs=1e-9)


def test_a_step_without_tokens_is_rest() -> None:
    assert TIMES.of_step(batch_of([], []), SEQUENTIAL, 0, False)(0.5) == StepTimes()
