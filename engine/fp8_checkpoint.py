"""`Fp8Checkpoint`: what config.json says of a checkpoint whose weights are stored in FP8 already.

Two ways of writing that down are known: quant_method "fp8" (Hugging Face, vLLM, DeepSeek) and "compressed-tensors" with
format "float-quantized". Which tensors are FP8 and how many scales each has is in the files, not here: see
`engine.weight_scales`, and `engine.kv_scales` for those of a KV cache. Static scales of activations are not used.
Torch-free.
"""

from dataclasses import dataclass

from engine.config_json import ConfigJson
from engine.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Checkpoint:
    """Weights are e4m3. `block`: so many rows and columns share a scale; None for one of a row or of a tensor.

    `has_kv_scales`: the checkpoint says that every layer has a scale for its keys and one for its values.
    """

    block: tuple[int, int] | None = None
    has_kv_scales: bool = False

    @classmethod
    def from_json(cls, config: ConfigJson) -> "Fp8Checkpoint | None":
        """None for a checkpoint that is not quantised; raises `CheckpointError` for one quantised otherwise."""
        if not config.has("quantization_config"):
            return None
        quantization = config.object("quantization_config")
        method = quantization.text("quant_method", default="unknown")
        if method == "fp8":
            form = quantization.text("fmt", default="e4m3")
            if form in ("e4m3", "float8_e4m3fn"):
                return cls(block=_block(quantization, "weight_block_size"))
            method = f"{method} as {form}"
        if method == "compressed-tensors":
            form = quantization.text("format", default="of no format")
            method = f"{method}, {form}"
            if form == "float-quantized":
                return cls(block=_block_of_groups(quantization), has_kv_scales=_has_kv_scales(quantization))
        raise CheckpointError(
            f"{config.where}: the checkpoint is quantised ({method}); only float16, bfloat16, float32 and float64 "
            "weights are supported, and FP8 (e4m3) ones of quant_method fp8, or of compressed-tensors in the format "
            "float-quantized."
        )


def _block_of_groups(quantization: ConfigJson) -> tuple[int, int] | None:
    """Of groups of layers, each of which says how its weights are quantised."""
    blocks = set()
    groups = quantization.object("config_groups")
    for name in groups.names():
        weights = groups.object(name).object("weights")
        kind, num_bits = weights.text("type", default="float"), weights.integer("num_bits", default=8)
        if kind != "float" or num_bits != 8:
            raise CheckpointError(f"{weights.where}: weights of type {kind} in {num_bits} bits are not supported.")
        blocks.add(_block(weights, "block_structure"))
    if len(blocks) > 1:
        raise CheckpointError(f"{groups.where}: groups with scales of several kinds of blocks are not supported.")
    return blocks.pop() if blocks else None


def _has_kv_scales(quantization: ConfigJson) -> bool:
    """Whether there is a `kv_cache_scheme`; raises `CheckpointError` for one that is not a scale for each tensor."""
    if not quantization.has("kv_cache_scheme"):
        return False
    scheme = quantization.object("kv_cache_scheme")
    kind, num_bits = scheme.text("type", default="float"), scheme.integer("num_bits", default=8)
    strategy = scheme.text("strategy", default="tensor")
    faults = (
        (kind != "float" or num_bits != 8, f"KV caches of type {kind} in {num_bits} bits", "float in 8 bits"),
        (strategy != "tensor", f"scales of a KV cache by {strategy}", "one for the keys of a layer and one for values"),
        (not scheme.boolean("symmetric", True), "asymmetric scales of a KV cache", "symmetric ones"),
        (
            scheme.boolean("dynamic", False),
            "scales of a KV cache found in every step",
            "those of a calibration",
        ),
    )
    for is_wrong, what, right in faults:
        if is_wrong:
            raise CheckpointError(f"{scheme.where}: {what} are not supported, only {right}.")
    return True


def _block(values: ConfigJson, key: str) -> tuple[int, int] | None:
    sizes = values.integers(key)
    if not sizes:
        return None
    if len(sizes) != 2 or min(sizes) < 1:
        raise CheckpointError(f"{values.where}: {key} must be rows and columns of a block, such as [128, 128].")
    return sizes[0], sizes[1]
