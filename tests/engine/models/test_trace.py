"""Every model traces with `Operation`s as leaves, and what is traced computes the same."""

import operator
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from engine.layers.collective import AllReduce
from engine.model_config import Architecture
from engine.operation import Operation, Resource
from engine.random_checkpoint import sized_config, write_random_checkpoint
from engine.tensor_parallel import TensorParallel
from tests.engine.models.paged_run import Case, load, steps_of


class OperationTracer(fx.Tracer):
    """Looks into every module that is not an `Operation`."""

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(module, Operation)


@pytest.mark.parametrize("architecture", Architecture)
def test_a_traced_model_is_operations_and_additions(architecture: Architecture, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, sized_config(architecture))
    model, config = load(tmp_path, TensorParallel())
    graph = OperationTracer().trace(model)
    leaves = [model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"]

    assert all(isinstance(leaf, Operation) and isinstance(leaf.resource, Resource) for leaf in leaves)
    assert {leaf.resource for leaf in leaves if isinstance(leaf, Operation)} == set(Resource)
    assert sum(isinstance(leaf, AllReduce) for leaf in leaves) == 1 + 2 * config.model.num_layers
    assert {node.op for node in graph.nodes} == {"placeholder", "call_module", "call_function", "output"}
    assert {node.target for node in graph.nodes if node.op == "call_function"} == {operator.add}

    traced = fx.GraphModule(model, graph)
    with torch.inference_mode():
        tokens = Case(name="", path=tmp_path).tokens
        plain = [model(step) for step, _ in steps_of(tokens, config)]
        again = [traced(step) for step, _ in steps_of(tokens, config)]
    assert all(torch.equal(hidden, other) for hidden, other in zip(plain, again, strict=True))
