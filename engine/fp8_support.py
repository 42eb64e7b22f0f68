"""Which devices have FP8, what is said where one has not, and what that makes of a configuration.

The device is asked by whoever has it; everything here is a function of the answer, and of whether Triton is there.
"""

import importlib.util
from dataclasses import replace

from engine.config import DeviceKind, EngineConfig
from engine.errors import ConfigError
from engine.number_format import NumberFormat

# Ada and Hopper were the first with tensor cores, and conversions, for e4m3.
LEAST_CAPABILITY = (8, 9)


def has_fp8(device: DeviceKind, capability: tuple[int, int] | None) -> bool:
    """`capability` is the compute capability of a CUDA device, None for any other."""
    return device is DeviceKind.CUDA and capability is not None and capability >= LEAST_CAPABILITY


def check_cpu(config: EngineConfig) -> None:
    """Raise `ConfigError` where it is known before any rank starts that the device cannot: on a CPU."""
    if config.device is DeviceKind.CPU:
        settled(config, None)


def settled(
    config: EngineConfig,
    capability: tuple[int, int] | None,
    device_name: str = "",
    *,
    has_triton: bool | None = None,
) -> EngineConfig:
    """The configuration with its number formats decided for this device.

    What was left open (`product_format` None) becomes FP8 where the checkpoint and the device have it, else the dtype.
    On a GPU products in FP8 need Triton, whose kernels quantise their inputs: `has_triton` is None for whether this
    Python has it. Raises `ConfigError` where FP8 was asked for and the device, or Python, cannot.
    """
    is_able = has_fp8(config.device, capability)
    if has_triton is None:
        has_triton = importlib.util.find_spec("triton") is not None
    if config.product_format is None:
        takes_fp8 = is_able and has_triton and config.model.fp8 is not None
        chosen = NumberFormat.FP8 if takes_fp8 else NumberFormat(config.dtype.value)
        config = replace(config, product_format=chosen)
    if not is_able and NumberFormat.FP8 in (config.product_format, config.kv_cache_format):
        raise ConfigError(_refusal(config, capability, device_name))
    if config.in_fp8 and not has_triton:
        raise ConfigError(
            "FP8 matrix products on a GPU need Triton, whose kernels quantise their inputs, and this Python has none: "
            "install triton in the version that torch names, or use dtype bfloat16."
        )
    return config


def _refusal(config: EngineConfig, capability: tuple[int, int] | None, device_name: str) -> str:
    device = f"device {config.device.value}"
    if capability is not None:
        name = f"{device_name}, " if device_name else ""
        device += f" ({name}compute capability {capability[0]}.{capability[1]})"
    if config.in_fp8:
        lacks, instead = "FP8 matrix products", "dtype bfloat16"
    else:
        lacks, instead = "FP8 numbers for a KV cache", "kv_cache_dtype auto"
    least = ".".join(map(str, LEAST_CAPABILITY))
    return f"{device} has no {lacks}: use {instead}, or a GPU of compute capability {least} or later (L4, H100, ...)."
