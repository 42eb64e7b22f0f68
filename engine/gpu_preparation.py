"""`GpuPreparation`: what a rank whose layers are computed by kernels does once, between its start and its first step.

Its steps become CUDA graphs, and the operations in them are timed, as a graph is one launch that does not tell where
its time goes. Steps can do without either: what fails is told, and is then so on every rank of the group.
"""

import gc
from collections.abc import Callable

import torch

from engine.config import EngineConfig
from engine.device_probe import DeviceProbe
from engine.errors import first_line
from engine.kv_cache import KVCache
from engine.model_runner import ModelRunner
from engine.models.decoder import Decoder
from engine.pipeline.agreed_captures import AgreedCaptures
from engine.pipeline.rank_agreement import RankAgreement
from engine.pipeline.timer import GraphTimer
from engine.tensor_parallel import TensorParallel


class GpuPreparation:
    """Of one rank's runner; all ranks call every method together. `tell` is for people."""

    def __init__(
        self,
        config: EngineConfig,
        runner: ModelRunner,
        tensor_parallel: TensorParallel,
        tell: Callable[[str], None],
    ) -> None:
        self._config = config
        self._runner = runner
        self._tensor_parallel = tensor_parallel
        self._ranks = RankAgreement(tensor_parallel, runner.device)
        self._tell = tell

    def prepare(self, model: Decoder, cache: KVCache) -> None:
        """All of it, of the runner's model and cache."""
        self.capture_steps()
        self.time_operations(model, cache)

    def capture_steps(self) -> None:
        """Make steps CUDA graphs; a model that cannot become one, or has no memory left for them, runs without.

        So on every rank, where it is so on one of them. A rank that has no memory to begin with cannot serve: it must
        not go on, as the others wait for it in their first capture.
        """
        try:
            self._runner.pad_steps(AgreedCaptures(self._runner.device, self._tensor_parallel))
        except torch.OutOfMemoryError:  # before any capture, which makes `CaptureMemoryError` of it: nobody else knows
            raise
        except RuntimeError as error:  # torch's own of captures are, and `CaptureError`
            self._tell(f"no step becomes a CUDA graph. {first_line(error)}")

    def time_operations(self, model: Decoder, cache: KVCache) -> None:
        """Measure what the time of steps is shared out by; where it cannot be, it is told as a whole."""
        padded = self._runner.padded
        if padded is None:
            return
        probe = DeviceProbe(
            self._config,
            model,
            self._runner.pipeline,
            cache,
            GraphTimer(self._runner.device),
            most_rows=padded.most_rows,
            gather=padded.gather,
        )
        refusal = ""
        try:
            probe.measure_alone()
        except Exception as error:  # whatever it is: steps can do without, and the other ranks wait
            refusal = first_line(error)
        (is_measured,) = self._ranks.smallest([not refusal])
        if is_measured:
            probe.measure_together()
            self._runner.device_times = probe.times()
        else:
            self._tell(f"nobody tells where the time of steps goes. {refusal or 'Another rank could not measure it.'}")
        del probe
        free_device_memory()


def free_device_memory() -> None:
    """For the next engine of this process: operations and the functions that compute them refer to each other, and what
    torch keeps for later is not counted as free.
    """
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
