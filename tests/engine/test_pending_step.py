"""The clock of a step on a GPU: it runs from the device's first work to its last, whatever the host does before."""

from collections.abc import Iterator
from typing import Any

import pytest

from engine import input_preparation
from engine.model_config import Architecture
from engine.model_runner import ModelRunner
from engine.pipeline.fused_run import FusedRun
from engine.staging import stage
from engine.step_clock import StepClock
from tests.engine.batch_script import BatchScript
from tests.engine.gpu_case import GREEDY, NUM_BLOCKS, PROMPTS, config_of, runner_of
from tests.engine.pipeline.deferred_cuda import DEVICE as CUDA
from tests.engine.pipeline.deferred_cuda import DeferredCuda, DeferredEvent, deferred_cuda


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[DeferredCuda]:
    with deferred_cuda() as cuda:
        record = DeferredEvent.record
        monkeypatch.setattr(DeferredEvent, "record", lambda event, stream=None: record(event, stream or cuda.current))
        monkeypatch.setattr(DeferredEvent, "synchronize", lambda event: cuda.main.synchronize(), raising=False)
        yield cuda


def test_a_step_has_its_own_work_and_none_of_the_step_before(cuda: DeferredCuda) -> None:
    """Made while the device still computes the step before; a work is a millisecond."""
    first = StepClock(CUDA)
    cuda.queue(lambda: None)
    second = StepClock(CUDA)
    for _ in range(4):  # the rest of the first step is launched while the host prepares the second
        cuda.queue(lambda: None)
    first.stop()
    second.start()
    for _ in range(2):
        cuda.queue(lambda: None)
    second.stop()
    assert (first.seconds(), second.seconds()) == (5.0 / 1e3, 2.0 / 1e3)


def test_a_clock_that_nobody_starts_anew_runs_from_its_making(cuda: DeferredCuda) -> None:
    clock = StepClock(CUDA)
    cuda.queue(lambda: None)
    clock.stop()
    assert clock.seconds() == 1e-3


@pytest.fixture
def runner() -> ModelRunner:
    return runner_of(config_of(Architecture.LLAMA), kernels=False)


@pytest.mark.parametrize("padded", [False, True])
def test_the_clock_starts_behind_the_host_and_before_the_device(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, padded: bool
) -> None:
    """New steps, steps of decodes and steps that repeat: first all arrays, then the start, then whatever the device
    gets.
    """
    log: list[str] = []

    def noting(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            log.append(name)
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(StepClock, "start", lambda clock: log.append("start"))
    monkeypatch.setattr(StepClock, "stop", noting("stop", StepClock.stop))
    for name in ("_step_arrays", "_update_arrays"):
        monkeypatch.setattr(input_preparation, name, noting("host", getattr(input_preparation, name)))
    monkeypatch.setattr(input_preparation, "stage", noting("device", stage))
    monkeypatch.setattr(runner.pipeline, "run", noting("device", runner.pipeline.run))
    if padded:
        runner.pad_steps(None)
        monkeypatch.setattr(FusedRun, "__call__", noting("device", lambda run, hidden_TE, step: hidden_TE))
    script = BatchScript(NUM_BLOCKS, 16)
    script.admit(0, PROMPTS[3], GREEDY)
    for batch in (script.step(prefills=[(0, 3)]), script.step(decodes=[0]), script.step(decodes=[0])):
        log.clear()
        runner.launch(batch).wait()
        assert log.count("start") == log.count("stop") == 1 and log[-1] == "stop"
        host = [index for index, name in enumerate(log) if name == "host"]
        device = [index for index, name in enumerate(log) if name == "device"]
        assert max(host, default=-1) < log.index("start") < min(device)
