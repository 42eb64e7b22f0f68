"""What a rank does to a model that will run on a CPU, once its weights are there: see `engine.kernels`."""

from collections.abc import Callable

from engine.config import CompileMode, EngineConfig
from engine.kernels.compiled import CompiledKernels
from engine.layers.linear import Linear
from engine.models.decoder import Decoder
from engine.pipeline.pipeline import Pipeline
from engine.user_cache import cache_directory

# Below, a model is small enough to be at its first answer before its kernels are compiled.
LEAST_PARAMETERS_TO_COMPILE = 16_000_000
_COMPILED_DTYPES = ("float32", "bfloat16", "float16")


def pack_weights(model: Decoder) -> None:
    """Lay the weights of matrix products out for this CPU; a head tied to the embedding stays as it is."""
    for module in model.modules():
        if isinstance(module, Linear) and module.weight is not model.embed_tokens.shard.weight:
            module.pack()


def use_compiled_kernels(model: Decoder, pipeline: Pipeline, config: EngineConfig, tell: Callable[[str], None]) -> None:
    """Let the model's layers be computed by kernels compiled for this CPU. Pack its weights before."""
    dtype = config.dtype.value
    if config.compile is CompileMode.NEVER or dtype not in _COMPILED_DTYPES or config.cache_format != dtype:
        return
    of_norm, of_best = model.norm.kernel(dtype, config.block_size), model.lm_head.best_kernel(dtype)
    assert of_norm is not None
    wanted = list(dict.fromkeys([of_norm, of_best, *pipeline.kernels(dtype, config.block_size)]))
    kernels = CompiledKernels(cache_directory() / "kernels")
    missing = kernels.missing(wanted)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if missing and (config.compile is CompileMode.ALWAYS or num_parameters >= LEAST_PARAMETERS_TO_COMPILE):
        tell(f"compiling {len(missing)} kernels for this CPU, once")
        kernels.compile(missing)
    model.norm.compiled, model.lm_head.best = kernels.load(of_norm), kernels.load(of_best)
    pipeline.use(kernels, dtype, config.block_size)
