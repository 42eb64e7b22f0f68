"""Gathering before the projection of attention, as a branch beside reducing after it."""

import pytest

from engine.batch_shape import BatchShape
from engine.model_shapes import model_shape
from engine.operation import Resource
from engine.pipeline.collective_placement import GATHER, REDUCE, with_gather_branch
from engine.pipeline.devices import data_sheet
from engine.pipeline.nano_batch import Cut, NanoBatch
from engine.pipeline.planned_model import trace_planned_layer
from engine.pipeline.roofline import RooflineCosts
from engine.pipeline.split_schedule import split_schedule
from engine.pipeline.verify import verify

SHAPE = BatchShape(num_decodes=1280, num_prefills=768, decode_context=1000, prefill_context=500)


@pytest.mark.parametrize("model", ["llama-2-70b", "mixtral-8x7b", "qwen2-72b"])
def test_both_ways_end_in_the_same_value(model: str) -> None:
    plain = trace_planned_layer(model_shape(model), 8)
    graph = with_gather_branch(plain).graph
    assert graph.branches == (REDUCE, GATHER)
    assert graph.output == plain.graph.output
    members = {branch: [node.name for node in graph.nodes if node.branch == branch] for branch in graph.branches}
    assert members[REDUCE] == ["o_proj", "attention_all_reduce"]
    assert members[GATHER][-3:] == ["gather_heads", "o_proj_columns", "gather_columns"]
    assert set(graph.producers["attention_all_reduce"]) == {"attention_all_reduce", "gather_columns"}
    assert [node for node in graph.nodes if node.branch is None] == [
        node for node in plain.graph.nodes if node.name not in members[REDUCE]
    ]
    # nothing crosses from one branch to the other
    for producer, consumer, _ in graph.edges:
        branches = {graph.by_name[producer].branch, graph.by_name[consumer].branch} - {None}
        assert len(branches) <= 1


def test_both_ways_send_the_same_bytes_and_compute_the_same() -> None:
    traced = with_gather_branch(trace_planned_layer(model_shape("llama-2-70b"), 8))
    work = {node.name: traced.work(node, SHAPE, 2) for node in traced.graph.nodes}
    gathered = work["gather_heads"].network_bytes + work["gather_columns"].network_bytes
    assert gathered == pytest.approx(work["attention_all_reduce"].network_bytes)
    assert work["gather_heads"].network_bytes == pytest.approx(gathered / 2)
    assert work["o_proj_columns"].flops == pytest.approx(work["o_proj"].flops)
    assert work["o_proj_columns"].weight_bytes == work["o_proj"].weight_bytes
    costs = RooflineCosts(traced, data_sheet("a100-80gb"), 8, 2)
    for node in traced.graph.nodes:
        if node.branch == GATHER and node.resource is not Resource.MEMORY:
            assert costs.seconds(node, SHAPE) > 0


def test_one_device_has_nothing_to_gather() -> None:
    plain = trace_planned_layer(model_shape("llama-3-8b"), 1)
    assert with_gather_branch(plain) is plain


def test_a_schedule_of_either_branch_verifies() -> None:
    traced = with_gather_branch(trace_planned_layer(model_shape("llama-2-70b"), 8))
    verify(split_schedule(traced.graph, Cut((NanoBatch(640, 384), NanoBatch(640, 384)))), traced.graph)
