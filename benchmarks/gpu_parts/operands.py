"""Inputs of the kernels that are timed: random, as zeros are multiplied faster than data, and on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from gpu_parts.attention_checks import scratch_for
from gpu_parts.bench_device import BenchDevice
from gpu_parts.model_sizes import ModelSizes
from gpu_parts.random_cache import RandomCache
from gpu_parts.timing import Run
from torch import Tensor

from engine.kernels.gpu.decode_attention import decode_attention
from engine.kernels.gpu.decode_config import DecodeConfig, decode_config
from engine.kernels.gpu.gemm import gemm
from engine.kernels.gpu.gemm_config import GemmConfig
from engine.kernels.gpu.quantise import quantise_rows_reference
from engine.kernels.gpu.scaled_gemm import scaled_gemm


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """One matrix product: activations, a weight and where the result goes. Scales where it is FP8."""

    left: Tensor  # [T, K]
    right: Tensor  # [N, K], as a layer stores it
    output: Tensor
    scales: tuple[Tensor, Tensor] | None = None

    @classmethod
    def random(cls, num_tokens: int, shape: tuple[int, int], device: torch.device, *, is_fp8: bool) -> "Product":
        """`shape` is outputs and inner size."""
        num_outputs, num_inner = shape
        a = torch.randn(num_tokens, num_inner, device=device, dtype=torch.bfloat16)
        b = torch.randn(num_outputs, num_inner, device=device, dtype=torch.bfloat16) / num_inner**0.5
        output = torch.empty(num_tokens, num_outputs, device=device, dtype=torch.bfloat16)
        if not is_fp8:
            return cls(left=a, right=b, output=output)
        (a, a_scales), (b, b_scales) = quantise_rows_reference(a), quantise_rows_reference(b)
        return cls(left=a, right=b, output=output, scales=(a_scales, b_scales))

    @staticmethod
    def num_bytes(num_tokens: int, shape: tuple[int, int], *, is_fp8: bool) -> int:
        """Of the operands and the result."""
        num_outputs, num_inner = shape
        element = 1 if is_fp8 else 2
        return element * num_inner * (num_tokens + num_outputs) + 2 * num_tokens * num_outputs

    def by_cublaslt(self, bench: BenchDevice, num_sms: int) -> Run:
        """By cublasLt on so many multiprocessors."""

        def run() -> None:
            with bench.limited_to(num_sms):
                if self.scales is None:
                    torch.mm(self.left, self.right.T, out=self.output)
                else:
                    scaled_gemm(self.left, self.scales[0], self.right, self.scales[1], output=self.output)

        return run

    def ours(self, num_sms: int, config: GemmConfig | None = None) -> Run:
        """By the persistent kernel."""
        if self.scales is None:
            return partial(gemm, self.left, self.right, num_sms=num_sms, output=self.output, config=config)
        return partial(
            scaled_gemm, self.left, self.scales[0], self.right, self.scales[1], output=self.output, num_sms=num_sms,
            config=config,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Decodes:
    """A layer's decode attention over random contexts."""

    query: Tensor  # [D, H, d]
    cache: RandomCache
    output: Tensor
    num_sms: int

    @classmethod
    def random(
        cls, lengths: Sequence[int], sizes: ModelSizes, bench: BenchDevice, *, is_fp8: bool = False
    ) -> "Decodes":
        """One sequence for each of these lengths."""
        cache = RandomCache.of(
            lengths,
            num_kv_heads=sizes.num_kv_heads,
            block_size=sizes.block_size,
            head_dim=sizes.head_dim,
            dtype=torch.float8_e4m3fn if is_fp8 else torch.bfloat16,
            device=bench.device,
        )
        query = torch.randn(
            len(lengths), sizes.num_heads, sizes.head_dim, device=bench.device, dtype=torch.bfloat16
        )  # fmt: skip
        return cls(query=query, cache=cache, output=torch.empty_like(query), num_sms=bench.num_sms)

    @property
    def num_bytes(self) -> int:
        """What one call has to move at least."""
        keys = self.cache.keys
        num_tokens = int(self.cache.lengths.sum())
        cached = num_tokens * 2 * keys.shape[1] * keys.shape[3] * keys.element_size()
        return cached + 2 * self.query.numel() * self.query.element_size()

    def run(self, num_ctas: int, config: DecodeConfig | None = None) -> Run:
        """The plan is made beforehand, once for all layers, and so not timed."""
        num_heads, head_dim = self.query.shape[1:]
        cache = self.cache
        group_size = num_heads // cache.keys.shape[1]
        config = config or decode_config(
            head_dim=head_dim, group_size=group_size, cache_bytes=cache.keys.element_size(), query_bytes=2,
            num_ctas=num_ctas, num_sms=self.num_sms,
        )  # fmt: skip
        attend = partial(
            decode_attention, self.query, cache.keys, cache.values, cache.block_tables, cache.lengths,
            scale=head_dim**-0.5, num_ctas=num_ctas, scratch=scratch_for(cache, group_size, num_ctas, config),
            output=self.output, config=config,
        )  # fmt: skip
        attend()
        return partial(attend, is_planned=True)


def spread_lengths(num_sequences: int, length: int) -> list[int]:
    """Lengths from three quarters to five quarters of the one named, which is their mean; shuffled the same way."""
    lengths = torch.linspace(0.75 * length, 1.25 * length, num_sequences).round().int().clamp(min=1)
    order = torch.randperm(num_sequences, generator=torch.Generator().manual_seed(0))
    return [int(one) for one in lengths[order]]
