"""The operations of a model, computed by `engine.kernels.gpu`: for each kind a function of an operation and its inputs.

They equal the operations' own `forward`; `output`, where given, takes the result. None of them waits for the device,
and what they launch depends on shapes and bounds that the host knows, so all can be captured. Imported where Triton is.
`num_sms` are the execution units of the device.
"""

from functools import partial

import torch
from torch import Tensor

from engine.kernels.gpu.activation import silu_mul
from engine.kernels.gpu.decode_attention import decode_attention
from engine.kernels.gpu.decode_config import decode_config
from engine.kernels.gpu.decode_plan import DecodeScratch
from engine.kernels.gpu.embedding import embedding
from engine.kernels.gpu.mixture_of_experts import mixture_of_experts
from engine.kernels.gpu.norm import add_rms_norm, rms_norm
from engine.kernels.gpu.planned_draw import draw_planned
from engine.kernels.gpu.prefill_attention import prefill_attention
from engine.kernels.gpu.rotary import rotate_and_write
from engine.layers.activation import SiluAndMul
from engine.layers.attention import DecodeAttention, PrefillAttention, RotaryAndKVWrite
from engine.layers.embedding import EmbeddingShard
from engine.layers.mixture_of_experts import GroupedExperts
from engine.layers.norm import RMSNorm
from engine.models.decoder import Decoder
from engine.pipeline.capture import refuse_in_capture
from engine.step_inputs import StepInputs

# Programs of decode attention on a unit: one's products hide behind the other's loads.
_DECODE_CTAS = 2


def compute_with_kernels(model: Decoder, num_sms: int) -> None:
    """Have the kernels compute every operation of the model that they can, and draw its tokens."""
    for module in model.modules():
        match module:
            case RMSNorm():
                module.computed_by(partial(_norm, module))
                module.of_sum = partial(_norm_of_sum, module)
            case SiluAndMul():
                module.computed_by(_gate)
            case EmbeddingShard():
                module.computed_by(partial(_embed, module))
            case RotaryAndKVWrite():
                module.computed_by(partial(_rotate, module))
            case DecodeAttention():
                module.computed_by(partial(_decode, module, num_sms))
            case PrefillAttention():
                module.computed_by(partial(_prefill, module))
            case GroupedExperts() if module.gate_up_proj_scale is None:  # the kernels take no scales
                module.computed_by(partial(_experts, module, num_sms))
    model.lm_head.draw = draw_planned


def _norm(norm: RMSNorm, hidden_TE: Tensor, *, output: Tensor | None = None) -> Tensor:
    return rms_norm(hidden_TE, norm.weight, norm.epsilon, output)


def _norm_of_sum(norm: RMSNorm, hidden_TE: Tensor, residual_TE: Tensor) -> tuple[Tensor, Tensor]:
    sum_TE = torch.empty_like(residual_TE)
    return add_rms_norm(hidden_TE, residual_TE, norm.weight, norm.epsilon, new_residual_TE=sum_TE)


def _gate(gate_up_TF: Tensor, *, output: Tensor | None = None) -> Tensor:
    return silu_mul(gate_up_TF, output)


def _embed(shard: EmbeddingShard, step: StepInputs, *, output: Tensor | None = None) -> Tensor:
    return embedding(step.tokens, shard.weight, shard.first, output)


def _rotate(rotary: RotaryAndKVWrite, qkv_TF: Tensor, step: StepInputs, *, output: Tensor | None = None) -> Tensor:
    q_norm, k_norm = rotary.q_norm, rotary.k_norm
    return rotate_and_write(
        qkv_TF,
        step.positions,
        step.slots,
        *step.kv_cache.layer(rotary.layer),
        rotary.rotary.table_Md,
        num_heads=rotary.num_heads,
        q_weight=None if q_norm is None else q_norm.weight,
        k_weight=None if k_norm is None else k_norm.weight,
        epsilon=0.0 if q_norm is None else q_norm.epsilon,
        query_THd=output,
    )


def _decode(
    attention: DecodeAttention, num_sms: int, query_THd: Tensor, step: StepInputs, *, output: Tensor | None = None
) -> Tensor:
    """In a padded step all that attention writes to, of which the lanes are written."""
    query_DHd = query_THd[: step.num_decodes]
    if output is None:
        output = query_DHd.new_empty(query_DHd.shape).flatten(1) if step.attention is None else step.attention
    num_rows = len(query_DHd)
    if num_rows == 0:
        return output
    keys, values = step.kv_cache.layer(attention.layer)
    num_kv_heads, block_size, head_dim = keys.shape[1:]
    group_size, num_ctas = query_DHd.shape[1] // num_kv_heads, _DECODE_CTAS * num_sms
    config = decode_config(
        head_dim=head_dim,
        group_size=group_size,
        cache_bytes=keys.element_size(),
        query_bytes=query_DHd.element_size(),
        num_ctas=num_ctas,
        num_sms=num_sms,
    )
    scratch = step.decode_plans.get(attention.window)
    is_planned = scratch is not None
    if scratch is None:
        scratch = step.decode_plans[attention.window] = DecodeScratch.allocate(
            max_rows=num_rows,
            max_blocks=step.decode_block_tables.shape[1],
            block_size=block_size,
            group_size=group_size,
            head_dim=head_dim,
            max_ctas=num_ctas,
            tile=config.tile,
            device=query_DHd.device,
        )
    decode_attention(
        query_DHd,
        keys,
        values,
        step.decode_block_tables,
        step.decode_lengths,
        scale=attention.scale,
        num_ctas=num_ctas,
        num_sms=num_sms,
        scratch=scratch,
        window=attention.window,
        output=output[:num_rows].view(query_DHd.shape),
        is_planned=is_planned,
        config=config,
    )
    return output


def _prefill(
    attention: PrefillAttention, query_THd: Tensor, step: StepInputs, *, output: Tensor | None = None
) -> Tensor:
    """In a padded step all that attention writes to, of which everything behind the decodes is written."""
    query_QHd = query_THd if step.attention is not None else query_THd[step.num_decodes :]
    if output is None:
        output = query_QHd.new_empty(query_QHd.shape).flatten(1) if step.attention is None else step.attention
    if len(query_QHd) == 0:
        return output
    starts_P1, lengths_P = _chunks(step)
    prefill_attention(
        query_QHd,
        *step.kv_cache.layer(attention.layer),
        step.prefill_block_tables,
        starts_P1,
        lengths_P,
        scale=attention.scale,
        window=attention.window,
        output=output.view(query_QHd.shape),
    )
    return output


def _chunks(step: StepInputs) -> tuple[Tensor, Tensor]:
    """Starts and context lengths on the device; of a step that has none there, made from the host's, at a wait."""
    if step.prefill_starts is not None and step.prefill_lengths is not None:
        return step.prefill_starts, step.prefill_lengths
    refuse_in_capture("a copy of the chunks' starts and lengths from the host")
    sizes, device = torch.tensor((0, *step.prefill_chunk_sizes)), step.tokens.device
    return sizes.cumsum(0).to(device), torch.tensor(step.prefill_context_lengths, device=device)


def _experts(
    experts: GroupedExperts,
    num_sms: int,
    hidden_TE: Tensor,
    router_logits_TX: Tensor,
    *,
    output: Tensor | None = None,
) -> Tensor:
    return mixture_of_experts(
        hidden_TE,
        router_logits_TX,
        experts.gate_up_proj,
        experts.down_proj,
        experts.num_experts_per_token,
        normalise=experts.normalise,
        round_scores=experts.round_scores,
        num_sms=num_sms,
        num_tokens=experts.num_tokens,
        output=output,
    )
