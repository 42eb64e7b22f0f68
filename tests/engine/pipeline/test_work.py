"""What operations say of their own work, against other ways to count: torch's counter, a ring played out, chance."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from engine.batch_shape import BatchShape
from engine.layers.activation import SiluAndMul
from engine.layers.attention import DecodeAttention, JoinTokens, PrefillAttention, RotaryAndKVWrite
from engine.layers.collective import AllGather, AllReduce
from engine.layers.embedding import EmbeddingShard, VocabParallelHead
from engine.layers.linear import ColumnParallelLinear, Linear, QKVLinear, RowParallelLinear
from engine.layers.mixture_of_experts import GroupedExperts
from engine.layers.norm import RMSNorm
from engine.layers.rotary import RotaryTable
from engine.model_config import Architecture
from engine.models import LAYERS
from engine.operation import Operation, Resource, Work
from engine.pipeline.planned_model import trace_planned_layer
from engine.pipeline.tracer import TracedLayer
from engine.random_checkpoint import sized_config
from engine.tensor_parallel import TensorParallel

CONFIG = sized_config(Architecture.QWEN3, hidden_size=64, num_heads=8, num_kv_heads=2, head_dim=16)
PAIR = TensorParallel(0, 2)
SHAPE = BatchShape(num_decodes=6, num_prefills=10, decode_context=40, prefill_context=9)
LINEARS: dict[str, Callable[[], Linear]] = {
    "plain": lambda: Linear(64, 12, bias=True),
    "column": lambda: ColumnParallelLinear(64, 24, PAIR),
    "qkv": lambda: QKVLinear(CONFIG, PAIR),
    "row": lambda: RowParallelLinear(64, 24, PAIR),
}


def _prefills(num_tokens: float) -> BatchShape:
    return BatchShape(num_decodes=0, num_prefills=num_tokens, prefill_context=num_tokens)


@pytest.mark.parametrize("kind", LINEARS)
def test_a_linear_counts_the_products_that_torch_counts(kind: str) -> None:
    linear = LINEARS[kind]()
    outputs, inputs = linear.weight.shape
    counter = FlopCounterMode(display=False)
    with counter:
        linear(torch.randn(16, inputs))
    work = linear.work(SHAPE, 2)
    bias = 0 if linear.bias is None else outputs
    assert work.flops - 16 * bias == counter.get_total_flops()
    assert work.weight_bytes == sum(parameter.numel() for parameter in linear.parameters()) * 2
    assert work.memory_bytes - work.weight_bytes == 16 * (inputs + outputs) * 2
    assert work.network_bytes == 0


@pytest.mark.parametrize(("kind", "replicated"), [("plain", 64 + 12), ("column", 64), ("qkv", 64), ("row", 24)])
def test_a_linear_knows_which_of_its_sides_every_rank_holds_alike(kind: str, replicated: int) -> None:
    assert LINEARS[kind]().work(SHAPE, 2).replicated_bytes == 16 * replicated * 2


def test_small_operations_read_and_write_what_they_show() -> None:
    assert RMSNorm(64, 1e-6).work(SHAPE, 2) == Work(
        flops=4 * 16 * 64, weight_bytes=64 * 2, replicated_bytes=2 * 16 * 64 * 2
    )
    assert SiluAndMul(32).work(SHAPE, 4) == Work(flops=5 * 16 * 32, sharded_bytes=3 * 16 * 32 * 4)
    assert JoinTokens(32).work(SHAPE, 2) == Work(sharded_bytes=2 * 16 * 32 * 2)
    assert JoinTokens(32).work(_prefills(16), 2) == JoinTokens(32).work(SHAPE.part(6, 0), 2) == Work()
    assert EmbeddingShard(100, 64, PAIR).work(SHAPE, 2) == Work(replicated_bytes=2 * 16 * 64 * 2)


def test_the_head_counts_the_padded_rows_that_it_computes() -> None:
    head = VocabParallelHead(101, 64, PAIR)
    assert head.shard.work(SHAPE, 2).flops == 2 * 16 * 64 * 51
    assert head.all_gather.work(SHAPE, 2).network_bytes == 16 * 51 * 2


@pytest.mark.parametrize("has_norm", [True, False])
def test_rotation_writes_the_queries_and_the_cache(has_norm: bool) -> None:
    config = replace(CONFIG, qk_norm=has_norm)
    rotation = RotaryAndKVWrite(config, 0, PAIR, RotaryTable(config, torch.float32, torch.device("cpu")))
    columns = QKVLinear(config, PAIR).weight.shape[0]
    work = rotation.work(SHAPE, 2)
    assert work.sharded_bytes == 2 * 16 * columns * 2
    assert work.replicated_bytes == 16 * 16 * 4  # angles are float32
    assert work.weight_bytes == (2 * 16 * 2 if has_norm else 0)
    assert work.flops == (7 if has_norm else 3) * 16 * (4 + 1) * 16


@pytest.mark.parametrize(("size", "heads", "kv_heads"), [(1, 8, 2), (2, 4, 1), (4, 2, 1)])
def test_attention_reads_the_cache_of_its_own_heads(size: int, heads: int, kv_heads: int) -> None:
    decode = DecodeAttention(CONFIG, 0, TensorParallel(0, size)).work(SHAPE, 2)
    assert decode.flops == 4 * 6 * 40 * heads * 16  # query x key and weight x value, two operations each
    assert decode.sharded_bytes == 6 * (2 * heads * 16 + 40 * 2 * kv_heads * 16) * 2
    prefill = PrefillAttention(CONFIG, 0, TensorParallel(0, size)).work(SHAPE, 2)
    assert prefill.flops == 4 * 10 * 9 * heads * 16
    assert prefill.sharded_bytes == (10 * 2 * heads * 16 + 10 * 2 * kv_heads * 16) * 2


def test_a_part_of_a_prompt_still_reads_its_whole_context() -> None:
    attention = PrefillAttention(CONFIG, 0, TensorParallel())
    shape = BatchShape(num_decodes=0, num_prefills=4, prefill_context=100)
    assert attention.work(shape, 2).sharded_bytes == (4 * 2 * 8 * 16 + 100 * 2 * 2 * 16) * 2
    assert attention.work(shape.part(0, 0), 2) == Work()


def test_a_window_bounds_what_attention_meets() -> None:
    config = sized_config(Architecture.MISTRAL, sliding_window=8)
    wide, narrow = replace(SHAPE, decode_context=500, prefill_context=300), replace(SHAPE, decode_context=8)
    decode = DecodeAttention(config, 0, TensorParallel())
    assert decode.work(wide, 2) == decode.work(narrow, 2)
    prefill = PrefillAttention(config, 0, TensorParallel())
    assert prefill.work(wide, 2) == prefill.work(replace(SHAPE, prefill_context=8), 2)


def _ring(size: int, num_elements: int, rounds: int) -> tuple[int, int]:
    """Elements that rank 0 sends, and adds, when a ring of ranks passes parts of a vector on: reduce, then gather."""
    sent = added = 0
    for current in range(rounds):
        for _ in range(size - 1):
            sent += num_elements // size
            added += num_elements // size if rounds == 2 and current == 0 else 0
    return sent, added


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_collectives_send_what_a_ring_sends(size: int) -> None:
    group = TensorParallel(0, size)
    sent, added = _ring(size, 16 * 64, rounds=2)
    assert AllReduce(group, 64).work(SHAPE, 2) == Work(flops=added, sharded_bytes=2 * sent, network_bytes=2 * sent)
    sent, _ = _ring(size, 16 * 64, rounds=1)
    assert AllGather(group, 64).work(SHAPE, 2) == Work(sharded_bytes=2 * sent, network_bytes=2 * sent)
    assert AllReduce(group, 64).is_identity == AllGather(group, 64).is_identity == (size == 1)


def test_experts_count_the_products_that_torch_counts() -> None:
    config = sized_config(Architecture.MIXTRAL, num_experts=6, num_experts_per_token=2)
    experts = GroupedExperts(config, PAIR, False).to(torch.float64)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    counter = FlopCounterMode(display=False)
    with counter:
        experts(torch.randn(16, 64, dtype=torch.float64), torch.randn(16, 6, dtype=torch.float64))
    small = 16 * 2 * (5 * 64 + 2 * 64)  # activation, and weighing the outputs
    assert experts.work(SHAPE, 2).flops - small == counter.get_total_flops()


@pytest.mark.parametrize("num_tokens", [1, 3, 20])
def test_experts_read_as_many_weights_as_random_routing_touches(num_tokens: int) -> None:
    config = sized_config(Architecture.MIXTRAL, num_experts=8, num_experts_per_token=2)
    experts = GroupedExperts(config, TensorParallel(), False)
    draw = random.Random(0)
    touched = [len({x for _ in range(num_tokens) for x in draw.sample(range(8), 2)}) for _ in range(4000)]
    of_one_expert = sum(parameter.numel() for parameter in experts.parameters()) / 8 * 2
    expected = sum(touched) / len(touched) * of_one_expert
    assert experts.work(_prefills(num_tokens), 2).weight_bytes == pytest.approx(expected, rel=0.02)
    assert experts.work(_prefills(1e6), 2).weight_bytes == pytest.approx(8 * of_one_expert)


def _group_flops(traced: TracedLayer, size: int) -> float:
    return size * sum(
        operation.work(SHAPE, 2).flops
        for operation in traced.operations.values()
        if operation is not None and operation.resource is not Resource.NETWORK and type(operation) is not Linear
        if list(operation.parameters()) and not isinstance(operation, RMSNorm)
    )


@pytest.mark.parametrize("architecture", Architecture)
def test_ranks_divide_the_large_products_among_them(architecture: Architecture) -> None:
    config = sized_config(architecture)
    whole = _group_flops(trace_planned_layer(config, 1), 1)
    assert whole > 0
    # every rank weighs the outputs of its experts, which are as wide as the hidden states on all
    tolerance = 0.003 if config.num_experts else 0.0
    assert _group_flops(trace_planned_layer(config, 2), 2) == pytest.approx(whole, rel=tolerance)


@pytest.mark.parametrize("architecture", Architecture)
def test_halves_of_a_batch_do_the_same_work_and_read_the_weights_twice(architecture: Architecture) -> None:
    traced = trace_planned_layer(sized_config(architecture), 2)
    half = SHAPE.part(3, 5)
    for node in traced.graph.nodes:
        whole, part = traced.work(node, SHAPE, 2), traced.work(node, half, 2)
        assert whole.memory_bytes > 0
        assert 2 * part.flops == pytest.approx(whole.flops)
        assert 2 * part.replicated_bytes == pytest.approx(whole.replicated_bytes)
        assert 2 * part.network_bytes == pytest.approx(whole.network_bytes)
        assert part.weight_bytes == pytest.approx(whole.weight_bytes, rel=0.1)  # few tokens meet fewer experts
        assert traced.work(node, SHAPE.part(0, 0), 2) == Work()


@pytest.mark.parametrize("size", [1, 2])
def test_small_operations_are_as_wide_as_their_neighbours(size: int) -> None:
    config = sized_config(Architecture.LLAMA)
    layer = LAYERS[Architecture.LLAMA](
        config, 0, TensorParallel(0, size), RotaryTable(config, torch.float32, torch.device("cpu"))
    )
    attention, feed_forward = layer.get_submodule("attention"), layer.get_submodule("feed_forward")
    width = {name: attention.get_submodule(name).width for name in ("join_tokens", "all_reduce")}
    assert width == {"join_tokens": attention.get_parameter("o_proj.weight").shape[1], "all_reduce": 64}
    width = {name: feed_forward.get_submodule(name).width for name in ("silu_and_mul", "all_reduce")}
    assert width == {"silu_and_mul": feed_forward.get_parameter("down_proj.weight").shape[1], "all_reduce": 64}


def test_an_operation_without_work_says_what_to_do() -> None:
    class Silent(Operation):
        resource = Resource.MEMORY

    with pytest.raises(NotImplementedError, match=r"Silent .* give it a work\(\) method"):
        Silent().work(SHAPE, 2)
