"""What decode and prefill attention ask of their arguments; the host knows all of it without asking the device."""

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels.gpu.row_launch import check_argument

_FLOATING = (torch.bfloat16, torch.float16, torch.float32)
_HEAD_DIMS = (16, 32, 64, 80, 96, 128, 160, 192, 256)
_BLOCK_SIZES = (16, 32, 64, 128)
_INTEGERS = (torch.int32, torch.int64)


def check_attention(
    query_THd: Tensor, keys: Tensor, values: Tensor, block_tables: Tensor, window: int | None, output: Tensor | None
) -> None:
    """Raise `ConfigError` unless queries [T, H, d], a cache [N, K, S, d] and block tables [sequences, B] fit together.

    Heads of a token must lie side by side; tokens may be further apart.
    """
    if query_THd.dim() != 3 or keys.dim() != 4 or keys.shape != values.shape or keys.dtype != values.dtype:
        raise ConfigError(
            f"queries {tuple(query_THd.shape)}, keys {tuple(keys.shape)} of {keys.dtype} and values "
            f"{tuple(values.shape)} of {values.dtype} must be [T, H, d] and twice [N, K, S, d] of one dtype."
        )
    _check_cache(query_THd, keys, values)
    num_heads, head_dim = query_THd.shape[1:]
    num_kv_heads, _, cached_dim = keys.shape[1:]
    if num_heads % num_kv_heads or cached_dim != head_dim:
        raise ConfigError(
            f"{num_heads} query heads of {head_dim} elements cannot share {num_kv_heads} key/value heads of "
            f"{cached_dim}: head dimensions must be equal, query heads a multiple of key/value heads."
        )
    if block_tables.dim() != 2 or block_tables.stride(1) != 1:
        raise ConfigError(
            f"block tables are {tuple(block_tables.shape)} with strides {block_tables.stride()}, where [sequences, B] "
            f"with the blocks of a sequence side by side is right."
        )
    if block_tables.dtype not in _INTEGERS:
        raise ConfigError(f"block tables are {block_tables.dtype}, where {_INTEGERS[0]} or {_INTEGERS[1]} is right.")
    if window is not None and window < 1:
        raise ConfigError(f"window is {window}, but a token sees itself at least: 1 or more (None for no window).")
    if output is not None and (output.shape != query_THd.shape or output.dtype != query_THd.dtype):
        raise ConfigError(
            f"output is {tuple(output.shape)} of {output.dtype}, where {tuple(query_THd.shape)} of {query_THd.dtype} "
            f"is right."
        )
    for name, tensor in (("queries", query_THd), ("output", output)):
        if tensor is not None and tensor.stride()[1:] != (head_dim, 1):
            raise ConfigError(f"{name} have strides {tensor.stride()}: heads of a token must lie side by side.")


def check_integers(name: str, given: Tensor) -> None:
    """Raise `ConfigError` unless lengths or starts are whole numbers side by side, as kernels read them."""
    check_argument(name, given, (given.numel(),), *_INTEGERS)


def _check_cache(query_THd: Tensor, keys: Tensor, values: Tensor) -> None:
    if query_THd.dtype not in _FLOATING or keys.dtype not in (query_THd.dtype, torch.float8_e4m3fn):
        raise ConfigError(
            f"queries of {query_THd.dtype} cannot meet a cache of {keys.dtype}: bfloat16, float16 and float32 queries "
            f"meet a cache of their own dtype or of float8_e4m3fn."
        )
    block_size, head_dim = keys.shape[2:]
    if head_dim not in _HEAD_DIMS or block_size not in _BLOCK_SIZES:
        raise ConfigError(
            f"cache blocks of {block_size} slots of {head_dim} elements are not supported: slots must be one of "
            f"{_BLOCK_SIZES}, elements one of {_HEAD_DIMS}."
        )
    if not keys.is_contiguous() or not values.is_contiguous():
        raise ConfigError(f"keys have strides {keys.stride()}, values {values.stride()}: contiguous caches are right.")
