"""Checks of drawing tokens: the best, those of Gumbel-max, and those that top-k, top-p and min-p leave, by sorting."""

from collections.abc import Iterator
from typing import Any

import torch
from gpu_parts.check import Check, Prepared
from gpu_parts.check_sizes import CheckSizes
from torch import Tensor

from engine.gumbel import gumbel_noise
from engine.kernels.gpu.sampling import best_tokens, draw_tokens


def sampling_checks(sizes: CheckSizes) -> Iterator[Check]:
    """Logits in float32 and as bfloat16, which has many equal ones."""
    for num_rows in sorted({1, sizes.num_drawn}):
        for dtype in (torch.float32, torch.bfloat16):
            for kind in ("best", "drawn", "filtered"):
                yield _check(num_rows, sizes.vocabulary, dtype, kind)


def _check(num_rows: int, vocabulary: int, dtype: torch.dtype, kind: str) -> Check:
    def prepare(device: torch.device) -> Prepared:
        logits = (torch.randn(num_rows, vocabulary, device=device) * 3).to(dtype)
        seeds = torch.randint(-(2**62), 2**62, (num_rows,), device=device)
        positions = torch.randint(0, 5000, (num_rows,), device=device)
        temperatures = 0.5 + torch.rand(num_rows, dtype=torch.float64, device=device)
        temperatures[::5] = 0.0
        top_k = torch.randint(1, 60, (num_rows,), device=device)
        top_k[::3] = 0
        top_p = 0.2 + 0.8 * torch.rand(num_rows, dtype=torch.float64, device=device)
        top_p[::4] = 1.0
        min_p = 0.1 * torch.rand(num_rows, dtype=torch.float64, device=device)
        min_p[1::2] = 0.0
        output = torch.empty(num_rows, dtype=torch.int64, device=device)
        filters: dict[str, Any] = {"top_k_K": top_k, "top_p_K": top_p, "min_p_K": min_p} if kind == "filtered" else {}

        def launch() -> dict[str, Tensor]:
            if kind == "best":
                best_tokens(logits, output)
            else:
                draw_tokens(logits, seeds, positions, temperatures, output_K=output, **filters)
            return {"tokens": output}

        def expect() -> dict[str, Tensor]:
            wide = logits.float()
            if kind == "best":
                return {"tokens": _first_largest(wide)}
            safe = torch.where(temperatures > 0, temperatures, 1.0)[:, None]
            scores = wide / safe.float()
            if kind == "filtered":
                scores = scores.masked_fill(~_kept(wide, safe[:, 0], top_k, top_p, min_p), -torch.inf)
            noise = gumbel_noise(seeds, positions, torch.arange(vocabulary, device=device))
            drawn = (scores + noise).argmax(-1)
            return {"tokens": torch.where(temperatures > 0, drawn, _first_largest(wide))}

        return Prepared(launch=launch, expect=expect, buffers=(output,))

    name = str(dtype).removeprefix("torch.")
    return Check(kernel=f"sample {kind}", shape=f"{num_rows}x{vocabulary} {name}", precision="fp32", prepare=prepare)


def _first_largest(logits: Tensor) -> Tensor:
    """argmax promises nothing about which of equal ones it gives."""
    is_largest = logits == logits.amax(-1, keepdim=True)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(is_largest, ids, logits.shape[-1]).amin(-1)


def _kept(logits: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Which tokens the filters leave, [K, V]; of equal logits lower ids come first."""
    ids = logits.sort(dim=-1, descending=True, stable=True).indices
    scores = logits.gather(1, ids) / temperatures.float()[:, None]
    ranks = torch.arange(logits.shape[1], device=logits.device)
    is_kept = (ranks < top_k[:, None]) | (top_k[:, None] == 0)
    weights = (scores - scores[:, :1]).double().exp() * is_kept
    before = weights.cumsum(-1) - weights
    is_kept &= (before < top_p[:, None] * weights.sum(-1, keepdim=True)) | (top_p[:, None] == 1)
    is_kept &= weights >= min_p[:, None]
    return torch.zeros_like(is_kept).scatter_(1, ids, is_kept)
