from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.block_manager import BlockManager
from engine.block_updates import BlockUpdates
from engine.length_predictor import LengthPredictor
from engine.peak_use import PeakUse
from engine.request import FinishReason, Request, RequestId, SamplingParams
from engine.scheduler import ScheduledStep, Scheduler
from engine.sequence import Sequence, SequenceStatus

_order = count()


def sequence(prompt: int | list[int], max_tokens: int = 8, priority: int = 0) -> Sequence:
    order = next(_order)
    tokens = tuple(range(order * 1000, order * 1000 + prompt)) if isinstance(prompt, int) else tuple(prompt)
    request = Request(
        request_id=RequestId(str(order)),
        prompt_token_ids=tokens,
        sampling=SamplingParams(max_tokens=max_tokens),
        priority=priority,
    )
    return Sequence(request, order, 0.0)


def make_scheduler(
    num_blocks: int = 100, max_batch_tokens: int = 16, max_sequences: int = 8
) -> tuple[Scheduler, BlockManager, LengthPredictor]:
    blocks, predictor = BlockManager(num_blocks, 4), LengthPredictor(1000)
    return (
        Scheduler(blocks, predictor, max_batch_tokens=max_batch_tokens, max_sequences=max_sequences),
        blocks,
        predictor,
    )


def deliver(scheduler: Scheduler, step: ScheduledStep) -> None:
    """What the engine does with a step's tokens, for sequences that end by their limit only."""
    scheduler.append(step, [7] * len(step.sampled))
    for one in step.sampled:
        if one.status is not SequenceStatus.FINISHED and one.num_generated == one.request.sampling.max_tokens:
            scheduler.finish(one, FinishReason.LENGTH)


def test_a_prompt_is_cut_to_the_budget_and_sampled_when_complete() -> None:
    scheduler, _, _ = make_scheduler(max_batch_tokens=16)
    scheduler.add(sequence(40))
    steps = [scheduler.schedule(0.0) for _ in range(3)]
    assert all(step is not None for step in steps)
    assert [(step.batch.starts.tolist(), step.batch.counts.tolist()) for step in steps if step] == [
        ([0], [16]),
        ([16], [16]),
        ([32], [8]),
    ]
    assert [step.batch.sampled.tolist() for step in steps if step] == [[], [], [0]]


def test_decodes_come_first_and_prefill_fills_the_dense_batch() -> None:
    scheduler, _, _ = make_scheduler(max_batch_tokens=16)
    scheduler.add(sequence(5))
    first = scheduler.schedule(0.0)
    assert first is not None
    scheduler.add(sequence(30))
    step = scheduler.schedule(0.0)
    assert step is not None
    assert step.batch.num_decodes == 1
    assert step.batch.counts.tolist() == [1, 15]
    assert step.batch.starts.tolist() == [5, 0]
    assert step.batch.num_tokens == 16


def test_decodes_one_step_ahead_of_known_tokens_and_never_past_the_limit() -> None:
    scheduler, blocks, _ = make_scheduler()
    one = sequence(3, max_tokens=4)
    scheduler.add(one)
    steps = []
    while (step := scheduler.schedule(0.0)) is not None:
        steps.append(step)
    assert len(steps) == 4, "prefill draws the first token, three decodes the others"
    for step in steps:
        deliver(scheduler, step)
    assert one.finish_reason is FinishReason.LENGTH
    assert scheduler.num_running == 0 and blocks.num_used_blocks == 0


def test_higher_priority_first_then_order_of_arrival() -> None:
    scheduler, _, _ = make_scheduler(max_batch_tokens=8, max_sequences=1)
    late, urgent, early = sequence(4, 1), sequence(4, 1, priority=5), sequence(4, 1)
    for one in (early, late, urgent):
        scheduler.add(one)
    seen = []
    while (step := scheduler.schedule(0.0)) is not None:
        seen += step.sampled
        deliver(scheduler, step)
    assert seen == sorted([late, urgent, early])
    assert seen[0] is urgent


def test_a_known_prefix_is_not_computed_again_but_one_token_always_is() -> None:
    scheduler, _, _ = make_scheduler(max_batch_tokens=64)
    prompt = list(range(16))
    scheduler.add(sequence(prompt, 1))
    first = scheduler.schedule(0.0)
    assert first is not None
    deliver(scheduler, first)
    again = sequence(prompt, 1)
    scheduler.add(again)
    step = scheduler.schedule(0.0)
    assert step is not None
    assert (step.batch.starts.tolist(), step.batch.counts.tolist()) == ([12], [4])
    assert again.num_cached_tokens == 12
    assert scheduler.num_cached_prompt_tokens == 12 and scheduler.num_prompt_tokens == 32


def test_generated_tokens_become_a_prefix_for_the_next_turn() -> None:
    scheduler, _, _ = make_scheduler(max_batch_tokens=64)
    turn = sequence(list(range(6)), 8)
    scheduler.add(turn)
    while (step := scheduler.schedule(0.0)) is not None:
        deliver(scheduler, step)
    follow_up = sequence([*turn.token_ids, 500, 501], 1)
    scheduler.add(follow_up)
    scheduler.schedule(0.0)
    assert follow_up.num_cached_tokens == 12, "three full blocks of the 14 tokens of the first turn"


def test_admission_waits_for_predicted_blocks_not_only_for_free_ones() -> None:
    scheduler, _, predictor = make_scheduler(num_blocks=11, max_batch_tokens=64)
    for _ in range(4):
        scheduler.add(sequence(8, max_tokens=16))  # 2 blocks now, 6 at the end
    scheduler.schedule(0.0)
    assert scheduler.num_running == 1, "nothing is known yet, so every request counts at its limit"
    for _ in range(100):
        predictor.observe(2)
    scheduler.schedule(0.0)
    assert scheduler.num_running == 3, "answers of two tokens leave room for three"
    assert scheduler.num_preemptions == 0


def test_wrong_prediction_preempts_the_youngest_and_loses_nothing() -> None:
    scheduler, blocks, predictor = make_scheduler(num_blocks=8, max_batch_tokens=64)
    for _ in range(100):
        predictor.observe(1)
    old, young = sequence(8, max_tokens=20), sequence(8, max_tokens=20)
    scheduler.add(old)
    scheduler.add(young)
    finished_order = []
    for _ in range(200):
        step = scheduler.schedule(0.0)
        if step is None:
            break
        deliver(scheduler, step)
        finished_order += [one for one in step.sampled if one.finish_reason is not None]
    assert scheduler.num_preemptions >= 1 and scheduler.num_recomputed_tokens >= 1
    assert finished_order == [old, young]
    assert old.num_generated == young.num_generated == 20
    assert blocks.num_used_blocks == 0


def test_finishing_frees_blocks_at_once_in_any_state() -> None:
    scheduler, blocks, _ = make_scheduler(max_sequences=2, max_batch_tokens=8)
    decoding, prefilling, waiting = sequence(4), sequence(20), sequence(4)
    for one in (decoding, prefilling, waiting):
        scheduler.add(one)
    scheduler.schedule(0.0)
    for one in (decoding, prefilling, waiting):
        scheduler.finish(one, FinishReason.ABORT)
    assert blocks.num_used_blocks == 0
    assert scheduler.num_running == scheduler.num_waiting == 0
    assert scheduler.schedule(0.0) is None


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 24), st.integers(0, 2), st.integers(0, 30)),
        min_size=1,
        max_size=20,
    ),
    num_blocks=st.integers(16, 60),
    learned=st.one_of(st.none(), st.integers(1, 24)),
    aborts=st.sets(st.integers(0, 19), max_size=4),
)
def test_any_traffic_ends_with_every_token_and_every_block_back(
    requests: list[tuple[int, int, int, int]], num_blocks: int, learned: int | None, aborts: set[int]
) -> None:
    """Arrivals, priorities, wrong predictions, preemptions and aborts, with results one step late as in the engine."""
    scheduler, blocks, predictor = make_scheduler(num_blocks=num_blocks, max_batch_tokens=16, max_sequences=6)
    if learned is not None:
        for _ in range(64):
            predictor.observe(learned)
    pending = sorted(
        ((arrival, sequence(prompt, limit, priority)) for prompt, limit, priority, arrival in requests),
        key=lambda pair: pair[0],
    )
    everyone = [one for _, one in pending]
    in_flight: list[ScheduledStep] = []
    for step_number in range(5000):
        while pending and pending[0][0] <= step_number:
            scheduler.add(pending.pop(0)[1])
        if step_number in aborts and step_number < len(everyone) and everyone[step_number].order >= 0:
            victim = everyone[step_number]
            if victim.status is not SequenceStatus.FINISHED and all(victim is not one for _, one in pending):
                scheduler.finish(victim, FinishReason.ABORT)
        step = scheduler.schedule(float(step_number))
        if step is not None:
            in_flight.append(step)
            assert step.batch.num_tokens <= 16
            assert len(set(step.batch.rows.tolist())) == len(step.batch.rows)
        if len(in_flight) > (0 if step is None else 1):
            deliver(scheduler, in_flight.pop(0))
        elif step is None and not pending:
            break
    assert all(one.status is SequenceStatus.FINISHED for one in everyone)
    for one in everyone:
        if one.finish_reason is FinishReason.LENGTH:
            assert one.num_generated == one.request.sampling.max_tokens
    assert blocks.num_used_blocks == 0


def test_a_known_token_completes_a_block_one_step_after_it_was_drawn() -> None:
    scheduler, blocks, _ = make_scheduler(max_batch_tokens=64)
    one = sequence(6, max_tokens=8)  # blocks of 4: known tokens 6, then 7, ...
    scheduler.add(one)
    known = []
    for _ in range(4):
        step = scheduler.schedule(0.0)
        assert step is not None
        deliver(scheduler, step)
        known.append(len(blocks.match(one.hash_blocks(4))))
    assert known == [1, 1, 2, 2], "the eighth token's key is written by the step that draws the ninth"


def test_tokens_of_ended_sequences_are_dropped() -> None:
    scheduler, _, _ = make_scheduler()
    stays, goes = sequence(3), sequence(3)
    scheduler.add(stays)
    scheduler.add(goes)
    step = scheduler.schedule(0.0)
    assert step is not None and step.sampled == [stays, goes]
    scheduler.finish(goes, FinishReason.ABORT)
    scheduler.append(step, [5, 6])
    assert (stays.num_generated, goes.num_generated) == (1, 0)


def test_block_updates_keep_their_order() -> None:
    updates = BlockUpdates()
    assert updates.array().shape == (0, 3)
    updates.add([4, 4], range(2), [70, 71])
    updates.add([1], [9], [72])
    assert updates.array().tolist() == [[4, 0, 70], [4, 1, 71], [1, 9, 72]]


def test_predictor_learns_conditional_means_and_forgets() -> None:
    predictor = LengthPredictor(100, min_observations=2, memory=20.0)
    generated, limits = np.asarray([0, 15], np.int32), np.asarray([50, 50], np.int32)
    assert predictor.remaining(generated, limits)[0].tolist() == [50.0, 35.0]
    for length in (10, 20):
        predictor.observe(length)
    mean, variance = predictor.remaining(generated, limits)
    assert mean[0] == pytest.approx(15, abs=0.5) and variance[0] == pytest.approx(25, abs=1)
    assert mean[1] == pytest.approx(5, abs=0.1) and variance[1] == pytest.approx(0, abs=0.1)
    for _ in range(200):
        predictor.observe(40)
    assert predictor.remaining(generated, limits)[0][0] == pytest.approx(40, abs=0.5)


def test_peak_use_takes_the_largest_moment_not_the_sum_of_final_sizes() -> None:
    peak = PeakUse(
        block_size=1,
        held=np.asarray([10, 10], np.int32),
        remaining=np.asarray([5.0, 100.0]),
        variance=np.zeros(2),
        num_shared=0,
    )
    # After 5 tokens both hold 15 (+ half a block each); after 100 only one is left, holding 110.5.
    assert peak.num_blocks() == pytest.approx(110.5)
    peak.add(90, 5.0, 0.0)
    assert peak.num_blocks() == pytest.approx(10 + 10 + 90 + 3 * 5.5)


@settings(max_examples=200, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 300), st.floats(0, 1e4)), max_size=12),
    num_running=st.integers(0, 12),
    num_blocks=st.integers(0, 1500),
)
def test_whether_a_peak_fits_is_the_same_with_and_without_the_bound(
    sequences: list[tuple[int, int, float]], num_running: int, num_blocks: int
) -> None:
    running, added = sequences[:num_running], sequences[num_running:]

    def peak_of(known: list[tuple[int, int, float]]) -> PeakUse:
        held, remaining, variance = np.array(known, np.float64).reshape(-1, 3).T
        return PeakUse(block_size=16, held=held.astype(np.int32), remaining=remaining, variance=variance, num_shared=2)

    growing = peak_of(running)
    for number, newcomer in enumerate(added, start=len(running) + 1):
        growing.add(*newcomer)
        exact = peak_of(sequences[:number]).num_blocks()
        assert growing.num_blocks() == pytest.approx(exact)
        if abs(exact - num_blocks) > 1e-6:
            assert growing.fits(num_blocks) == (exact <= num_blocks)
