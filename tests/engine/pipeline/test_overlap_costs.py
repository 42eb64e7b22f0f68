"""Planning by a mechanism: with the split that suits the batch, against the sequential schedule as it is without."""

from dataclasses import replace

import pytest

from engine.errors import ConfigError
from engine.model_shapes import model_shape
from engine.number_format import NumberFormat
from engine.pipeline.cost_model import CostModel, Mode
from engine.pipeline.devices import data_sheet
from engine.pipeline.mechanism_plans import plans_by_mechanism
from engine.pipeline.overlap_costs import OverlapCosts
from engine.pipeline.plan import Plan
from engine.pipeline.plan_report import PlanReport
from engine.pipeline.plan_request import PlanRequest
from engine.pipeline.planner import plan
from engine.pipeline.profile import MeasuredCosts
from engine.pipeline.schedule import ALL_UNITS, Lane, Mechanism, Schedule
from engine.pipeline.verify import verify
from tests.engine.pipeline.overlap_case import COSTS, GRAPH, LANES, SHAPE, linear, saturating


def test_the_split_is_the_one_whose_longer_lane_is_shortest() -> None:
    """Attention of 4 ms needs six tenths to be as fast as it can: at five both lanes take longest, at two attention."""
    seconds = {}
    for share in (2, 3, 4, 5):
        costs = OverlapCosts(Mechanism.GREEN, MeasuredCosts(COSTS.profile.by(Mechanism.GREEN), GRAPH), share)
        computing = sum(
            COSTS.seconds(node, SHAPE) for node in GRAPH.nodes if LANES[node.name] is Lane.COMPUTE
        ) / linear(ALL_UNITS - share)
        attending = COSTS.seconds(GRAPH.by_name["decode_attention"], SHAPE) / saturating(share)
        assert costs.longest_lane_seconds(SHAPE) == pytest.approx(max(computing, attending))
        seconds[share] = max(computing, attending)
    chosen = OverlapCosts.of(Mechanism.GREEN, COSTS, SHAPE)
    assert chosen.memory_share == min(seconds, key=lambda share: seconds[share])
    few = OverlapCosts.of(Mechanism.GREEN, COSTS, replace(SHAPE, num_decodes=32))
    assert few.memory_share == 2 < chosen.memory_share


def test_a_node_has_what_its_lane_has_whatever_share_is_asked_for() -> None:
    costs = OverlapCosts.of(Mechanism.GREEN, COSTS, SHAPE)
    attention, product = GRAPH.by_name["decode_attention"], GRAPH.by_name["o_proj"]
    for share in (1, 10):
        assert costs.speed(attention, share, ()) == pytest.approx(saturating(costs.memory_share))
        assert costs.speed(product, share, ()) == pytest.approx(linear(ALL_UNITS - costs.memory_share))
    assert costs.modes(product) == (Mode(ALL_UNITS, costs.speed(product, ALL_UNITS, ())),)
    joint = OverlapCosts.of(Mechanism.CORESIDENT, COSTS, SHAPE)
    assert joint.speed(product, ALL_UNITS, [(attention, ALL_UNITS)]) == pytest.approx(0.95 * 0.9)


def test_the_best_of_every_mechanism_is_a_schedule_that_it_can_run() -> None:
    def search(costs: CostModel, seconds: float) -> Plan:
        """What has no shares to divide is solved in less than a second; no test waits for the end of the other."""
        seconds = 0.1 if costs.shares_units else seconds
        return plan(GRAPH, costs, SHAPE, num_layers=8, seconds=seconds, workers=1, token_multiple=256)

    plans = plans_by_mechanism(COSTS, SHAPE, search, 20.0)
    assert len({found.sequential.step_seconds for found in plans}) == 1
    assert len(plans) == 1 + len(Mechanism)  # what a search of all shares finds in so little time is anybody's guess
    for found, mechanism in zip(plans[1:], Mechanism, strict=True):
        assert found.candidates and found.speedup > 1, mechanism
        assert found.best.step_seconds == min(each.step_seconds for each in found.candidates)
        assert found.lower_bound_seconds <= found.best.period_seconds
        for candidate in found.candidates:
            verify(candidate.schedule, GRAPH)
            assert candidate.schedule.mechanism is mechanism
            assert Schedule.parse(str(candidate.schedule)) == candidate.schedule
    share = OverlapCosts.of(Mechanism.GREEN, COSTS, SHAPE).memory_share
    assert {step.share for step in plans[2].schedule.lanes[Lane.MEMORY]} == {share}


def test_a_batch_that_leaves_nothing_to_overlap_has_no_plan_of_a_mechanism() -> None:
    costs = OverlapCosts.of(Mechanism.GREEN, COSTS, replace(SHAPE, num_decodes=0))
    assert costs.overlapped(Schedule.parse("nano-batches: 0+512\ncompute: qkv_proj[0:512]\n")) is None


def test_a_mechanism_that_was_not_measured_is_refused() -> None:
    bare = MeasuredCosts(replace(COSTS.profile, overlap={}), GRAPH)
    assert bare.profile.mechanisms == (Mechanism.STREAMS,)
    with pytest.raises(ConfigError, match="nothing measured of lanes that overlap by green; it has streams"):
        OverlapCosts.of(Mechanism.GREEN, bare, SHAPE)


def test_a_request_is_planned_by_the_mechanism_that_it_names() -> None:
    request = PlanRequest(
        name="llama-3-8b",
        model=model_shape("llama-3-8b"),
        device=data_sheet("a100-80gb"),
        num_devices=1,
        num_tokens=1024,
        num_prompt_tokens=512,
        num_output_tokens=512,
        number_format=NumberFormat.BFLOAT16,
        profile=COSTS.profile,
        mechanism=Mechanism.GREEN,
    )
    report = PlanReport(request, request.answer(20.0))  # it is solved in less than one
    assert report.plan.schedule.mechanism is Mechanism.GREEN and report.plan.speedup > 1
    assert max(event.end for event in report.timeline.events) == pytest.approx(report.plan.best.step_seconds)
    streams = replace(request, mechanism=Mechanism.STREAMS)
    sequential = sum(streams.price(node.name) for node in request.traced.graph.nodes)
    assert report.plan.sequential.step_seconds == pytest.approx(sequential)
    with pytest.raises(ConfigError, match="must have been measured: plan from a profile"):
        replace(request, profile=None).answer(1.0)
