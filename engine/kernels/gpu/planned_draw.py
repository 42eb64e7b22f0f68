"""Draws the tokens of a `SamplingPlan` with the kernels: what `engine.sampler` does between penalties and logprobs.

The plan's sections name the rows that are drawn at random; all others get their best token. Here the sections become
one parameter for every row, a few kilobytes scattered on the device, so that all rows are drawn in one launch. A step
whose graph was captured keeps those arrays itself and calls `sampling.draw_tokens`.

Legend: K drawn rows, V vocabulary.
"""

import torch
from torch import Tensor

from engine.kernels.gpu.sampling import best_tokens, draw_tokens
from engine.sampling_table import SamplingPlan

_SECTIONS = ("plain", "filtered")


def draw_planned(
    logits_KV: Tensor, plan: SamplingPlan, staged: dict[str, Tensor], output_K: Tensor | None = None
) -> Tensor:
    """One token per row of logits that were biased, banned and penalised already, [K] int64; `staged` holds
    `plan.arrays` on the device, which is not waited for.
    """
    sections = [section for section in _SECTIONS if f"{section}_index" in staged]
    if not sections:
        return best_tokens(logits_KV, output_K)

    def of_rows(parameter: str, off: float, dtype: torch.dtype) -> Tensor:
        """A parameter of every row, `off` for those in no section that has it."""
        values_K = torch.full((len(logits_KV),), off, dtype=dtype, device=logits_KV.device)
        for section in sections:
            if f"{section}_{parameter}" in staged:
                values_K.index_copy_(0, staged[f"{section}_index"], staged[f"{section}_{parameter}"].to(dtype))
        return values_K

    is_filtered = "filtered" in sections
    return draw_tokens(
        logits_KV,
        of_rows("seed", 0, torch.int64),
        of_rows("position", 0, torch.int64),
        of_rows("temperature", 0.0, torch.float64),
        top_k_K=of_rows("top_k", 0, torch.int64) if is_filtered else None,
        top_p_K=of_rows("top_p", 1.0, torch.float64) if is_filtered else None,
        min_p_K=of_rows("min_p", 0.0, torch.float64) if is_filtered or plan.uses_min_p else None,
        output_K=output_K,
    )
