"""Every second is booked once, under the name of what took it; the arithmetic of each name, with round numbers."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.batch import StepTimes
from engine.loss import Loss
from engine.loss_ledger import FinishedStep, LossLedger, LossTotals
from engine.loss_waterfall import LossWaterfall
from engine.optimum import Optimum
from engine.stats import EngineStats

# 1000 tokens per second at the peak, 500 in a full batch; a quarter of a token's work is the output head.
# Another quarter lies between the last attention and that.
OPTIMUM = Optimum(tokens_per_second=1000.0, dense_tokens_per_second=500.0, head_share=0.25, tail_share=0.25)
DENSE = 100
DECODES = FinishedStep(  # 40 decodes take 40 ms at the peak, 80 ms at a full batch's rate
    num_tokens=40,
    num_drawn=40,
    limit=Loss.TRAFFIC_LIMITED_BATCH,
    device_seconds=0.2,
    times=StepTimes(gemm_seconds=0.12, attention_seconds=0.03, exposed_network_seconds=0.01, network_seconds=0.05),
)


def snapshot(totals: LossTotals) -> EngineStats:
    return EngineStats(
        accounted_seconds=totals.accounted_seconds,
        ideal_seconds=totals.ideal_seconds,
        skipped_head_seconds=totals.skipped_head_seconds,
        loss_seconds=totals.loss_seconds,
        optimal_tokens_per_second=totals.optimal_tokens_per_second,
    )


def waterfall_of(step: FinishedStep, seconds: float = 0.25, optimum: Optimum = OPTIMUM) -> LossWaterfall:
    """One step whose result comes `seconds` after its request."""
    ledger = LossLedger(optimum, dense_batch=DENSE, now=0.0)
    ledger.request_came(0.0)
    ledger.step_ended(step, seconds)
    waterfall = LossWaterfall.between(EngineStats(), snapshot(ledger.totals(seconds)))
    assert waterfall is not None
    return waterfall


def named(waterfall: LossWaterfall) -> dict[Loss, float]:
    return {loss: round(seconds, 9) for loss, seconds in waterfall.seconds.items() if seconds > 1e-12}


def test_a_small_batch_costs_what_a_full_one_would_not() -> None:
    waterfall = waterfall_of(DECODES)
    assert waterfall.ideal_seconds == pytest.approx(0.04) and waterfall.percent_of_optimal == pytest.approx(16)
    assert named(waterfall) == {
        Loss.CPU_GAP: 0.05,
        Loss.EXPOSED_ATTENTION: 0.03,
        Loss.EXPOSED_NETWORK: 0.01,
        Loss.OTHER_OPERATIONS: 0.04,
        Loss.TRAFFIC_LIMITED_BATCH: 0.04,  # 3 ms a token where a full batch takes 2
        Loss.GEMM_BELOW_PEAK: 0.04,  # and the peak 1
    }
    assert waterfall.unexplained_seconds == pytest.approx(0)


@pytest.mark.parametrize("limit", [Loss.KV_LIMITED_BATCH, Loss.SEQUENCE_LIMITED_BATCH])
def test_the_small_batch_is_booked_under_what_limited_it(limit: Loss) -> None:
    assert waterfall_of(replace(DECODES, limit=limit)).seconds[limit] == pytest.approx(0.04)


def test_a_full_batch_has_no_small_batch_loss_and_teaches_what_full_means() -> None:
    full = replace(DECODES, num_tokens=90, num_drawn=90, device_seconds=0.36, times=StepTimes(gemm_seconds=0.36))
    assert named(waterfall_of(full, 0.36)) == {Loss.GEMM_BELOW_PEAK: 0.27}
    ledger = LossLedger(OPTIMUM, dense_batch=DENSE, now=0.0)
    ledger.request_came(0.0)
    for step in range(200):  # full batches take 4 ms a token here, twice what was measured at the start
        ledger.step_ended(full, 0.36 * (step + 1))
    before = ledger.totals(72.0)
    ledger.step_ended(DECODES, 72.2)  # 3 ms a token: better than a full batch
    after = ledger.totals(72.2)
    assert after.loss_seconds[Loss.TRAFFIC_LIMITED_BATCH] == before.loss_seconds[Loss.TRAFFIC_LIMITED_BATCH]


def test_padding_is_its_share_of_the_matrix_products() -> None:
    padded = replace(DECODES, num_padding_tokens=40)  # padding skips the head: 40 * 0.75 of 70
    assert waterfall_of(padded).seconds[Loss.PADDING] == pytest.approx(0.12 * 30 / 70)
    assert waterfall_of(padded).unexplained_seconds == pytest.approx(0)


def test_discarded_tokens_are_not_useful_and_cost_what_the_step_paid_for_them() -> None:
    waterfall = waterfall_of(replace(DECODES, num_dropped=10))
    assert waterfall.ideal_seconds == pytest.approx(0.03)
    assert waterfall.seconds[Loss.DISCARDED_TOKENS] == pytest.approx(0.03)
    recomputed = replace(DECODES, num_tokens=48, num_drawn=1, num_recomputed=32)
    waterfall = waterfall_of(recomputed)
    assert waterfall.ideal_seconds == pytest.approx(0.016)
    assert waterfall.seconds[Loss.DISCARDED_TOKENS] == pytest.approx(0.12 * (32 * 0.75) / (48 * 0.75 + 0.25))
    assert waterfall.unexplained_seconds == pytest.approx(0)


def test_prompt_tokens_skip_the_head_that_the_optimum_counts() -> None:
    prefill = replace(DECODES, num_tokens=40, num_drawn=0)
    waterfall = waterfall_of(prefill)
    assert waterfall.ideal_seconds == pytest.approx(0.04)
    assert waterfall.skipped_head_seconds == pytest.approx(0.01)
    assert waterfall.unexplained_seconds == pytest.approx(0)


def test_what_lies_behind_the_last_attention_is_skipped_where_a_step_says_so() -> None:
    prefill = replace(DECODES, num_tokens=40, num_drawn=4, skips_tail=True)
    waterfall = waterfall_of(prefill)
    assert waterfall.skipped_head_seconds == pytest.approx(36 * 0.5 / 1000)
    assert waterfall.unexplained_seconds == pytest.approx(0)
    # 40 halves of a token's work and 4 other halves took 120 ms, where a full batch takes 2 ms a token.
    assert waterfall.seconds[Loss.TRAFFIC_LIMITED_BATCH] == pytest.approx(0.12 - 22 * 0.002)


def test_what_is_not_measured_is_unexplained_and_so_is_what_contradicts_itself() -> None:
    unmeasured = waterfall_of(replace(DECODES, times=None))
    assert unmeasured.unexplained_seconds == pytest.approx(0.16)
    assert named(unmeasured) == {Loss.CPU_GAP: 0.05}
    faster = replace(DECODES, times=StepTimes(gemm_seconds=0.03))  # than the peak, by 10 ms
    assert waterfall_of(faster).unexplained_seconds == pytest.approx(-0.01)
    twice = replace(DECODES, times=StepTimes(gemm_seconds=0.12, attention_seconds=0.12))
    assert waterfall_of(twice).unexplained_seconds == pytest.approx(-0.04)


def test_idle_time_is_seen_as_it_passes_and_a_running_step_only_when_it_ends() -> None:
    ledger = LossLedger(OPTIMUM, dense_batch=DENSE, now=100.0)
    assert ledger.totals(103.0).loss_seconds[Loss.NO_REQUESTS] == 3
    ledger.request_came(104.0)
    assert ledger.totals(104.1).accounted_seconds == 4
    ledger.step_ended(DECODES, 104.3)
    ledger.requests_ended(104.4)
    totals = ledger.totals(106.4)
    assert totals.accounted_seconds == pytest.approx(6.4)
    assert totals.loss_seconds[Loss.NO_REQUESTS] == pytest.approx(6)
    assert totals.loss_seconds[Loss.CPU_GAP] == pytest.approx(0.2)  # 0.1 before the step's result, 0.1 after


def test_a_result_that_comes_late_is_set_against_the_next_gap() -> None:
    ledger = LossLedger(OPTIMUM, dense_batch=DENSE, now=0.0)
    ledger.request_came(0.0)
    ledger.step_ended(DECODES, 0.3)  # the loop was busy for 0.1 s while the next step already ran
    ledger.step_ended(DECODES, 0.45)
    assert ledger.totals(0.45).loss_seconds[Loss.CPU_GAP] == pytest.approx(0.1), "counters never shrink"
    ledger.step_ended(DECODES, 0.7)
    assert ledger.totals(0.7).loss_seconds[Loss.CPU_GAP] == pytest.approx(0.1)


def test_a_higher_peak_moves_seconds_from_the_ideal_to_the_products() -> None:
    waterfall = waterfall_of(DECODES)
    stricter = waterfall.with_optimum(2000.0)
    assert stricter.percent_of_optimal == pytest.approx(8)
    assert stricter.seconds[Loss.GEMM_BELOW_PEAK] == pytest.approx(0.06)
    assert stricter.unexplained_seconds == pytest.approx(0)
    assert stricter.achieved_tokens_per_second == pytest.approx(waterfall.achieved_tokens_per_second)
    too_fast = waterfall_of(replace(DECODES, times=StepTimes(gemm_seconds=0.03)))
    assert too_fast.with_optimum(2000.0).unexplained_seconds == pytest.approx(0)
    assert too_fast.with_optimum(2000.0).seconds[Loss.GEMM_BELOW_PEAK] == pytest.approx(0.01)
    assert stricter.with_optimum(500.0).unexplained_seconds == pytest.approx(0)
    assert stricter.with_optimum(250.0).unexplained_seconds == pytest.approx(-0.08)


def test_rates_add_up_to_the_optimum_of_all_replicas() -> None:
    fast = waterfall_of(DECODES, optimum=replace(OPTIMUM, tokens_per_second=3000.0))
    both = LossWaterfall.combined([waterfall_of(DECODES), fast])
    assert both.optimal_tokens_per_second == 4000
    assert both.achieved_tokens_per_second == pytest.approx(2 * 40 / 0.25)
    lost = sum(both.tokens_per_second(seconds) for _, seconds in both.parts())
    assert lost == pytest.approx(4000)
    assert both.unexplained_seconds == pytest.approx(0)


def test_nothing_is_known_without_a_peak_or_without_a_finished_step() -> None:
    totals = LossLedger(OPTIMUM, dense_batch=DENSE, now=0.0).totals(1.0)
    assert LossWaterfall.between(EngineStats(), replace(snapshot(totals), optimal_tokens_per_second=None)) is None
    assert LossWaterfall.between(snapshot(totals), snapshot(totals)) is None


@st.composite
def finished_steps(draw: st.DrawFn) -> FinishedStep:
    """Measured consistently: products no faster than the peak, and parts no longer than the whole."""
    num_tokens = draw(st.integers(1, DENSE))
    num_drawn = draw(st.integers(0, num_tokens))
    dropped = draw(st.integers(0, num_drawn))
    padding = draw(st.integers(0, 20))
    skips_tail = draw(st.booleans())
    head = 0.5 if skips_tail else 0.25
    work = (1 - head) * (num_tokens + padding) + head * num_drawn
    parts = [draw(st.floats(0, 0.5)) for _ in range(3)]
    gemm = work / 1000 * draw(st.floats(1, 8))
    return FinishedStep(
        num_tokens=num_tokens,
        num_drawn=num_drawn,
        num_dropped=dropped,
        num_recomputed=draw(st.integers(0, num_tokens - num_drawn)),
        num_padding_tokens=padding,
        skips_tail=skips_tail,
        limit=draw(st.sampled_from([Loss.KV_LIMITED_BATCH, Loss.TRAFFIC_LIMITED_BATCH])),
        device_seconds=gemm + sum(parts),
        times=StepTimes(gemm_seconds=gemm, attention_seconds=parts[0], exposed_network_seconds=parts[1]),
    )


@given(st.lists(st.tuples(finished_steps(), st.floats(0, 0.3), st.booleans()), min_size=1, max_size=30))
def test_whatever_happens_adds_up_and_never_shrinks(history: list[tuple[FinishedStep, float, bool]]) -> None:
    ledger = LossLedger(OPTIMUM, dense_batch=DENSE, now=0.0)
    now, last = 0.0, ledger.totals(0.0)
    for step, pause, goes_idle in history:
        ledger.request_came(now := now + pause)
        ledger.step_ended(step, now := now + step.device_seconds + pause)
        if goes_idle:
            ledger.requests_ended(now := now + pause)
        totals = ledger.totals(now)
        assert all(seconds >= last.loss_seconds[loss] for loss, seconds in totals.loss_seconds.items())
        last = totals
    assert last.accounted_seconds == pytest.approx(now)
    waterfall = LossWaterfall.between(EngineStats(), snapshot(last))
    if waterfall is not None:
        assert waterfall.unexplained_seconds == pytest.approx(0, abs=1e-9 * (1 + now))
