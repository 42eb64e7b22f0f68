"""`EngineConfig`: everything that decides how one tensor-parallel group runs, parsed once and frozen.

It knows no file format: `cluster.config` reads recipes, `engine.model_config` reads checkpoints.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from engine.errors import ConfigError
from engine.host_cpus import num_usable_cpus
from engine.model_config import DType, ModelConfig
from engine.number_format import NumberFormat

MAX_NETWORK_CTAS = 32  # channels that every version of NCCL can have


class DeviceKind(StrEnum):
    """Where the ranks compute."""

    CPU = "cpu"
    CUDA = "cuda"


class PipelineMode(StrEnum):
    """How a step runs through the layers; see docs/pipeline.md.

    OVERLAP runs the nano-batch plan that was measured to be the fastest for a batch like it, and one operation after
    the other where none is faster than that. NANOBATCH cuts the batch as OVERLAP would but overlaps nothing;
    SEQUENTIAL does not cut: both are there to compare with.
    """

    SEQUENTIAL = "sequential"
    NANOBATCH = "nanobatch"
    OVERLAP = "overlap"


class CompileMode(StrEnum):
    """Whether the memory-bound kernels of a CPU are compiled at the first start; later starts find them.

    AUTO compiles for models that are large enough to be worth half a minute, and uses what is there for others; NEVER
    uses none.
    """

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One engine: a model, its tensor-parallel group and its limits. Construction raises `ConfigError`.

    `max_batch_tokens` is the dense batch B (NanoFlow, section 4.2.1): tokens computed per step. `max_sequences`
    bounds the sequences running at once and the rows of the token pool. `block_size` is in tokens: a CPU
    reads long runs of keys twice as fast (docs/cpu_kernels.md), a GPU's kernels take a tile of 64 in one piece. The
    cache of each rank takes `cache_bytes` bytes, or, where that is None, `cache_fraction` of the memory that is free
    once the weights are loaded; `num_blocks` overrides both. `num_threads` is the CPU threads of one rank (None: the
    machine's cores divided by the ranks of this group).

    Activations, norms, the embedding and the output head are of `dtype`. `product_format` is how the layers' matrix
    products take weights and inputs: FP8, or as `dtype` is. None leaves that to the checkpoint and the device, until a
    rank has one (`engine.fp8_support`). `kv_cache_format`: None is FP8 where the products are in it, else `dtype`.

    Where no plans are stored for this setup, a group that can overlap measures, plans and tries at its start. No bucket
    of batches is begun more than `plan_seconds` after that began, measuring included; the next start goes on with the
    rest. 0 uses stored plans only.

    Between GPUs, collectives that run beside other work take `network_ctas` programs at most, one on an execution unit;
    sums of up to `symmetric_bytes` go through symmetric memory (None: as far as it is measured at the start to be
    faster than NCCL; 0: none).
    """

    model: ModelConfig
    checkpoint: Path
    dtype: DType
    device: DeviceKind = DeviceKind.CPU
    tensor_parallel: int = 1
    max_model_len: int = 2048
    max_batch_tokens: int = 2048
    max_sequences: int = 256
    block_size: int = 64
    cache_bytes: int | None = None
    cache_fraction: float = 0.9
    num_blocks: int | None = None
    prefix_caching: bool = True
    num_threads: int | None = None
    pipeline: PipelineMode = PipelineMode.OVERLAP
    plan_seconds: float = 45.0
    compile: CompileMode = CompileMode.AUTO
    product_format: NumberFormat | None = None
    kv_cache_format: NumberFormat | None = None
    network_ctas: int = 8
    symmetric_bytes: int | None = None

    def __post_init__(self) -> None:
        positive = ("tensor_parallel", "max_model_len", "max_batch_tokens", "max_sequences", "block_size")
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, but is {getattr(self, name)}.")
        for name in ("cache_bytes", "num_blocks", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, but is {value}.")
        if not 1 <= self.network_ctas <= MAX_NETWORK_CTAS:
            raise ConfigError(
                f"network_ctas must be 1..{MAX_NETWORK_CTAS}, but is {self.network_ctas}: so many execution units may "
                "a collective take from what is computed beside it; 4 to 16 fill the links of a machine."
            )
        if self.symmetric_bytes is not None and self.symmetric_bytes < 0:
            raise ConfigError(
                f"symmetric_bytes must be 0 (NCCL sums everything) or more, but is {self.symmetric_bytes}; leave it "
                "out to have it measured."
            )
        if not 0 <= self.plan_seconds < float("inf"):
            raise ConfigError(f"plan_seconds must be 0 or more, but is {self.plan_seconds}.")
        if not 0 < self.cache_fraction <= 1:
            raise ConfigError(f"cache_fraction must be in (0, 1], but is {self.cache_fraction}.")
        if self.max_sequences > self.max_batch_tokens:
            raise ConfigError(
                f"max_sequences ({self.max_sequences}) must not exceed max_batch_tokens ({self.max_batch_tokens}): "
                "every running sequence computes a token per step."
            )
        if self.max_model_len > self.model.max_position_embeddings:
            raise ConfigError(
                f"max_model_len ({self.max_model_len}) exceeds the {self.model.max_position_embeddings} positions "
                "the model was made for (max_position_embeddings in config.json)."
            )
        self.model.check_tensor_parallel(self.tensor_parallel)
        for name in ("product_format", "kv_cache_format"):
            chosen = getattr(self, name)
            if chosen not in (None, NumberFormat.FP8, self.dtype):
                shown = "kv_cache_dtype" if name == "kv_cache_format" else name
                raise ConfigError(
                    f"{shown} {chosen.value} does not go with activations in {self.dtype.value}: auto, fp8 and "
                    f"{self.dtype.value} do."
                )

    @property
    def in_fp8(self) -> bool:
        """Whether the layers' matrix products are in FP8."""
        return self.product_format is NumberFormat.FP8

    @property
    def number_format(self) -> NumberFormat:
        """What a user calls all of it: that of the products."""
        return self.product_format or NumberFormat(self.dtype.value)

    @property
    def cache_format(self) -> NumberFormat:
        """What keys and values are stored in."""
        return self.kv_cache_format or self.number_format

    @property
    def max_blocks_per_sequence(self) -> int:
        """Width of a row's block table."""
        return -(-self.max_model_len // self.block_size)

    @property
    def threads_per_rank(self) -> int:
        """CPU threads each rank computes with."""
        return self.num_threads or max(1, num_usable_cpus() // self.tensor_parallel)
