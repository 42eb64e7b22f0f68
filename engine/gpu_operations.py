"""The operations of a model, computed by `engine.kernels.gpu`: for each kind a function of an operation and its inputs.

They equal the operations' own `forward`; `output`, where given, takes the result. None of them waits for the device,
and what they launch depends on shapes, on bounds that the host knows and on the execution units at hand, so all can be
captured. Imported where Triton is.
"""

from functools import partial

import torch
from torch import Tensor

from engine.kernels.fp8_product import QuantisedRows, product_of_quantised
from engine.kernels.gpu import decode_config as decode_configs
from engine.kernels.gpu import gemm_config as gemm_configs
from engine.kernels.gpu.activation import silu_mul, silu_mul_fp8
from engine.kernels.gpu.decode_attention import decode_attention
from engine.kernels.gpu.decode_plan import DecodeScratch
from engine.kernels.gpu.embedding import embedding
from engine.kernels.gpu.gemm import gemm, is_loadable
from engine.kernels.gpu.mixture_of_experts import mixture_of_experts
from engine.kernels.gpu.norm import add_rms_norm, add_rms_norm_fp8, rms_norm, rms_norm_fp8
from engine.kernels.gpu.planned_draw import draw_planned
from engine.kernels.gpu.prefill_attention import prefill_attention
from engine.kernels.gpu.quantise import quantise_rows
from engine.kernels.gpu.rotary import rotate_and_write
from engine.kernels.gpu.scaled_gemm import scaled_gemm
from engine.layers.activation import SiluAndMul
from engine.layers.attention import DecodeAttention, PrefillAttention, RotaryAndKVWrite
from engine.layers.embedding import EmbeddingShard
from engine.layers.linear import Linear
from engine.layers.mixture_of_experts import GroupedExperts
from engine.layers.norm import RMSNorm
from engine.models.decoder import Decoder
from engine.pipeline.capture import refuse_in_capture
from engine.step_inputs import StepInputs
from engine.units_at_hand import UnitGrant, UnitsAtHand

# Programs of decode attention on a unit that is its own: one's products hide behind the other's loads.
_DECODE_CTAS = 2
# Products of so many columns are worth a kernel of our own beside attention; others spill registers in it.
_COLUMN_MULTIPLE = 16


def compute_with_kernels(model: Decoder, units: UnitsAtHand) -> None:
    """Have the kernels compute every operation of the model that they can, and draw its tokens.

    From then on they take the units that are at hand when they are launched, which whoever runs the model may limit.
    """
    model.units = units
    for module in model.modules():
        match module:
            case RMSNorm():
                module.computed_by(partial(_norm, module, units))
                module.of_sum = partial(_norm_of_sum, module, units)
                module.quantised = partial(_norm_quantised, module)
                module.quantised_of_sum = partial(_norm_quantised_of_sum, module)
            case SiluAndMul():
                module.computed_by(partial(_gate, units))
                module.quantised = _gate_quantised
            case EmbeddingShard():
                module.computed_by(partial(_embed, module, units))
            case RotaryAndKVWrite():
                module.computed_by(partial(_rotate, module, units))
            case DecodeAttention():
                module.computed_by(partial(_decode, module, units))
            case PrefillAttention():
                module.computed_by(partial(_prefill, module, units))
            case GroupedExperts() if module.gate_up_proj_scale is None:  # the kernels take no scales
                module.computed_by(partial(_experts, module, units))
            case Linear():
                module.computed_by(partial(_multiply, module, units))
    model.lm_head.draw = draw_planned


def _multiply(linear: Linear, units: UnitsAtHand, input_TI: Tensor, *, output: Tensor | None = None) -> Tensor:
    """By the operation itself, which asks the library; where attention is to run on the same units, by a kernel whose
    programs leave room for its.
    """
    if units.grant.has_guest and _leaves_room(linear, input_TI):
        num_sms, config = units.grant.num_units, gemm_configs.CORESIDENT
        if linear.weight_scale is None:
            return gemm(
                input_TI, linear.weight, num_sms=num_sms, bias_N=linear.bias, output=output, config=config
            )  # fmt: skip
        return scaled_gemm(
            *quantise_rows(input_TI), linear.weight, linear.weight_scale, bias_N=linear.bias, output=output,
            output_dtype=input_TI.dtype, num_sms=num_sms, config=config,
        )  # fmt: skip
    most_programs = units.grant.most_programs
    if linear.weight_scale is not None and most_programs is not None:
        rows = QuantisedRows(*quantise_rows(input_TI, num_ctas=most_programs), input_TI.dtype)
        return product_of_quantised(rows, linear.weight, linear.weight_scale, linear.bias, output)
    if output is None:
        product: Tensor = type(linear).forward(linear, input_TI)
        return product
    type(linear).into(linear, output, input_TI)
    return output


def _leaves_room(linear: Linear, input_TI: Tensor) -> bool:
    """Whether the kernel takes these operands."""
    weight_OI = linear.weight
    return len(weight_OI) % _COLUMN_MULTIPLE == 0 and is_loadable(weight_OI) and is_loadable(input_TI)


def _norm(norm: RMSNorm, units: UnitsAtHand, hidden_TE: Tensor, *, output: Tensor | None = None) -> Tensor:
    return rms_norm(hidden_TE, norm.weight, norm.epsilon, output, num_ctas=units.grant.most_programs)


def _norm_quantised(norm: RMSNorm, hidden_TE: Tensor) -> QuantisedRows:
    return QuantisedRows(*rms_norm_fp8(hidden_TE, norm.weight, norm.epsilon), hidden_TE.dtype)


def _norm_quantised_of_sum(norm: RMSNorm, hidden_TE: Tensor, residual_TE: Tensor) -> tuple[QuantisedRows, Tensor]:
    sum_TE = torch.empty_like(residual_TE)
    values_TE, scales_T, _ = add_rms_norm_fp8(hidden_TE, residual_TE, norm.weight, norm.epsilon, new_residual_TE=sum_TE)
    return QuantisedRows(values_TE, scales_T, hidden_TE.dtype), sum_TE


def _gate_quantised(gate_up_TF: Tensor) -> QuantisedRows:
    return QuantisedRows(*silu_mul_fp8(gate_up_TF), gate_up_TF.dtype)


def _norm_of_sum(norm: RMSNorm, units: UnitsAtHand, hidden_TE: Tensor, residual_TE: Tensor) -> tuple[Tensor, Tensor]:
    sum_TE, num_ctas = torch.empty_like(residual_TE), units.grant.most_programs
    return add_rms_norm(hidden_TE, residual_TE, norm.weight, norm.epsilon, new_residual_TE=sum_TE, num_ctas=num_ctas)


def _gate(units: UnitsAtHand, gate_up_TF: Tensor, *, output: Tensor | None = None) -> Tensor:
    return silu_mul(gate_up_TF, output, num_ctas=units.grant.most_programs)


def _embed(shard: EmbeddingShard, units: UnitsAtHand, step: StepInputs, *, output: Tensor | None = None) -> Tensor:
    return embedding(step.tokens, shard.weight, shard.first, output, num_ctas=units.grant.most_programs)


def _rotate(
    rotary: RotaryAndKVWrite, units: UnitsAtHand, qkv_TF: Tensor, step: StepInputs, *, output: Tensor | None = None
) -> Tensor:
    q_norm, k_norm = rotary.q_norm, rotary.k_norm
    key_scale, value_scale = step.kv_cache.scales(rotary.layer)
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
        key_scale=key_scale,
        value_scale=value_scale,
        query_THd=output,
        num_ctas=units.grant.most_programs,
    )


def _decode(
    attention: DecodeAttention, units: UnitsAtHand, query_THd: Tensor, step: StepInputs, *, output: Tensor | None = None
) -> Tensor:
    """In a padded step all that attention writes to, of which the lanes are written."""
    query_DHd = query_THd[: step.num_decodes]
    if output is None:
        output = query_DHd.new_empty(query_DHd.shape).flatten(1) if step.attention is None else step.attention
    num_rows = len(query_DHd)
    if num_rows == 0:
        return output
    keys, values = step.kv_cache.layer(attention.layer)
    key_scale, value_scale = step.kv_cache.scales(attention.layer)
    grant = units.grant
    num_ctas = _DECODE_CTAS * grant.num_units if grant.is_apart else grant.num_units
    config = _decode_config(query_DHd, keys, grant, num_ctas)
    # A plan says which tiles there are, whoever walks them: steps with other grants go by the same one.
    key = (attention.window, config.tile)
    scratch = step.decode_plans.get(key)
    is_planned = scratch is not None
    if scratch is None:
        scratch = step.decode_plans[key] = DecodeScratch.allocate(
            max_rows=num_rows,
            max_blocks=step.decode_block_tables.shape[1],
            block_size=keys.shape[2],
            group_size=query_DHd.shape[1] // keys.shape[1],
            head_dim=keys.shape[3],
            max_ctas=_DECODE_CTAS * units.total,
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
        num_sms=grant.num_units,
        scratch=scratch,
        window=attention.window,
        key_scale=key_scale,
        value_scale=value_scale,
        output=output[:num_rows].view(query_DHd.shape),
        is_planned=is_planned,
        config=config,
    )
    return output


def _decode_config(query_DHd: Tensor, keys: Tensor, grant: UnitGrant, num_ctas: int) -> decode_configs.DecodeConfig:
    if grant.has_guest:
        return decode_configs.CORESIDENT
    return decode_configs.decode_config(
        head_dim=keys.shape[3],
        group_size=query_DHd.shape[1] // keys.shape[1],
        cache_bytes=keys.element_size(),
        query_bytes=query_DHd.element_size(),
        num_ctas=num_ctas,
        num_sms=grant.num_units,
    )


def _prefill(
    attention: PrefillAttention,
    units: UnitsAtHand,
    query_THd: Tensor,
    step: StepInputs,
    *,
    output: Tensor | None = None,
) -> Tensor:
    """In a padded step all that attention writes to, of which everything behind the decodes is written."""
    query_QHd = query_THd if step.attention is not None else query_THd[step.num_decodes :]
    if output is None:
        output = query_QHd.new_empty(query_QHd.shape).flatten(1) if step.attention is None else step.attention
    if len(query_QHd) == 0:
        return output
    starts_P1, lengths_P = _chunks(step)
    key_scale, value_scale = step.kv_cache.scales(attention.layer)
    prefill_attention(
        query_QHd,
        *step.kv_cache.layer(attention.layer),
        step.prefill_block_tables,
        starts_P1,
        lengths_P,
        scale=attention.scale,
        window=attention.window,
        key_scale=key_scale,
        value_scale=value_scale,
        output=output.view(query_QHd.shape),
        num_ctas=units.grant.most_programs,
    )
    return output


def _chunks(step: StepInputs) -> tuple[Tensor, Tensor]:
    """Starts and context lengths on the device; of a step that has none there, made from the host's, at a wait."""
    if step.prefill_starts is not None and step.prefill_lengths is not None:
        return step.prefill_starts, step.prefill_lengths
    refuse_in_capture("a copy of the chunks' starts and lengths from the host")
    sizes, device = torch.tensor((0, *step.prefill_chunk_sizes)), step.tokens.device
    lengths_P = torch.tensor(step.prefill_context_lengths, dtype=torch.int64, device=device)  # of no chunk, too
    return sizes.cumsum(0).to(device), lengths_P


def _experts(
    experts: GroupedExperts,
    units: UnitsAtHand,
    hidden_TE: Tensor,
    router_logits_TX: Tensor,
    step: StepInputs,
    *,
    output: Tensor | None = None,
) -> Tensor:
    """Rows of a padded step that have no token go to no expert."""
    return mixture_of_experts(
        hidden_TE,
        router_logits_TX,
        experts.gate_up_proj,
        experts.down_proj,
        experts.num_experts_per_token,
        normalise=experts.normalise,
        round_scores=experts.round_scores,
        num_sms=units.grant.num_units,
        positions_T=step.positions,
        output=output,
    )
