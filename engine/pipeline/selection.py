"""Selection: the plans that a rank serves by, each measured to be faster than running one operation after the other.

Stored plans of the same fingerprint are used as they are. Without any, the group profiles its layer (on a GPU somebody
must have done so before), rank 0 plans for the largest batches first, every rank runs the best few candidates and the
sequential schedule for real, and what wins by a margin is kept and stored. Where the prediction leaves nothing to win,
nothing is run. Plans that were cut short by time are gone on with at the next start. All ranks end with the same; what
fails on rank 0 makes steps run sequentially.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch

from engine.batch_shape import BatchShape
from engine.config import DeviceKind, EngineConfig, PipelineMode
from engine.pipeline.bucket import Bucket, buckets
from engine.pipeline.candidates import Candidates
from engine.pipeline.contest import Contest, Tried
from engine.pipeline.fingerprint import fingerprint_of
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.placement import CPU_LANES, GPU_LANES, lane_of
from engine.pipeline.plan_set import PlanSet, SelectedPlan
from engine.pipeline.plan_store import PlanStore, shipped_directory
from engine.pipeline.profile import MeasuredCosts, Profile
from engine.pipeline.profile_grid import QUICK, ProfileGrid
from engine.pipeline.profiler import Profiler
from engine.pipeline.rank_agreement import FirstRankError, RankAgreement
from engine.pipeline.schedule import ScheduleError
from engine.pipeline.stopwatch import Stopwatch
from engine.pipeline.trial import Contestant, Trial
from engine.tensor_parallel import TensorParallel

_log = logging.getLogger(__name__)

# A plan must be predicted to save this part of a step to be tried.
LEAST_PREDICTED_GAIN = 0.02
# Where computation waits for the network less than this, overlap is not worth measuring anything for.
LEAST_NETWORK_SHARE = 0.04
_NETWORK_SHARE_SECONDS = 1.0
# What is measured to gain this much is believed at once.
SURE_GAIN = 0.15
_CONFIRMING_ROUNDS = 8
_PLANNING_SHARE = 0.4
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much time a selection takes: to profile (`grid`), and to plan and to try each bucket of batches.

    No bucket is begun after `total_seconds`, of which profiling is a part; batches of those left out run sequentially.
    """

    grid: ProfileGrid
    seconds_per_bucket: float
    total_seconds: float


def effort_at_start(config: EngineConfig) -> Effort | None:
    """What `config` allows before the first request is served."""
    return (
        Effort(grid=QUICK, seconds_per_bucket=4.0, total_seconds=config.plan_seconds) if config.plan_seconds else None
    )


class Selector:
    """One rank's part in choosing plans; every rank of the group makes one and calls `select` with the others."""

    def __init__(
        self,
        config: EngineConfig,
        pipeline: Pipeline,
        tensor_parallel: TensorParallel,
        store: PlanStore | None = None,
        progress: Progress = lambda text: None,
    ) -> None:
        self._config = config
        self._pipeline = pipeline
        self._tensor_parallel = tensor_parallel
        self._device = torch.device(config.device.value)
        self._ranks = RankAgreement(tensor_parallel, self._device)
        self._lanes = GPU_LANES if config.device is DeviceKind.CUDA else CPU_LANES
        self._candidates = Candidates(config, pipeline, self._lanes, self._ranks)
        self._store = store or PlanStore(shipped=shipped_directory())
        self._progress = progress
        self._fingerprint = fingerprint_of(config, pipeline.graph.signature, tensor_parallel)

    @property
    def can_overlap(self) -> bool:
        """Whether the layer's operations are on several lanes here; else there is nothing to choose between.

        A GPU has a lane of its own for attention that reads the cache, so that even a group of one can overlap there.
        """
        return len({lane_of(node, self._lanes) for node in self._pipeline.graph.nodes}) > 1

    def select(self, effort: Effort | None) -> PlanSet | None:
        """The plans to serve by; None runs everything sequentially. Without `effort` only stored plans are used."""
        if self._config.pipeline is PipelineMode.SEQUENTIAL or not self.can_overlap:
            return None
        try:
            return self._stored_or_planned(effort)
        except FirstRankError as error:
            self._warn(f"There are no plans, and steps run sequentially: {error}")
            return None

    def _stored_or_planned(self, effort: Effort | None) -> PlanSet | None:
        stored = self.stored()
        if effort is None or (stored is not None and stored.is_complete):
            return stored
        started = Stopwatch.now()
        profile = None if stored is None else stored.profile
        if self._config.device is DeviceKind.CUDA:
            # A start plans there only from a profile that is at hand, and then tries the graphs that would be served.
            # It makes none: what a share of the units costs, alone and beside others, takes minutes to tell, and times
            # of a few seconds' measuring would find plans that the trial refuses. Nor is the time that computation
            # waits for the network looked at first: without a network, attention is what there is to overlap.
            profile = profile or self._finished()
            if profile is None:
                self._progress("no plans are made without a profile of this setup, as `nanoserve profile` measures it")
                return stored
            return self.plan(profile, effort, started, stored)
        if stored is not None:
            self._progress("these plans were cut short by time, and are gone on with")
            return self.plan(profile or self.profile(effort.grid), effort, started, stored)
        share = self._network_share(Trial(self._config, self._pipeline, self._tensor_parallel))
        if share < LEAST_NETWORK_SHARE:
            self._progress(f"no overlap to plan: the network takes {100 * share:.1f} % of the largest step")
            return None  # it takes little to find out again, and the next time may tell something else
        return self.plan(self.profile(effort.grid), effort, started)

    def _network_share(self, trial: Trial) -> float:
        """The part of the largest step that computation waits for the network, which is all that could be gained."""
        num_tokens = self._config.max_batch_tokens
        num_decodes = min(self._config.max_sequences, num_tokens)
        shape = self._shape(num_decodes, num_tokens - num_decodes)
        (timing,) = trial.run([Contestant(self._pipeline.sequential, False)], shape, _NETWORK_SHARE_SECONDS)
        return self._ranks.largest([timing.exposed_network_seconds / timing.seconds])[0]

    def stored(self) -> PlanSet | None:
        """The stored plans of this fingerprint, if they are there and can be used."""
        text = self._ranks.done_by_first(self._found)
        if not text:
            return None
        plans = PlanSet.parse(text)
        try:
            for schedule in plans.schedules:
                self._pipeline.check(schedule)
        except ScheduleError as error:
            self._warn(f"Stored plans cannot be used and are made anew: {error}")
            return None
        return plans

    def _found(self) -> str:
        """Rank 0's part: the text of the stored plans, or nothing."""
        found = self._store.find(self._fingerprint)
        self._progress(found.reason)
        return "" if found.plans is None else str(found.plans)

    def profile(self, grid: ProfileGrid) -> Profile:
        """What `nanoserve profile` measured for this setup, if it did; else measure the layer on all ranks."""
        finished = self._finished()
        if finished is not None:
            return finished
        self._progress(f"measuring the operations of a layer ({grid.name} profile)")
        return self._profiler(grid).profile(self._store.profile_path(self._fingerprint, grid.name), must_write=False)

    def _finished(self) -> Profile | None:
        finished = self._profiler(QUICK).finished(self._store.profile_path(self._fingerprint))
        if finished is not None:
            self._progress(f"the operations of a layer as they were {finished.source}")
        return finished

    def _profiler(self, grid: ProfileGrid) -> Profiler:
        return Profiler(
            self._pipeline.program,
            self._config,
            self._tensor_parallel,
            self._device,
            self._fingerprint,
            grid,
            self._pipeline.units,
            self._pipeline.lanes_on(self._device),
        )

    def plan(self, profile: Profile, effort: Effort, started: float, begun: PlanSet | None = None) -> PlanSet:
        """Plan, try and keep, bucket after bucket; smaller batches only as long as larger ones gained something.

        `started` is when the selection began: the time that profiling took counts too. What `begun` has is kept. A
        bucket that cannot be planned is left out, and tried again at the next start.
        """
        costs = MeasuredCosts(profile, self._pipeline.graph)
        trial = Trial(self._config, self._pipeline, self._tensor_parallel)
        kept: list[SelectedPlan] = []
        is_complete = True
        candidates = buckets(self._config.max_batch_tokens, self._config.max_sequences)
        for _, of_this_size in groupby(candidates, key=lambda bucket: bucket.num_tokens):
            gains = False
            for bucket in of_this_size:
                batch = bucket.batch(self._config.max_sequences)
                assert batch is not None
                selected = None if begun is None else begun.lookup(*batch)
                if selected is None:
                    if self._ranks.largest([Stopwatch.now() - started])[0] > effort.total_seconds:
                        is_complete = False
                        continue  # there may be smaller ones that were begun with
                    try:
                        selected = self._select(bucket, batch, costs, trial, effort.seconds_per_bucket)
                    except FirstRankError as error:
                        self._warn(f"No plan for batches of {bucket}, which run sequentially: {error}")
                        is_complete = False
                        continue
                kept.append(selected)
                gains |= selected.schedule is not None
            if not gains:
                break
        return self._saved(profile, kept, is_complete)

    def _shape(self, num_decodes: int, num_prefills: int) -> BatchShape:
        """A batch of so many tokens, with the contexts of sequences that grow to half of what they may."""
        context = self._config.max_model_len / 4
        return BatchShape(
            num_decodes=num_decodes, num_prefills=num_prefills, decode_context=context, prefill_context=context / 2
        )

    def _select(
        self, bucket: Bucket, batch: tuple[int, int], costs: MeasuredCosts, trial: Trial, seconds: float
    ) -> SelectedPlan:
        """The fastest of sequential and the best candidates, run for real where the prediction promises a gain."""
        contest = self.contest(self._shape(*batch), costs, trial, seconds)
        self._progress(f"{bucket}: {contest}")
        winner = contest.winner
        return SelectedPlan(
            num_decodes=batch[0],
            num_prefills=batch[1],
            schedule=None if winner is None else winner.schedule,
            sequential_seconds=contest.sequential.seconds,
            plan_seconds=contest.sequential.seconds if winner is None else winner.timing.seconds,
            predicted_seconds=contest.predicted_sequential if winner is None else winner.predicted_seconds,
        )

    def contest(
        self,
        shape: BatchShape,
        costs: MeasuredCosts,
        trial: Trial,
        seconds: float,
        least_gain: float = LEAST_PREDICTED_GAIN,
    ) -> Contest:
        """Plan for a batch, and run what is predicted to gain at least `least_gain` against the sequential schedule."""
        predicted, planned = self._candidates.of(shape, costs, seconds * _PLANNING_SHARE, least_gain)
        sequential, *timings = trial.run(
            [Contestant(self._pipeline.sequential, False), *(Contestant(schedule, True) for schedule, _ in planned)],
            shape,
            seconds * (1 - _PLANNING_SHARE) if planned else 0.0,
        )
        tried = (Tried(*plan, timing) for plan, timing in zip(planned, timings, strict=True))
        contest = Contest(predicted, sequential, tuple(tried))
        winner = contest.winner
        if winner is None or winner.timing.seconds <= (1 - SURE_GAIN) * sequential.seconds:
            return contest
        # The best of several by a little may owe it to luck: it must win once more, alone and in more rounds.
        contestants = [Contestant(self._pipeline.sequential, False), Contestant(winner.schedule, True)]
        sequential, timing = trial.run(contestants, shape, seconds / 2, min_rounds=_CONFIRMING_ROUNDS)
        return Contest(predicted, sequential, (Tried(winner.schedule, winner.predicted_seconds, timing),))

    def _saved(self, profile: Profile, plans: list[SelectedPlan], is_complete: bool) -> PlanSet:
        chosen = PlanSet(
            fingerprint=self._fingerprint,
            max_batch_tokens=self._config.max_batch_tokens,
            is_complete=is_complete,
            profile=profile,
            plans=tuple(plans),
        )
        chosen = PlanSet.parse(self._ranks.text_of_first(str(chosen)))
        try:
            self._ranks.done_by_first(lambda: str(self._store.save(chosen)))
        except FirstRankError as error:
            self._warn(f"The plans could not be stored and will be made again at the next start: {error}")
        return chosen

    def _warn(self, text: str) -> None:
        """Once for the group."""
        if self._ranks.is_first:
            _log.warning("%s", text)
