"""What a rank does to a model that will run on a GPU, once its weights are there: see `engine.kernels.gpu`.

Here is decided whether the kernels can compute it, from sizes alone: all of them or none.
"""

import importlib.util
import logging
from collections.abc import Callable

import torch

from engine.config import EngineConfig
from engine.models.decoder import Decoder
from engine.pipeline.rank_agreement import RankAgreement
from engine.units_at_hand import UnitsAtHand

_log = logging.getLogger(__name__)

_DTYPES = ("float32", "bfloat16", "float16")
_HEAD_DIMS = (16, 32, 64, 128, 256)
_BLOCK_SIZES = (16, 32, 64, 128)
# Tiles of attention and of experts take the shared memory of Hopper, and its copies by tiles.
_LEAST = (9, 0)
_MAX_WIDTH = 65536  # that one program holds
_MAX_EXPERTS = 512
_ROW_BYTES = 16  # what tiles of experts are loaded by
# Where kernels are interpreted there are none; so few programs then that tests see what several of them share.
_INTERPRETED_SMS = 2


def use_gpu_kernels(
    model: Decoder,
    config: EngineConfig,
    device: torch.device,
    tell: Callable[[str], None],
    ranks: RankAgreement | None = None,
) -> bool:
    """Have the model's operations computed by kernels; where they cannot, tell why, and plain torch goes on.

    With `ranks`, the others of a group, it is so on all of them or on none: they would have other graphs, and steps of
    other sizes, and wait for each other's collectives.
    """
    reason = refusal(config, device)
    if ranks is not None:
        (is_able,) = ranks.smallest([reason is None])
        if reason is not None and not ranks.is_first:
            _log.warning("This rank cannot compute by kernels, so none of its group does: %s.", reason)
        if not is_able:
            reason = reason or "another rank cannot compute by kernels, as its own log says"
    if reason is not None:
        tell(f"layers are computed by plain torch and no step becomes a CUDA graph: {reason}")
        return False
    from engine.gpu_operations import compute_with_kernels

    is_gpu = device.type == "cuda"
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count if is_gpu else _INTERPRETED_SMS
    compute_with_kernels(model, UnitsAtHand(num_sms, no_guests(config)))
    return True


def refusal(config: EngineConfig, device: torch.device) -> str | None:
    """Why the kernels cannot compute this model here; None where they can."""
    reason = unsupported(config)
    if reason is None and device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < _LEAST:
        reason = f"kernels want compute capability 9.0 or later, and this device has {capability[0]}.{capability[1]}"
    if reason is None and importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed"
    return reason


def no_guests(config: EngineConfig) -> str | None:
    """Why products and decode attention cannot be on the same execution units; None where they can."""
    from engine.kernels.gpu.decode_config import CORESIDENT, CORESIDENT_BYTES, padded_rows

    model, element_bytes = config.model, config.dtype.num_bytes
    if element_bytes != 2:
        return f"kernels that leave room for each other compute in 16 bits, not in {config.dtype.value}"
    shared = CORESIDENT.shared_bytes(
        head_dim=model.head_dim,
        rows=padded_rows(model.num_heads // model.num_kv_heads),
        cache_bytes=config.cache_format.num_bytes,
        query_bytes=element_bytes,
    )
    if shared > CORESIDENT_BYTES:
        return (
            f"beside a product, attention to heads of {model.head_dim} elements would take {shared // 1024} KiB of "
            f"shared memory, where {CORESIDENT_BYTES // 1024} are left"
        )
    return None


def unsupported(config: EngineConfig) -> str | None:
    """What of this model or its cache the kernels cannot do; None where nothing is."""
    model, dtype = config.model, config.dtype.value
    if dtype not in _DTYPES:
        return f"kernels compute in {', '.join(_DTYPES)}, not in {dtype}"
    if model.head_dim not in _HEAD_DIMS:
        return f"kernels want heads of {', '.join(map(str, _HEAD_DIMS))} elements, not of {model.head_dim}"
    if config.block_size not in _BLOCK_SIZES:
        return f"kernels want blocks of {', '.join(map(str, _BLOCK_SIZES))} tokens, not of {config.block_size}"
    if model.hidden_size > _MAX_WIDTH:
        return f"kernels want hidden states of at most {_MAX_WIDTH} elements, not of {model.hidden_size}"
    if model.num_experts > _MAX_EXPERTS:
        return f"kernels route to at most {_MAX_EXPERTS} experts, not to {model.num_experts}"
    if model.num_experts:
        per_rank = model.moe_intermediate_size // config.tensor_parallel
        for num_elements in (model.hidden_size, per_rank):
            if num_elements * config.dtype.num_bytes % _ROW_BYTES:
                return f"kernels want experts' rows of a multiple of {_ROW_BYTES} bytes, not of {num_elements} elements"
    return None
