import pytest

from engine.pipeline.graph import LAYER_INPUT, OperationGraph
from engine.pipeline.lifetimes import Lifetime, find_lifetimes
from engine.pipeline.nano_batch import NanoBatch
from engine.pipeline.schedule import Schedule
from engine.pipeline.verify import verify
from tests.engine.pipeline.schedule_strategies import graphs, node, sequential


def _lifetimes(schedule: Schedule, graph: OperationGraph, num_layers: int) -> dict[tuple[str, int, int], Lifetime]:
    verify(schedule, graph)
    owners = {value: value for value in graph.producers}
    found = find_lifetimes(schedule, graph, owners, {}, num_layers)
    return {(lifetime.owner, lifetime.start, lifetime.copy): lifetime for lifetime in found}


@pytest.mark.parametrize("num_layers", [1, 2, 3, 9, 80, 81])
def test_the_output_of_the_last_layer_lives_to_the_end_while_others_still_compute(num_layers: int) -> None:
    """Between layers, rows 0 to 4 of the output are dead when rows 4 to 8 of `mid` are written; after the last, not."""
    graph = OperationGraph((node("head", LAYER_INPUT), node("mid", "head"), node("tail", "mid")), "tail")
    steps = "head[0:4] mid[4:8]@1 tail[4:8]@1 head[4:8] mid[0:4] tail[0:4]"
    lives = _lifetimes(Schedule.parse(f"nano-batches: 4+0 4+0\ncompute: {steps}\n"), graph, num_layers)
    output, others = lives["tail", 0, 0], lives["mid", 4, 0].lives
    assert not any(life.meets(other) for life in output.lives[:-1] for other in others)
    assert any(output.lives[-1].meets(other) for other in others)
    assert output.meets(lives["mid", 4, 0])


@pytest.mark.parametrize("num_layers", [1, 2, 5, 20, 21])
def test_of_two_copies_the_last_layer_keeps_its_own(num_layers: int) -> None:
    graph = graphs()["one-node"]
    lives = _lifetimes(sequential(graph, NanoBatch(4, 0)), graph, num_layers)
    written_last = max(lives.values(), key=lambda lifetime: lifetime.lives[-1].first or 0)
    assert written_last.copy == (num_layers - 1) % 2
    (given,) = [lifetime for lifetime in lives.values() if lifetime.lives[0].first is None]
    assert given.copy == 1
