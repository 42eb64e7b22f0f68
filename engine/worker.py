"""`Worker`: one rank of a tensor-parallel group, from joining the group to running steps.

It owns the process group, the device, the model, the cache and the runner of its rank. It knows no Ray and no
sequences; whoever hosts it (a process, an actor) calls everything from one thread.
"""

import gc
import logging
import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.batch import Batch
from engine.config import DeviceKind, EngineConfig
from engine.cpu_model import pack_weights, use_compiled_kernels
from engine.errors import CapacityError, ConfigError, EngineDeadError
from engine.executor import CacheCapacity
from engine.fp8_support import settled
from engine.gemm_peak import measure_gemm_peak
from engine.gpu_model import use_gpu_kernels
from engine.gpu_preparation import GpuPreparation, free_device_memory
from engine.host_memory import keep_freed_memory, return_freed_memory
from engine.kv_cache import KVCache
from engine.kv_scales import KVScales
from engine.memory_budget import available_host_bytes, cache_budget, num_affordable_blocks
from engine.memory_use import MemoryMeter, MemoryPart, MemoryUse
from engine.model_runner import ModelRunner
from engine.models import build_model
from engine.models.decoder import Decoder
from engine.network import network_of
from engine.pending_step import PendingStep
from engine.pipeline.device_lanes import DeviceLanes
from engine.pipeline.padded_steps import reserve_padded
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.plan_choice import PlanChoice
from engine.pipeline.rank_agreement import RankAgreement
from engine.pipeline.selection import Selector, effort_at_start
from engine.tensor_bytes import tensor_bytes
from engine.tensor_parallel import TensorParallel
from engine.warm_up import warm_up
from engine.weight_layout import rank_weight_bytes
from engine.weights import load_weights

_log = logging.getLogger(__name__)

# Ranks may be started minutes apart on a busy cluster and read their weights at different speeds.
GROUP_TIMEOUT_SECONDS = 600.0


class Worker:
    """One rank. `start` once, `execute` in the order of the steps, `close` at the end (idempotent).

    `config` has its number formats decided once the rank has started. `emulates_fp8` computes FP8 where the device has
    none, slowly and to the same bits: what tests compare with.
    """

    def __init__(
        self,
        config: EngineConfig,
        rank: int = 0,
        rendezvous: str | None = None,
        timeout_seconds: float = GROUP_TIMEOUT_SECONDS,
        *,
        emulates_fp8: bool = False,
    ) -> None:
        if not 0 <= rank < config.tensor_parallel:
            raise ConfigError(f"rank must be 0..{config.tensor_parallel - 1}, but is {rank}.")
        if rendezvous is None and config.tensor_parallel > 1:
            raise ConfigError(f"tensor_parallel {config.tensor_parallel} needs a rendezvous, such as tcp://host:port.")
        self.config = config
        self._rank = rank
        self._rendezvous = rendezvous
        self._emulates_fp8 = emulates_fp8
        self._timeout = timedelta(seconds=timeout_seconds)
        self._owns_group = False
        self.tensor_parallel = TensorParallel()
        self._ranks = RankAgreement(self.tensor_parallel, torch.device("cpu"))
        self._runner: ModelRunner | None = None
        self._tell_host: Callable[[str], None] | None = None
        self._meter = MemoryMeter()
        self._model: Decoder | None = None
        self._cache: KVCache | None = None
        self._lanes: DeviceLanes | None = None
        self._cache_budget = 0
        self._workspace_bytes = 0
        self._step_bytes = 0

    def start(
        self,
        progress: Callable[[int, int], None] | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> CacheCapacity:
        """Join the group, load this rank's weights (`progress(bytes_done, bytes_total)`) and allocate its cache.

        Rank 0 tells what it does that may take long: compiling, and planning.

        Raises `ConfigError` and its kinds for what can never start here, `EngineDeadError` when the group fails.
        """
        self._tell_host = tell
        device = self._select_device()
        config = self.config = self._settled(device)
        self.tensor_parallel = tensor_parallel = self._join_group(device)
        self._ranks = RankAgreement(tensor_parallel, device)
        dtype: torch.dtype = getattr(torch, config.dtype.value)
        self._check_weights_fit(device)
        model = build_model(config.model, tensor_parallel, dtype, device, in_fp8=config.in_fp8)
        load_weights(model, config, tensor_parallel, progress)
        pipeline = Pipeline(model, config.model.hidden_size)
        self._lanes = pipeline.lanes_on(device)
        if device.type == "cpu":
            pack_weights(model)
            return_freed_memory()  # weights as they were loaded, and now are packed
            use_compiled_kernels(model, pipeline, config, self._tell)
        uses_gpu_kernels = device.type == "cuda" and use_gpu_kernels(model, config, device, self._tell, self._ranks)
        self._meter.mark()
        self._ranks.meet()  # ranks that share a machine measure at the same time, as they will compute
        gemm = measure_gemm_peak(config, quick=True)
        self._step_bytes = warm_up(config, model, pipeline, device, uses_gpu_kernels=uses_gpu_kernels)
        selector = Selector(config, pipeline, tensor_parallel, progress=lambda text: self._tell(f"pipeline: {text}"))
        plans = selector.select(effort_at_start(config))
        if plans is not None:  # they may need more than the sequential steps of the warm-up did
            pipeline.reserve(plans.schedules, config.max_batch_tokens)
            if uses_gpu_kernels:
                reserve_padded(config, pipeline, PlanChoice(pipeline.sequential, plans))
        self._workspace_bytes = self._meter.grown()
        num_blocks = self._agree_on_blocks(device)
        cache = KVCache.allocate(config, num_blocks, device, KVScales.read(config))
        self._model, self._cache = model, cache
        self._runner = ModelRunner(
            config,
            model,
            pipeline,
            cache,
            device,
            plans,
            rank=self._rank,
            returns_logprobs=self._rank == 0,
            uses_gpu_kernels=uses_gpu_kernels,
        )
        if uses_gpu_kernels:
            GpuPreparation(config, self._runner, tensor_parallel, self._tell).prepare(model, cache)
        # All ranks must say the same, to the last bit: whole operations per second of the fastest.
        rates = gemm.flops_per_second, gemm.dense_flops_per_second, gemm.wide_flops_per_second or 0.0
        fastest, fastest_dense, fastest_wide = (round(rate) for rate in self._ranks.largest(rates))
        return CacheCapacity(
            num_blocks=num_blocks,
            block_size=config.block_size,
            gemm_flops_per_second=fastest,
            dense_flops_per_second=fastest_dense,
            wide_flops_per_second=fastest_wide or None,
        )

    def memory(self) -> MemoryUse | None:
        """What this rank's process holds now, that it was started; None where that cannot be known."""
        model, cache_itself = self._model, self._cache
        if model is None or cache_itself is None:
            return None
        weights = tensor_bytes(dict(model.named_parameters()))
        cache = tensor_bytes(cache_itself)
        everything = tensor_bytes([model, cache_itself, self._runner])
        by_device: dict[str, dict[MemoryPart, int]] = {}
        for device in everything:
            by_device[device] = {
                MemoryPart.WEIGHTS: weights.get(device, 0),
                MemoryPart.KV_CACHE: cache.get(device, 0),
                MemoryPart.TABLES: everything[device] - weights.get(device, 0) - cache.get(device, 0),
            }
        return self._meter.use(
            f"rank {self._rank}",
            os.getpid(),
            by_device.get("cpu", {}) | {MemoryPart.WORKSPACE: self._workspace_bytes},
            device_parts=by_device.get("cuda"),
            cache_budget=self._cache_budget,
        )

    def execute(self, batch: Batch) -> PendingStep:
        """Launch one step: on a GPU it returns before the device is done, on a CPU after."""
        return self.runner.launch(batch)

    @property
    def runner(self) -> ModelRunner:
        """What runs this rank's steps; raises `EngineDeadError` before `start` and after `close`."""
        if self._runner is None:
            raise EngineDeadError(f"Rank {self._rank} is not running: it was never started, or it was closed.")
        return self._runner

    def close(self) -> None:
        """Leave the group and give the memory back."""
        had_device = self._runner is not None and self._runner.device.type == "cuda"
        lanes, self._lanes = self._lanes, None
        self._runner = self._model = self._cache = None
        if had_device:
            gc.collect()  # NCCL's end waits for the graphs that hold its collectives: none may be left in a cycle
        if lanes is not None:
            lanes.close()  # after the graphs that were captured on them
        if self._owns_group:
            self._owns_group = False
            dist.destroy_process_group()
        if had_device:
            free_device_memory()

    def _tell(self, text: str) -> None:
        if self._rank == 0:
            _log.info("%s", text)
            if self._tell_host is not None:
                self._tell_host(text)

    def _select_device(self) -> torch.device:
        """Make this rank's device the current one and set the number of CPU threads of this process."""
        torch.set_num_threads(self.config.threads_per_rank)
        if self.config.device is DeviceKind.CPU:
            keep_freed_memory()
            return torch.device("cpu")
        num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        # A host that gives each rank a GPU of its own shows one device; else all ranks see all.
        if num_devices != 1 and num_devices < self.config.tensor_parallel:
            raise ConfigError(
                f"device cuda with tensor_parallel {self.config.tensor_parallel} needs a GPU per rank, but this "
                f"process sees {num_devices}: use device cpu, a smaller tensor_parallel, or a machine with GPUs."
            )
        device = torch.device("cuda", self._rank if num_devices > 1 else 0)
        torch.cuda.set_device(device)
        # It honours a limit on the units it takes, which the older library does not, and sums stay in float32.
        torch.backends.cuda.preferred_blas_library("cublaslt")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        return device

    def _settled(self, device: torch.device) -> EngineConfig:
        """The configuration with what it left to the device; raises `ConfigError` for what the device has not."""
        if self._emulates_fp8:
            return self.config
        if device.type != "cuda":
            return settled(self.config, None)
        return settled(self.config, torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))

    def _join_group(self, device: torch.device) -> TensorParallel:
        size = self.config.tensor_parallel
        if size == 1:
            return TensorParallel()
        if dist.is_initialized():
            raise ConfigError("This process already is a rank of a torch.distributed group: give each rank its own.")
        backend = "nccl" if self.config.device is DeviceKind.CUDA else "gloo"
        try:
            dist.init_process_group(
                backend, init_method=self._rendezvous, rank=self._rank, world_size=size, timeout=self._timeout
            )
        except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
            raise EngineDeadError(
                f"Rank {self._rank} of {size} could not join its group at {self._rendezvous} within "
                f"{self._timeout.total_seconds():.0f} s: {error}"
            ) from error
        self._owns_group = True
        return network_of(self.config, self._rank, device, self._timeout)

    def _check_weights_fit(self, device: torch.device) -> None:
        """Refuse before reading anything what cannot be held."""
        config = self.config
        num_bytes = rank_weight_bytes(config.model, config.dtype, config.tensor_parallel, in_fp8=config.in_fp8)
        # Ranks on a CPU share its memory; each counts only its own part, as the others may have taken theirs.
        free = available_bytes(device)
        if num_bytes > free:
            raise CapacityError(
                f"The weights of rank {self._rank} take {num_bytes / 2**30:.2f} GiB in {config.number_format.value}, "
                f"but only {free / 2**30:.2f} GiB are free on {device}: use a smaller dtype or model, or a larger "
                "tensor_parallel."
            )

    def _agree_on_blocks(self, device: torch.device) -> int:
        """The number of blocks that every rank can afford; a rank that can afford none stops all of them."""
        self._ranks.meet()  # nobody counts free memory before everybody has loaded
        failure: CapacityError | None = None
        num_blocks = 0
        if device.type == "cuda":  # torch keeps what warm-up and trials have freed: it counts as taken
            gc.collect()
            torch.cuda.empty_cache()
        try:
            free_bytes = max(0, available_bytes(device) - self._step_bytes)
            self._cache_budget, _ = cache_budget(self.config, free_bytes)
            num_blocks = num_affordable_blocks(self.config, free_bytes)
        except CapacityError as error:
            failure = error
        agreed = int(self._ranks.smallest([num_blocks])[0])
        if failure is not None:
            raise failure
        if agreed == 0:
            raise CapacityError("Another rank of the group has no room for the KV cache; its own error says more.")
        return agreed


def available_bytes(device: torch.device) -> int:
    """Memory that could be allocated now: the device's free memory, or what the operating system can still give."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_host_bytes()
