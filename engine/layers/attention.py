"""The operations of paged self-attention on one rank.

Decode and prefill attention are separate operations because they strain different resources: a decode reads its
whole context for one token, a prefill chunk computes many tokens per element read. Decode tokens come first.

Shapes: T tokens = D decodes + Q prefill tokens; H query heads and K key/value heads of this rank, d elements of a
head; F = (H + 2 K) d fused columns.
"""

import torch
from torch import Tensor

from engine.batch_shape import BatchShape
from engine.kernels import reference
from engine.kernels.compiled import CompiledKernel
from engine.kernels.fused import rotate
from engine.kernels.kernel import Argument, Kernel
from engine.kernels.prefill import PrefillPlan, prefill_attention
from engine.layers.norm import RMSNorm
from engine.layers.rotary import RotaryTable
from engine.model_config import ModelConfig
from engine.operation import CacheUse, Operation, Resource, TokenKind, Work
from engine.step_inputs import StepInputs
from engine.tensor_parallel import TensorParallel


class RotaryAndKVWrite(Operation):
    """Normalises (where the model does) and rotates queries and keys; stores keys and values; returns the queries."""

    resource = Resource.MEMORY
    cache = CacheUse.WRITE
    # Of the keys and values that are planned to be cached; None: as the activations.
    cached_element_bytes: int | None = None

    def __init__(self, config: ModelConfig, layer: int, tensor_parallel: TensorParallel, rotary: RotaryTable) -> None:
        super().__init__()
        self.layer = layer
        self.rotary = rotary
        self.num_heads = config.num_heads // tensor_parallel.size
        self.num_kv_heads = config.kv_heads_per_rank(tensor_parallel.size)
        self.head_dim = config.head_dim
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, qkv_TF: Tensor, step: StepInputs) -> Tensor:
        """[T, F] -> rotated queries [T, H, d]."""
        if self.compiled is not None:
            return self.compiled(qkv_TF, *self.step_tensors(step), *self.weights())[0]
        heads_TNd = qkv_TF.view(qkv_TF.shape[0], -1, self.head_dim)
        query_THd, key_value_TKd = heads_TNd.tensor_split((self.num_heads,), dim=1)
        key_TKd, value_TKd = key_value_TKd.chunk(2, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            query_THd, key_TKd = self.q_norm(query_THd), self.k_norm(key_TKd)
        cos_T1h, sin_T1h = self.rotary.at(step.positions)
        key_TKd = rotate(key_TKd, cos_T1h, sin_T1h)
        cache = step.kv_cache
        reference.write_kv(key_TKd, value_TKd, step.slots, *cache.layer(self.layer), *cache.scales(self.layer))
        return rotate(query_THd, cos_T1h, sin_T1h)

    def kernel(self, dtype: str, block_size: int) -> Kernel | None:
        """See `Operation`."""
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        angles = Argument(str(self.rotary.table_Md.dtype).removeprefix("torch."), ("M", self.head_dim))
        cache = Argument(dtype, ("N", self.num_kv_heads, block_size, self.head_dim))
        numbers = Argument("int64", ("T",))
        arguments = (Argument(dtype, ("T", width)), numbers, numbers, cache, cache, angles)
        if self.q_norm is None:
            return Kernel.of("rotate_and_write", arguments)
        weight = Argument(dtype, (self.head_dim,))
        constants = (("epsilon", self.q_norm.epsilon),)
        return Kernel.of("normalise_rotate_and_write", (*arguments, weight, weight), constants)

    def step_tensors(self, step: StepInputs) -> tuple[Tensor, ...]:
        """See `Operation`."""
        return step.positions, step.slots, *step.kv_cache.layer(self.layer)

    def weights(self) -> tuple[Tensor, ...]:
        """See `Operation`; the angles count as weights."""
        norms = [norm.weight for norm in (self.q_norm, self.k_norm) if norm is not None]
        return self.rotary.table_Md, *norms

    def work(self, shape: BatchShape, element_bytes: int) -> Work:
        """Every fused column is read and written once, a token's angles are read once."""
        num_columns = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        num_cached = 2 * self.num_kv_heads * self.head_dim
        cached_bytes = num_cached * (self.cached_element_bytes or element_bytes)
        num_rotated = (self.num_heads + self.num_kv_heads) * self.head_dim
        flops_per_element = 3 if self.q_norm is None else 7
        angle_bytes = self.head_dim * self.rotary.table_Md.element_size()
        return Work(
            flops=flops_per_element * shape.num_tokens * num_rotated,
            weight_bytes=sum(parameter.numel() for parameter in self.parameters()) * element_bytes,
            sharded_bytes=shape.num_tokens * (num_columns * element_bytes + cached_bytes),
            replicated_bytes=shape.num_tokens * angle_bytes,
        )


class PagedAttention(Operation):
    """Attention of one kind of tokens over what a layer has cached; widths are columns of this rank."""

    cache = CacheUse.READ
    # As above.
    cached_element_bytes: int | None = None

    def __init__(self, config: ModelConfig, layer: int, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.window = config.sliding_window(layer)
        self.query_width = config.num_heads // tensor_parallel.size * config.head_dim
        self.cached_width = 2 * config.kv_heads_per_rank(tensor_parallel.size) * config.head_dim


class DecodeAttention(PagedAttention):
    """Attention of the decode tokens, one per sequence."""

    resource = Resource.MEMORY
    tokens = TokenKind.DECODE

    def forward(self, query_THd: Tensor, step: StepInputs) -> Tensor:
        """Queries of the step [T, H, d] -> [D, H d]."""
        query_DHd = query_THd[: step.num_decodes]
        if step.num_decodes == 0:
            return query_DHd.flatten(1)
        keys, values = step.kv_cache.layer(self.layer)
        if self.compiled is not None:
            return self._compute_compiled(self.compiled, query_DHd, step).flatten(1)
        key_scale, value_scale = step.kv_cache.scales(self.layer)
        output_DHd = reference.decode_attention(
            query_DHd,
            keys,
            values,
            step.decode_block_tables,
            step.decode_lengths,
            step.max_decode_length,
            self.scale * key_scale,
            self.window,
        )
        return _scaled(output_DHd, value_scale).flatten(1)

    def _compute_compiled(self, compiled: CompiledKernel, query_DHd: Tensor, step: StepInputs) -> Tensor:
        if not step.decode_parts:
            return compiled(query_DHd, *self.step_tensors(step))[0]
        cache = step.kv_cache.layer(self.layer)
        return torch.cat(
            [
                compiled(query_DHd[part.start : part.stop], *cache, part.block_tables, part.lengths)[0]
                for part in step.decode_parts
            ]
        )

    def kernel(self, dtype: str, block_size: int) -> Kernel | None:
        """See `Operation`. A window would be read to its full context."""
        if self.window is not None:
            return None
        num_heads, num_kv_heads = self.query_width // self.head_dim, self.cached_width // (2 * self.head_dim)
        cache = Argument(dtype, ("N", num_kv_heads, block_size, self.head_dim))
        query = Argument(dtype, ("D", num_heads, self.head_dim))
        arguments = (query, cache, cache, Argument("int64", ("D", "B")), Argument("int64", ("D",)))
        return Kernel.of("decode_attention", arguments, (("scale", self.scale),))

    def step_tensors(self, step: StepInputs) -> tuple[Tensor, ...]:
        """See `Operation`."""
        return *step.kv_cache.layer(self.layer), step.decode_block_tables, step.decode_lengths

    def work(self, shape: BatchShape, element_bytes: int) -> Work:
        """A decode meets every key and value of its context, which nobody else reads: memory is what it costs."""
        context = _visible(shape.decode_context, self.window)
        cached_bytes = context * self.cached_width * (self.cached_element_bytes or element_bytes)
        return Work(
            flops=4 * shape.num_decodes * context * self.query_width,
            sharded_bytes=shape.num_decodes * (2 * self.query_width * element_bytes + cached_bytes),
        )


class PrefillAttention(PagedAttention):
    """Attention of the prefill chunks: causal inside a chunk, over everything cached before it."""

    resource = Resource.COMPUTE
    tokens = TokenKind.PREFILL

    def forward(self, query_THd: Tensor, step: StepInputs) -> Tensor:
        """Queries of the step [T, H, d] -> [Q, H d]."""
        query_QHd = query_THd[step.num_decodes :]
        if query_QHd.shape[0] == 0:
            return query_QHd.flatten(1)
        keys, values = step.kv_cache.layer(self.layer)
        key_scale, value_scale = step.kv_cache.scales(self.layer)
        scale = self.scale * key_scale
        if not keys.is_cuda:
            plan = self._plan(query_QHd, keys, step)
            attended_QHd = prefill_attention(
                query_QHd, keys, values, plan, scale=scale, window=self.window, compiled=self.compiled
            )
            return _scaled(attended_QHd, value_scale).flatten(1)
        output_QHd = reference.prefill_attention(
            query_QHd,
            keys,
            values,
            step.prefill_block_tables,
            step.prefill_chunk_sizes,
            step.prefill_context_lengths,
            scale,
            self.window,
        )
        return _scaled(output_QHd, value_scale).flatten(1)

    def _plan(self, query_QHd: Tensor, keys: Tensor, step: StepInputs) -> PrefillPlan:
        """The one of all layers with this window."""
        plan = step.prefill_plans.get(self.window)
        if plan is None:
            plan = step.prefill_plans[self.window] = PrefillPlan.of(
                step.prefill_block_tables,
                step.prefill_chunk_sizes,
                step.prefill_context_lengths,
                num_kv_heads=keys.shape[1],
                num_heads=query_QHd.shape[1],
                block_size=keys.shape[2],
                window=self.window,
            )
        return plan

    def kernel(self, dtype: str, block_size: int) -> Kernel | None:
        """See `Operation`: a group of a `PrefillPlan`."""
        num_heads, num_kv_heads = self.query_width // self.head_dim, self.cached_width // (2 * self.head_dim)
        cache = Argument(dtype, ("N", num_kv_heads, block_size, self.head_dim))
        query = Argument(dtype, ("T", num_heads, self.head_dim))
        indices = (Argument("int64", ("U", size)) for size in ("Q", "B", "Q"))
        constants = (("scale", self.scale), ("window", self.window))
        return Kernel.of("attend_tiles", (query, cache, cache, *indices, query), constants)

    def work(self, shape: BatchShape, element_bytes: int) -> Work:
        """Every token meets its context; what is cached is read once a chunk.

        How many chunks there are a `BatchShape` does not say: prompts that start here have as many keys as tokens, one
        that continues has its context, so the larger of the two is taken.
        """
        if shape.num_prefills == 0:
            return Work()
        context = _visible(shape.prefill_context, self.window)
        num_keys = max(shape.num_prefills, context)
        cached_bytes = num_keys * self.cached_width * (self.cached_element_bytes or element_bytes)
        return Work(
            flops=4 * shape.num_prefills * context * self.query_width,
            sharded_bytes=2 * shape.num_prefills * self.query_width * element_bytes + cached_bytes,
        )


class JoinTokens(Operation):
    """Puts the decode tokens before the prefill tokens again; copies nothing when a step has only one kind."""

    resource = Resource.MEMORY
    is_join = True

    def __init__(self, width: int) -> None:
        """`width` is A, the columns of this rank."""
        super().__init__()
        self.width = width

    def forward(self, decode_DA: Tensor, prefill_QA: Tensor) -> Tensor:
        """[D, A], [Q, A] -> [T, A]; twice the same tensor is what both kinds were written to."""
        if decode_DA is prefill_QA:
            return decode_DA
        if prefill_QA.shape[0] == 0:
            return decode_DA
        if decode_DA.shape[0] == 0:
            return prefill_QA
        return torch.cat((decode_DA, prefill_QA))

    def work(self, shape: BatchShape, element_bytes: int) -> Work:
        """All tokens are read and written, unless they are of one kind."""
        if shape.num_decodes == 0 or shape.num_prefills == 0:
            return Work()
        return Work(sharded_bytes=2 * shape.num_tokens * self.width * element_bytes)


def _scaled(attended: Tensor, scale: float) -> Tensor:
    """What was attended of values that are stored over their scale."""
    return attended if scale == 1.0 else (attended.float() * scale).to(attended.dtype)


def _visible(context: float, window: int | None) -> float:
    """The tokens that a token attends to, of those before it and itself."""
    return context if window is None else min(context, window)
