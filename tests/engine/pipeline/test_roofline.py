"""Prices from a data sheet."""

from dataclasses import replace

import pytest

from engine.batch_shape import BatchShape
from engine.errors import ConfigError
from engine.model_config import Architecture
from engine.model_shapes import model_shape
from engine.operation import Resource, Work
from engine.pipeline.cost_model import CostModel, Mode
from engine.pipeline.devices import data_sheet
from engine.pipeline.planned_model import trace_planned_layer
from engine.pipeline.roofline import RooflineCosts, roofline_seconds
from engine.pipeline.unit_sharing import PAPER_SHARING, REPOSITORY_SHARING, UnitSharing
from engine.random_checkpoint import sized_config

A100 = data_sheet("a100-80gb")
TRACED = trace_planned_layer(model_shape("llama-2-70b"), 8)
NODES = TRACED.graph.by_name
STEADY = BatchShape.steady(2048, 512, 1024)
COSTS = RooflineCosts(TRACED, A100, 8, 2)


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (Work(flops=312e12), 1.0),
        (Work(flops=312e12, weight_bytes=2e12, sharded_bytes=1e12, replicated_bytes=1e12), 2.0),
        (Work(flops=312e12, network_bytes=900e9), 3.0),
        (Work(), 0.0),
    ],
)
def test_the_busiest_resource_decides(work: Work, seconds: float) -> None:
    assert roofline_seconds(work, A100, 2) == pytest.approx(seconds)


def test_calls_of_a_node_run_one_after_the_other() -> None:
    node = NODES["gate_up_proj"]
    each = [roofline_seconds(work, A100, 2) for _, work in TRACED.call_work(node, STEADY, 2)]
    assert len(each) == 3
    assert min(each) > 0
    assert COSTS.seconds(node, STEADY) == pytest.approx(sum(each))


def test_large_batches_are_bound_by_compute_and_small_ones_by_the_weights() -> None:
    node = NODES["gate_up_proj"]
    large = COSTS.seconds(node, STEADY)
    assert COSTS.seconds(node, STEADY.part(2 * STEADY.num_decodes, 2 * STEADY.num_prefills)) > 1.9 * large
    one, two = (COSTS.seconds(node, STEADY.part(count, 0)) for count in (1, 2))
    weights = 57344 * 8192 * 2 / 8 / 2e12
    assert one == pytest.approx(weights, rel=0.01)
    assert two == pytest.approx(one, rel=0.01)


def test_no_tokens_of_its_kind_cost_a_node_nothing() -> None:
    assert all(COSTS.seconds(node, STEADY.part(0, 0)) == 0 for node in NODES.values())
    assert COSTS.seconds(NODES["decode_attention"], STEADY.part(0, 100)) == 0
    assert COSTS.seconds(NODES["prefill_attention"], STEADY.part(100, 0)) == 0
    assert COSTS.seconds(NODES["o_proj"], STEADY.part(100, 0)) > 0


@pytest.mark.parametrize("sharing", [None, REPOSITORY_SHARING])
def test_shares_follow_the_resource_of_the_node(sharing: UnitSharing | None) -> None:
    costs: CostModel = replace(COSTS, sharing=sharing)
    table = sharing or PAPER_SHARING
    assert costs.shares_units
    for name, resource in (
        ("o_proj", Resource.COMPUTE),
        ("prefill_attention", Resource.COMPUTE),
        ("decode_attention", Resource.MEMORY),
        ("attention_all_reduce", Resource.NETWORK),
    ):
        node = NODES[name]
        modes = costs.modes(node)
        assert [mode.share for mode in modes] == list(range(1, 11))
        assert [mode.speed for mode in modes] == list(getattr(table, resource.value))
        beside = [(NODES["qkv_proj"], 4)]
        assert [costs.speed(node, mode.share, beside) for mode in modes] == [mode.speed for mode in modes]


def test_prices_say_that_nothing_ran() -> None:
    assert COSTS.source == "estimate, nothing ran: 8 x a100-80gb (data sheet); speeds of shared units from " + (
        PAPER_SHARING.name
    )


def test_a_device_that_does_not_divide_its_units_has_one_mode() -> None:
    cpu = replace(A100, name="cpu", sharing=None, network_bandwidth=None)
    costs = RooflineCosts(TRACED, cpu, 8, 2, sharing=PAPER_SHARING)
    node = NODES["decode_attention"]
    assert not costs.shares_units
    assert costs.modes(node) == (Mode(10, 1.0),)
    assert costs.speed(node, 10, [(NODES["o_proj"], 10)]) == 1
    assert costs.source.endswith("cpu (data sheet)")
    with pytest.raises(ConfigError, match="cpu: nothing is known of the network"):
        costs.seconds(NODES["attention_all_reduce"], STEADY)


def test_one_device_needs_no_network() -> None:
    traced = trace_planned_layer(sized_config(Architecture.MIXTRAL), 1)
    costs = RooflineCosts(traced, replace(A100, network_bandwidth=None), 1, 4)
    assert all(costs.seconds(node, STEADY) > 0 for node in traced.graph.nodes)
