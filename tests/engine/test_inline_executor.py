"""What an `InlineExecutor` passes on: what its rank tells, questions to the rank, and an emulation of FP8."""

from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError, EngineDeadError
from engine.inline_executor import InlineExecutor
from engine.model_config import Architecture, DType, ModelConfig
from engine.number_format import NumberFormat
from engine.random_checkpoint import sized_config, write_random_checkpoint
from engine.worker import Worker


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    write_random_checkpoint(tmp_path, sized_config(Architecture.LLAMA))
    return EngineConfig(
        model=ModelConfig.from_checkpoint(tmp_path),
        checkpoint=tmp_path,
        dtype=DType.FLOAT32,
        max_model_len=64,
        max_batch_tokens=16,
        max_sequences=4,
        num_blocks=8,
        num_threads=1,
    )


def test_what_the_rank_tells_is_heard_and_what_it_is_asked_it_answers(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    start = Worker.start

    def telling(worker: Worker, progress: object, tell: object) -> object:
        capacity = start(worker, progress, tell)  # type: ignore[arg-type]
        worker._tell("no step becomes a CUDA graph")
        return capacity

    monkeypatch.setattr(Worker, "start", telling)
    executor = InlineExecutor(config, tell=told.append)
    with pytest.raises(EngineDeadError, match="not started"):
        executor.ask(lambda worker: worker.config)
    executor.start()
    assert told[-1] == "no step becomes a CUDA graph"
    assert executor.ask(lambda worker: worker.runner.pipeline.sequential) is not None
    with pytest.raises(ZeroDivisionError):
        executor.ask(lambda worker: 1 // 0)
    executor.close()


def test_fp8_is_emulated_where_that_is_wanted(config: EngineConfig) -> None:
    wanted = replace(config, dtype=DType.BFLOAT16, product_format=NumberFormat.FP8)
    refusing = InlineExecutor(wanted)
    with pytest.raises(ConfigError, match="FP8"):
        refusing.start()
    refusing.close()
    executor = InlineExecutor(wanted, emulates_fp8=True)
    executor.start()
    assert executor.ask(lambda worker: worker.config.in_fp8)
    executor.close()
