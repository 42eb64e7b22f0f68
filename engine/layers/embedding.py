"""Vocabulary-parallel embedding and language-model head.

Rank r holds rows r * R .. r * R + R - 1 with R = ceil(vocabulary / size); the last rows of the last ranks may be
padding, which no token selects and which is cut off the logits. Shapes: T, K tokens, E hidden, V vocabulary, R rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.batch_shape import BatchShape
from engine.kernels.compiled import CompiledKernel
from engine.kernels.kernel import Argument, Kernel
from engine.layers.collective import AllGather, AllReduce
from engine.layers.linear import ColumnParallelLinear
from engine.operation import Operation, Resource, Work
from engine.step_inputs import StepInputs
from engine.tensor_parallel import TensorParallel


class EmbeddingShard(Operation):
    """Looks up the tokens whose rows this rank holds; zeros for the others."""

    resource = Resource.MEMORY

    def __init__(self, vocab_size: int, hidden_size: int, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        num_rows = -(-vocab_size // tensor_parallel.size)
        self.first = tensor_parallel.rank * num_rows
        self.is_whole = tensor_parallel.size == 1
        self.weight = nn.Parameter(torch.empty(num_rows, hidden_size), requires_grad=False)

    def forward(self, step: StepInputs) -> Tensor:
        """[T] token ids -> [T, E]."""
        if self.is_whole:
            return functional.embedding(step.tokens, self.weight)
        rows_T = step.tokens - self.first
        elsewhere_T = (rows_T < 0) | (rows_T >= self.weight.shape[0])
        hidden_TE = functional.embedding(rows_T.masked_fill(elsewhere_T, 0), self.weight)
        return hidden_TE.masked_fill_(elsewhere_T[:, None], 0)

    def work(self, shape: BatchShape, element_bytes: int) -> Work:
        """One row of E a token, read and written; zeros too, so that every rank does it for all tokens."""
        return Work(replicated_bytes=2 * shape.num_tokens * self.weight.shape[1] * element_bytes)


class VocabParallelEmbedding(nn.Module):
    """Token ids to hidden states, the same on every rank."""

    def __init__(self, vocab_size: int, hidden_size: int, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        self.shard = EmbeddingShard(vocab_size, hidden_size, tensor_parallel)
        self.all_reduce = AllReduce(tensor_parallel, hidden_size)

    def forward(self, step: StepInputs) -> Tensor:
        """[T] token ids -> [T, E]."""
        hidden_TE: Tensor = self.all_reduce(self.shard(step))
        return hidden_TE


class VocabParallelHead(nn.Module):
    """Hidden states to float32 logits of the whole vocabulary, the same on every rank."""

    def __init__(self, vocab_size: int, hidden_size: int, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        num_rows = -(-vocab_size // tensor_parallel.size)
        self.shard = ColumnParallelLinear(hidden_size, num_rows * tensor_parallel.size, tensor_parallel)
        self.all_gather = AllGather(tensor_parallel, num_rows * tensor_parallel.size)
        # Finds the best token of every row of logits, where a rank has compiled it.
        self.best: CompiledKernel | None = None
        # Draws the tokens of a `SamplingPlan` that `only_draws`, where a rank has kernels for it: of logits, plan and
        # the plan's arrays.
        self.draw: Callable[..., Tensor] | None = None

    def best_kernel(self, dtype: str) -> Kernel:
        """What `best` would be compiled from."""
        return Kernel.of("best_token_ids", (Argument(dtype, ("T", self.vocab_size)),))

    def forward(self, hidden_KE: Tensor) -> Tensor:
        """[K, E] -> [K, V]."""
        return self.join(self.shard(hidden_KE)).float()

    def join(self, shard_KR: Tensor) -> Tensor:
        """Logits of this rank's rows [K, R] -> [K, V], in the model's dtype."""
        logits_KV: Tensor = self.all_gather(shard_KR)
        return logits_KV if logits_KV.shape[1] == self.vocab_size else logits_KV[:, : self.vocab_size]
