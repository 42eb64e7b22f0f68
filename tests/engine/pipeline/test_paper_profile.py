"""NanoFlow's measured operation times, as a profile that a planner can use."""

from pathlib import Path

import pytest

from engine.model_shapes import model_shape
from engine.operation import TokenKind
from engine.pipeline.paper_profile import NUM_LAYERS, PAPER_BATCH, PAPER_OPERATIONS, paper_profile
from engine.pipeline.planned_model import trace_planned_layer
from engine.pipeline.profile import MeasuredCosts, Profile
from engine.pipeline.unit_sharing import PAPER_SHARING

SHIPPED = Path(__file__).parents[3] / "deploy" / "profiles" / "a100-80gb" / "llama-2-70b-paper.json"
GRAPH = trace_planned_layer(model_shape("llama-2-70b"), 8).graph
COSTS = MeasuredCosts(Profile.read(SHIPPED), GRAPH)


def test_the_shipped_file_is_what_the_figures_give() -> None:
    assert SHIPPED.read_text() == str(paper_profile())
    assert Profile.read(SHIPPED) == paper_profile()


def test_one_operation_after_the_other_takes_what_the_paper_measured() -> None:
    seconds = NUM_LAYERS * sum(COSTS.seconds(node, PAPER_BATCH) for node in GRAPH.nodes)
    assert seconds == pytest.approx(0.22505, rel=1e-4)
    planned = PAPER_BATCH.part(1280, 768)  # in whole chunks of 128 tokens, as plans have it
    assert NUM_LAYERS * sum(COSTS.seconds(node, planned) for node in GRAPH.nodes) == pytest.approx(0.225, rel=0.03)


@pytest.mark.parametrize("name", PAPER_OPERATIONS)
def test_half_a_batch_pays_the_fixed_part_again(name: str) -> None:
    node, operation = GRAPH.by_name[name], PAPER_OPERATIONS[name]
    assert (node.resource, node.tokens) == (operation.resource, operation.tokens)
    whole = COSTS.seconds(node, PAPER_BATCH)
    half = COSTS.seconds(node, PAPER_BATCH.part(PAPER_BATCH.num_decodes / 2, PAPER_BATCH.num_prefills / 2))
    assert 2 * half - whole == pytest.approx(operation.fixed_microseconds * 1e-6, abs=1e-9)
    assert COSTS.seconds(node, PAPER_BATCH.part(0, 0)) == 0


def test_splitting_without_overlap_loses_about_what_the_paper_lost() -> None:
    """13.2 % (figure 9) with products and attention at the head of a layer in four, the rest in two."""
    loss = sum(
        operation.fixed_microseconds * 1e-6 * (3 if name in ("qkv_proj", "decode_attention") else 1)
        for name, operation in PAPER_OPERATIONS.items()
        if operation.tokens is not TokenKind.PREFILL
    )
    assert loss * NUM_LAYERS / 0.22505 == pytest.approx(0.132, abs=0.01)


def test_shares_are_the_papers() -> None:
    assert COSTS.shares_units
    for node in GRAPH.nodes:
        assert tuple(mode.speed for mode in COSTS.modes(node)) == PAPER_SHARING.speeds(node.resource)
    assert COSTS.speed(GRAPH.by_name["decode_attention"], 4, [(GRAPH.by_name["qkv_proj"], 6)]) == pytest.approx(0.5)
