"""The part `peers`: the same requests, all at once, through this engine and through others that this Python has.

Nothing is installed: an engine that is not importable is a row that says so. Each runs in a process of its own, one
after the other, so that none has another's memory or state of the device, behind the interface of `peer_engines` and
within the time of the part. Its row has the clocks that it ran at.
"""

import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from gpu_parts.budget import NO_TIME, Budget
from gpu_parts.ledger import Ledger, Row
from gpu_parts.power_log import PowerLog, described
from peer_engines.peer_engine import EngineSetup
from peer_engines.peer_process import PeerFailureError, PeerProcess

_BENCHMARKS = Path(__file__).resolve().parents[1]
_SECONDS_TO_BEGIN = 20.0
_MOST_RUNS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """An engine's module under `peer_engines`, and the package that it needs."""

    name: str
    module: str
    package: str
    options: tuple[tuple[str, object], ...] = ()


RIVALS = (
    Rival(name="nanoserve", module="peer_engines.nanoserve_engine", package="torch"),
    Rival(
        name="transformers continuous batching", module="peer_engines.transformers_engine", package="transformers",
        options=(("continuous", True),),
    ),
    Rival(name="nano-vllm", module="peer_engines.nano_vllm_engine", package="nanovllm"),
    Rival(name="vllm", module="peer_engines.vllm_engine", package="vllm", options=(("eager", False),)),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ContestSizes:
    """Requests of `num_input` and `num_output` tokens."""

    num_requests: int = 256
    num_input: int = 1024
    num_output: int = 128
    device: str = "cuda"
    dtype: str = "bfloat16"
    vocabulary: int = 128_256


def run_contest(
    ledger: Ledger,
    budget: Budget,
    checkpoint: Path,
    sizes: ContestSizes | None = None,
    rivals: Sequence[Rival] = RIVALS,
) -> None:
    """One row each: tokens in and out per second of the second of two runs, or of the first if time is short."""
    sizes = sizes or ContestSizes()
    power = PowerLog()
    generator = np.random.default_rng(0)
    requests = [
        (generator.integers(1, sizes.vocabulary, sizes.num_input).tolist(), sizes.num_output)
        for _ in range(sizes.num_requests)
    ]
    for rival in rivals:
        if importlib.util.find_spec(rival.package) is None:
            ledger.skip("peers", rival.name, f"{rival.package} is not installed")
        elif not budget.has(_SECONDS_TO_BEGIN):
            ledger.skip("peers", rival.name, NO_TIME)
        else:
            try:
                _run(ledger, budget, checkpoint, sizes, power, rival, requests)
            except (PeerFailureError, OSError) as error:
                ledger.skip("peers", rival.name, str(error)[:300])


def _run(
    ledger: Ledger,
    budget: Budget,
    checkpoint: Path,
    sizes: ContestSizes,
    power: PowerLog,
    rival: Rival,
    requests: list[tuple[list[int], int]],
) -> None:
    length = sizes.num_input + sizes.num_output
    setup = EngineSetup(
        checkpoint=checkpoint,
        converted=checkpoint,
        dtype=sizes.dtype,
        num_threads=4,
        cache_tokens=sizes.num_requests * (length + 32) + 1024,
        max_model_len=length,
        max_sequences=sizes.num_requests,
        options=dict(rival.options) | {"device": sizes.device},
    )
    values = asdict(replace(setup)) | {"checkpoint": str(setup.checkpoint), "converted": str(setup.converted)}
    with tempfile.TemporaryDirectory(prefix="nanoserve-peer-") as name:
        process = PeerProcess(
            [sys.executable, "-m", rival.module],
            folder=Path(name),
            variables={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(_BENCHMARKS), str(_BENCHMARKS.parent)]),
                "HF_HUB_OFFLINE": "1",
            },
            log=Path(name) / "log",
        )
        seconds: list[float] = []
        readings: dict[str, float] = {}
        try:
            version = process.ask("load", values, max(1.0, budget.left))["version"]
            while not seconds or (len(seconds) < _MOST_RUNS and budget.has(1.5 * seconds[0])):
                with power.sampled() as readings:  # of the run that counts
                    seconds.append(float(process.ask("run", requests, max(1.0, budget.left))["seconds"]))
        finally:
            process.close()
    num_tokens = sizes.num_requests * length
    note = f"{version}; {sizes.num_requests} requests of {sizes.num_input}/{sizes.num_output}, run {len(seconds)}"
    note = "; ".join(part for part in (note, described(readings)) if part)
    ledger.add(
        Row(
            group="peers", name=rival.name, value=num_tokens / seconds[-1], unit="tokens/s", note=note,
            details={"seconds": seconds, **readings},
        )
    )  # fmt: skip
