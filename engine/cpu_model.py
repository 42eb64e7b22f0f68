"""What a rank does to a model that will run on a CPU, once its weights are there: see `engine.kernels`."""

from collections.abc import Callable

from engine.config import CompileMode, EngineConfig
from engine.kernels.compiled import CompiledKernels
from engine.layers.linear import Linear
from engine.models.decoder import Decoder
from engine.operation import Operation
from engine.user_cache import cache_directory

# Below, a model is small enough to be at its first answer before its kernels are compiled.
LEAST_PARAMETERS_TO_COMPILE = 16_000_000
_COMPILED_DTYPES = ("float32", "bfloat16", "float16")


def prepare_for_cpu(model: Decoder, config: EngineConfig, tell: Callable[[str], None]) -> None:
    """Pack the weights of matrix products, and let operations use kernels compiled for this CPU."""
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, Linear) and module.weight is not model.embed_tokens.shard.weight:
            module.pack()
    if config.compile is CompileMode.NEVER or config.dtype.value not in _COMPILED_DTYPES:
        return
    operations = [module for module in model.modules() if isinstance(module, Operation)]
    wanted = [(operation, operation.kernel(config.dtype.value, config.block_size)) for operation in operations]
    distinct = list(dict.fromkeys(kernel for _, kernel in wanted if kernel is not None))
    kernels = CompiledKernels(cache_directory() / "kernels")
    missing = kernels.missing(distinct)
    if missing and (config.compile is CompileMode.ALWAYS or num_parameters >= LEAST_PARAMETERS_TO_COMPILE):
        tell(f"compiling {len(missing)} kernels for this CPU, once")
        kernels.compile(missing)
    for operation, kernel in wanted:
        operation.compiled = None if kernel is None else kernels.load(kernel)
