"""`Candidates`: the schedules that are worth trying on a batch, planned by rank 0 and known to all ranks of a group."""

import json
from collections.abc import Sequence
from functools import partial

from engine.batch_shape import BatchShape
from engine.config import EngineConfig
from engine.pipeline.cost_model import CostModel
from engine.pipeline.mechanism_plans import plans_by_mechanism
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.plan import Plan
from engine.pipeline.profile import MeasuredCosts
from engine.pipeline.rank_agreement import RankAgreement
from engine.pipeline.schedule import Lane, Schedule

_NUM_CANDIDATES = 3
# Where lanes can overlap by several mechanisms, of each.
_NUM_CANDIDATES_EACH = 2


class Candidates:
    """For the layers of one rank's `pipeline`; all ranks ask together."""

    def __init__(self, config: EngineConfig, pipeline: Pipeline, lanes: Sequence[Lane], ranks: RankAgreement) -> None:
        self._config = config
        self._pipeline = pipeline
        self._lanes = lanes
        self._ranks = ranks

    def of(
        self, shape: BatchShape, costs: MeasuredCosts, seconds: float, least_gain: float
    ) -> tuple[float, list[tuple[Schedule, float]]]:
        """The predicted seconds of a sequential step; schedules that promise to gain `least_gain` of it, with theirs.

        Planned for about `seconds`. Raises `FirstRankError` on every rank where rank 0 cannot.
        """
        text = self._ranks.done_by_first(partial(self._planned, shape, costs, seconds, least_gain))
        predicted, candidates = json.loads(text)
        return predicted, [(Schedule.parse(schedule), step_seconds) for schedule, step_seconds in candidates]

    def _planned(self, shape: BatchShape, costs: MeasuredCosts, seconds: float, least_gain: float) -> str:
        """Rank 0's part: [seconds, [[schedule, seconds], ...]] as JSON."""
        from engine.pipeline.planner import plan

        def search(prices: CostModel, seconds: float) -> Plan:
            return plan(
                self._pipeline.graph,
                prices,
                shape,
                num_layers=self._config.model.num_layers,
                lanes=self._lanes,
                seconds=seconds,
                workers=self._config.threads_per_rank,
                token_multiple=max(16, round(shape.num_tokens / 16)),
                num_candidates=_NUM_CANDIDATES,
            )

        plans = plans_by_mechanism(costs, shape, search, seconds)
        sequential = plans[0].sequential.step_seconds
        count = _NUM_CANDIDATES if len(plans) == 1 else _NUM_CANDIDATES_EACH
        best = {candidate.schedule: candidate for planned in plans for candidate in planned.candidates[:count]}
        worth = (1 - least_gain) * sequential
        candidates = [candidate for candidate in best.values() if candidate.step_seconds <= worth]
        for candidate in candidates:
            self._pipeline.check(candidate.schedule)
        return json.dumps([sequential, [(str(each.schedule), each.step_seconds) for each in candidates]])
