"""The small layers: normalisation, the gate, vocabulary shards, biases under tensor parallelism, joining tokens."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from engine.layers.activation import SiluAndMul
from engine.layers.attention import JoinTokens
from engine.layers.embedding import EmbeddingShard
from engine.layers.linear import ColumnParallelLinear, RowParallelLinear
from engine.layers.norm import RMSNorm
from engine.tensor_parallel import TensorParallel


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    norm = RMSNorm(48, epsilon=1e-5).to(dtype)
    norm.weight.copy_(torch.randn(48))
    hidden = (100 * torch.randn(7, 48)).to(dtype)
    expected = functional.rms_norm(hidden.double(), (48,), norm.weight.double(), 1e-5)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert norm(hidden).dtype is dtype
    assert torch.allclose(norm(hidden).double(), expected, rtol=tolerance, atol=tolerance)


def test_rms_norm_does_not_overflow_in_half_precision() -> None:
    norm = RMSNorm(16, epsilon=1e-5).to(torch.float16)
    norm.weight.fill_(1)
    assert torch.equal(norm(torch.full((1, 16), 60_000.0, dtype=torch.float16)), torch.ones(1, 16, dtype=torch.float16))


def test_silu_and_mul_gates_the_second_half_with_the_first() -> None:
    gate, up = torch.randn(3, 5), torch.randn(3, 5)
    assert torch.allclose(SiluAndMul(5)(torch.cat((gate, up), dim=-1)), gate * gate.sigmoid() * up)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_vocabulary_shards_add_up_to_the_table(size: int) -> None:
    table, tokens = torch.randn(10, 6), torch.randint(0, 10, (40,))
    step: Any = SimpleNamespace(tokens=tokens)
    total = torch.zeros(40, 6)
    num_rows = -(-10 // size)
    for rank in range(size):
        shard = EmbeddingShard(10, 6, TensorParallel(rank, size))
        shard.weight.fill_(torch.nan)  # padding must never show
        rows = table[rank * num_rows : (rank + 1) * num_rows]
        shard.weight[: len(rows)] = rows
        total += shard(step)
    assert torch.equal(total, table[tokens])


def test_column_then_row_parallel_linears_add_up_with_the_bias_once() -> None:
    first, second, bias = torch.randn(8, 6), torch.randn(5, 8), torch.randn(5)
    hidden = torch.randn(3, 6)
    total = torch.zeros(3, 5)
    for rank in range(2):
        tensor_parallel, rows = TensorParallel(rank, 2), slice(4 * rank, 4 * rank + 4)
        column = ColumnParallelLinear(6, 8, tensor_parallel)
        column.weight.copy_(first[rows])
        row = RowParallelLinear(8, 5, tensor_parallel, bias=True)
        row.weight.copy_(second[:, rows])
        if row.bias is not None:
            row.bias.copy_(bias)
        total += row(column(hidden))
    assert torch.allclose(total, hidden @ first.T @ second.T + bias, atol=1e-5)


def test_join_tokens_puts_decodes_first_and_copies_only_when_it_must() -> None:
    join, some, none = JoinTokens(4), torch.randn(3, 4), torch.empty(0, 4)
    assert join(some, none) is some
    assert join(none, some) is some
    assert torch.equal(join(some[:1], some[1:]), some)
