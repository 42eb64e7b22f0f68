"""The graphs that are read off the models, what is refused, and that nodes compute what the layer does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.layers.collective import AllReduce
from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm
from engine.model_config import Architecture
from engine.operation import CacheUse, Operation, Resource, TokenKind
from engine.pipeline.graph import LAYER_INPUT
from engine.pipeline.planned_model import trace_planned_layer
from engine.pipeline.tracer import STEP_INPUTS, TracedLayer, trace_layer
from engine.random_checkpoint import sized_config, write_random_checkpoint
from engine.tensor_parallel import TensorParallel
from tests.engine.models.paged_run import Case, load, steps_of

ATTENTION = ("qkv_proj", "decode_attention", "prefill_attention", "o_proj")
DENSE = ("gate_up_proj", "down_proj")
SPARSE = ("router", "experts")


def _is_sparse(architecture: Architecture) -> bool:
    return architecture in (Architecture.MIXTRAL, Architecture.QWEN3_MOE)


def _names(traced: TracedLayer) -> tuple[str, ...]:
    return tuple(node.name for node in traced.graph.nodes)


@pytest.mark.parametrize("architecture", Architecture)
def test_a_layer_on_one_device_has_no_network(architecture: Architecture) -> None:
    traced = trace_planned_layer(sized_config(architecture), 1)
    feed_forward = SPARSE if _is_sparse(architecture) else DENSE
    assert _names(traced) == (*ATTENTION, *feed_forward)
    assert {node.resource for node in traced.graph.nodes} == {Resource.COMPUTE, Resource.MEMORY}
    closing = traced.graph.nodes[-1]
    assert closing.outputs == (traced.graph.output,) == ("add_1",)
    assert not any(isinstance(operation, AllReduce) for operation in traced.operations.values())


@pytest.mark.parametrize("architecture", Architecture)
def test_a_layer_on_two_devices_has_two_all_reduces(architecture: Architecture) -> None:
    traced = trace_planned_layer(sized_config(architecture), 2)
    first, second = SPARSE if _is_sparse(architecture) else DENSE
    network = ("attention_all_reduce", "feed_forward_all_reduce")
    assert _names(traced) == (*ATTENTION, network[0], first, second, network[1], "add_1")
    by_name = traced.graph.by_name
    assert all(by_name[name].resource is Resource.NETWORK for name in network)
    assert all(len(by_name[name].calls) == 1 for name in network)
    assert by_name["add_1"].inputs == ("add", "feed_forward_all_reduce")


def test_a_dense_layer_of_a_sparse_model_is_traced_as_one() -> None:
    config = sized_config(Architecture.QWEN3_MOE, num_dense_layers=1)
    assert _names(trace_planned_layer(config, 1, layer=0)) == (*ATTENTION, *DENSE)
    assert _names(trace_planned_layer(config, 1, layer=1)) == (*ATTENTION, *SPARSE)


def test_nodes_know_their_tokens_and_their_use_of_the_cache() -> None:
    by_name = trace_planned_layer(sized_config(Architecture.LLAMA), 2).graph.by_name
    assert [by_name[name].tokens for name in ATTENTION] == [
        TokenKind.ALL,
        TokenKind.DECODE,
        TokenKind.PREFILL,
        TokenKind.ALL,
    ]
    assert [by_name[name].resource for name in ATTENTION] == [
        Resource.COMPUTE,
        Resource.MEMORY,
        Resource.COMPUTE,
        Resource.COMPUTE,
    ]
    assert [name for name, node in by_name.items() if node.cache_writes] == ["qkv_proj"]
    assert [name for name, node in by_name.items() if node.cache_reads] == ["decode_attention", "prefill_attention"]
    calls = {name: [call.name for call in node.calls] for name, node in by_name.items()}
    assert calls["qkv_proj"] == ["input_norm", "qkv_proj", "rotary_and_kv_write"]
    assert calls["o_proj"] == ["join_tokens", "o_proj"]
    assert calls["gate_up_proj"] == ["add", "feed_forward_norm", "gate_up_proj"]
    assert calls["down_proj"] == ["silu_and_mul", "down_proj"]


def test_nothing_is_allocated_for_a_planned_layer() -> None:
    traced = trace_planned_layer(sized_config(Architecture.LLAMA, max_position_embeddings=2**40), 1)
    modules = [operation for operation in traced.operations.values() if operation is not None]
    assert all(parameter.is_meta for module in modules for parameter in module.parameters())


def test_devices_that_cannot_share_the_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 does not divide the model's 4 attention heads"):
        trace_planned_layer(sized_config(Architecture.LLAMA), 3)


def _run(traced: TracedLayer, hidden: Tensor, step: Any) -> Tensor:
    """Node by node in the order of the graph, each with no other values than it says it reads."""
    values = {LAYER_INPUT: hidden}
    for node in traced.graph.nodes:
        known = {name: values[name] for name in node.inputs} | {STEP_INPUTS: step}
        for call in node.calls:
            operation = traced.operations[call.name]
            inputs = [known[name] for name in call.inputs]
            known[call.name] = inputs[0] + inputs[1] if operation is None else operation(*inputs)
        values |= {name: known[name] for name in node.outputs}
    return values[traced.graph.output]


@pytest.mark.parametrize("architecture", Architecture)
def test_nodes_one_after_the_other_are_the_layer(architecture: Architecture, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, sized_config(architecture))
    model, config = load(tmp_path, TensorParallel())
    layers: list[nn.Module] = list(model.layers)
    traced = [trace_layer(layer, config.model.hidden_size) for layer in layers]
    with torch.inference_mode():
        for step, _ in steps_of(Case(name="", path=tmp_path).tokens, config):
            plain = hidden = model.embed_tokens(step)
            for layer in layers:
                plain = layer(plain, step)
            for each in traced:
                hidden = _run(each, hidden, step)
            assert torch.equal(plain, hidden)


class _ParallelBlock(nn.Module):
    """Two branches on one norm, the later of which the closing sum reads first (as in GPT-J or Falcon)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RMSNorm(8, 1e-6)
        self.left = Linear(8, 8)
        self.right = Linear(8, 8)
        self.out_norm = RMSNorm(8, 1e-6)

    def forward(self, hidden: Tensor, step: Any) -> Tensor:
        normed = self.norm(hidden)
        right = self.right(normed)
        left = self.left(normed + right)
        output: Tensor = hidden + (self.out_norm(right) + left)
        return output


def test_small_operations_never_make_nodes_wait_for_each_other() -> None:
    block = _ParallelBlock()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    traced = trace_layer(block, 8)
    assert _names(traced) == ("right", "left")
    hidden = torch.randn(5, 8)
    assert torch.equal(_run(traced, hidden, None), block(hidden, None))


class _Bridge(nn.Module):
    """The closing sum reads a value of the first node and one of the last: it must go to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RMSNorm(8, 1e-6)
        self.early = Linear(8, 8)
        self.late = Linear(8, 8)

    def forward(self, hidden: Tensor, step: Any) -> Tensor:
        normed = self.norm(hidden)
        output: Tensor = normed + self.late(self.early(normed + hidden))
        return output


class _Crossed(nn.Module):
    """`shared` is first read by `last`'s norm in the order of the trace, and then by `first`, which `last` needs."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = RMSNorm(8, 1e-6)
        self.first = Linear(8, 8)
        self.last = Linear(8, 8)

    def forward(self, hidden: Tensor, step: Any) -> Tensor:
        shared = self.shared(hidden)
        later = shared + hidden
        last: Tensor = self.last(later + self.first(shared))
        return last + hidden


@pytest.mark.parametrize("kind", [_Bridge, _Crossed])
def test_a_value_read_early_and_late_stays_where_both_can_have_it(kind: type[nn.Module]) -> None:
    layer = kind()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    traced = trace_layer(layer, 8)
    hidden = torch.randn(5, 8)
    assert torch.equal(_run(traced, hidden, None), layer(hidden, None))


class _OfOneRank(Operation):
    resource = Resource.MEMORY
    cache = CacheUse.WRITE

    @property
    def is_identity(self) -> bool:
        return True

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


class _WithIdentity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = Linear(8, 8)
        self.nothing = _OfOneRank()

    def forward(self, hidden: Tensor, step: Any) -> Tensor:
        value: Tensor = self.nothing(self.linear(self.nothing(hidden)))
        return value


def test_operations_that_do_nothing_are_left_out() -> None:
    graph = trace_layer(_WithIdentity(), 8).graph
    assert [node.name for node in graph.nodes] == ["linear"]
    assert graph.nodes[0].inputs == (LAYER_INPUT,)
    assert graph.output == "linear"


class _Foreign(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(8, 8)

    def forward(self, hidden: Tensor, step: Any) -> Tensor:
        return torch.relu(self.plain(hidden))


class _Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = Linear(8, 8)

    def forward(self, hidden: Tensor, step: Any) -> Tensor:
        value: Tensor = self.linear(input_TI=hidden)
        return value


class _Constant(nn.Module):
    def forward(self, hidden: Tensor, step: Any) -> Tensor:
        return hidden + 1


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (_Foreign, "_Foreign: call_module plain is neither an Operation nor an addition: make it an Operation"),
        (_Keyword, "_Keyword: call_module linear: pass operations their values by position and nothing else"),
        (_Constant, "_Constant: call_function .*add.*: pass operations their values by position"),
    ],
)
def test_what_cannot_be_scheduled_is_refused_by_name(kind: type[nn.Module], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trace_layer(kind(), 8)
