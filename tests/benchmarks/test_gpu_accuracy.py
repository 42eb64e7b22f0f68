"""The parts that compare results: the engine with the CPU's, padded steps with launched ones, FP8 with bfloat16. On a
CPU both sides are the CPU's; that a difference is found is tested by making one.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_parts.accuracy
import gpu_parts.correctness
import pytest
import torch
from gpu_parts.accuracy import AccuracySizes, Recipe, measure_accuracy
from gpu_parts.batch_mixes import KINDS, BatchMixes
from gpu_parts.budget import NO_TIME, Budget
from gpu_parts.correctness import Answer, Crowd, check_engine
from gpu_parts.graph_checks import GraphSizes, check_graphs

from engine.batch import Batch
from engine.config import DeviceKind
from engine.model_config import Architecture, ModelConfig
from engine.model_runner import ModelRunner
from engine.number_format import NumberFormat
from engine.pending_step import PendingStep
from engine.random_checkpoint import sized_config
from tests.benchmarks.gpu_fakes import quiet_ledger

CPU = torch.device("cpu")
LLAMA = (Architecture.LLAMA,)
SMALL_CROWD = Crowd(
    lengths=(1, 60, 125), num_shared=50, num_outputs=4, num_short=33, num_long=4, num_blocks=7, max_model_len=192
)
SMALL_GRAPHS = GraphSizes(
    num_layers=1, head_dim=16, num_rows=3, num_blocks=40, block_size=16, max_batch_tokens=16, num_steps=3,
    formats=(NumberFormat.FLOAT32,), architectures=LLAMA,
)  # fmt: skip


@pytest.mark.slow
def test_the_engine_is_compared_with_itself(tmp_path: Path) -> None:
    ledger = quiet_ledger(tmp_path, "correctness")
    formats = (NumberFormat.FLOAT32, NumberFormat.BFLOAT16)
    check_engine(ledger, Budget(100.0), tmp_path, DeviceKind.CPU, LLAMA, SMALL_CROWD, formats)
    exact, close = ledger.rows
    assert exact.is_right and exact.note.startswith("6 of 6"), exact.note
    assert close.is_right and close.value is not None and close.value < 0.03, close.note
    assert "preemptions" in close.note and close.details["greedy_equal"] > 0.9
    roomy = replace(SMALL_CROWD, num_blocks=100)
    check_engine(ledger, Budget(100.0), tmp_path, DeviceKind.CPU, LLAMA, roomy, formats[:1])
    assert ledger.rows[-1].is_right is False and "NOT EXERCISED: no preemption" in ledger.rows[-1].note
    check_engine(ledger, Budget(0.0), tmp_path, DeviceKind.CPU, LLAMA, formats=formats[:1])
    assert ledger.rows[-1].note == NO_TIME
    if not torch.cuda.is_available():
        check_engine(ledger, Budget(100.0), tmp_path, DeviceKind.CUDA, (Architecture.QWEN3,), formats=formats[:1])
        assert ledger.rows[-1].is_right is False and ledger.rows[-1].note


@pytest.mark.slow
def test_other_tokens_and_other_logits_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_parts.correctness._continued

    def wrong(*arguments: Any) -> list[Answer]:
        answers = right(*arguments)
        return [replace(answer, tokens=tuple(token + 1 for token in answer.tokens)) for answer in answers]

    monkeypatch.setattr(gpu_parts.correctness, "_continued", wrong)
    ledger = quiet_ledger(tmp_path, "correctness")
    formats = (NumberFormat.BFLOAT16,)
    check_engine(ledger, Budget(100.0), tmp_path, DeviceKind.CPU, LLAMA, SMALL_CROWD, formats)
    assert ledger.rows[-1].is_right is False and ledger.rows[-1].details["greedy_equal"] == 0
    monkeypatch.setattr(gpu_parts.correctness, "_continued", right)
    monkeypatch.setitem(gpu_parts.correctness.BOUNDS, NumberFormat.BFLOAT16, (0.9, 0.8, 1e-9))
    check_engine(ledger, Budget(100.0), tmp_path, DeviceKind.CPU, LLAMA, SMALL_CROWD, formats)
    assert ledger.rows[-1].is_right is False


def test_random_steps_are_of_every_kind_and_lose_no_block() -> None:
    mixes = BatchMixes(3, num_rows=8, num_blocks=60, block_size=16, vocab_size=300, bucket_sizes=[2, 4, 8, 16, 32, 64])
    sizes: Counter[int] = Counter()
    owners: dict[tuple[int, int], int] = {}
    for batch in mixes.batches(200):
        sizes[batch.num_tokens] += 1
        slots = mixes.slots(batch)
        assert len(set(slots)) == len(slots) == batch.num_tokens <= 64
        assert all(batch.counts[: batch.num_decodes] == 1)
        for row, index, block in batch.block_updates.tolist():
            owners[row, index] = block
        for row, start, count in zip(batch.rows.tolist(), batch.starts.tolist(), batch.counts.tolist(), strict=True):
            places = [owners[row, place // 16] * 16 + place % 16 for place in range(start, start + count)]
            assert places == slots[: len(places)]
            slots = slots[len(places) :]
    assert all(mixes.kinds[kind] for kind in KINDS if kind != "full bucket")
    assert sizes[1] and sum(sizes[size] for size in (16, 32, 64)) > 5 and len(sizes) > 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy
def test_padded_steps_are_compared_and_a_wrong_one_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = quiet_ledger(tmp_path, "correctness")
    check_graphs(ledger, Budget(100.0), tmp_path, CPU, 2, SMALL_GRAPHS)
    (row,) = ledger.rows
    assert row.is_right and row.value is not None and row.value < 1e-4, row.note
    assert "3 steps" in row.note and "100.0 % of tokens equal" in row.note
    launch = ModelRunner.launch

    def spoiling(runner: ModelRunner, batch: Batch) -> PendingStep:
        pending = launch(runner, batch)
        if runner.padded is not None:
            runner._kv_cache.values[-1].mul_(1.01)
        return pending

    monkeypatch.setattr(ModelRunner, "launch", spoiling)
    check_graphs(ledger, Budget(100.0), tmp_path, CPU, 2, replace(SMALL_GRAPHS, num_steps=1))
    assert ledger.rows[-1].is_right is False, "other values in the cache are seen"
    check_graphs(ledger, Budget(0.0), tmp_path, CPU, 2, SMALL_GRAPHS)
    assert ledger.rows[-1].note == NO_TIME


@pytest.mark.slow
def test_what_fp8_costs_is_measured_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = sized_config(
        Architecture.LLAMA, hidden_size=256, intermediate_size=512, num_layers=2, vocab_size=300, num_heads=8
    )  # fmt: skip
    sizes = AccuracySizes(num_texts=2, text_length=96, chunk=32, num_tokens=40, random_shape=shape)
    ledger = quiet_ledger(tmp_path, "accuracy")
    measure_accuracy(ledger, Budget(100.0), CPU, tmp_path, sizes)
    rows = {(row.group, row.name): row for row in ledger.rows}
    assert len(rows) == 6 and all(row.is_right for row in rows.values()), [row.note for row in ledger.rows]
    perplexities = [row.value for row in ledger.rows if row.group == "perplexity"]
    assert all(value is not None and 1 < value < 10 for value in perplexities)
    errors = [row.value or 0.0 for row in ledger.rows if row.group == "logits"]
    assert errors[0] > 0 and errors == sorted(errors), "every step away from float32 costs"
    strict = tuple(replace(recipe, most_error=1e-6, most_perplexity=0.5) for recipe in gpu_parts.accuracy.RECIPES)
    monkeypatch.setattr(gpu_parts.accuracy, "RECIPES", strict[1:2])
    ledger = quiet_ledger(tmp_path, "accuracy")
    measure_accuracy(ledger, Budget(100.0), CPU, tmp_path, replace(sizes, num_texts=1))
    assert [row.is_right for row in ledger.rows] == [False, False]


def test_a_stage_of_accuracy_that_fails_leaves_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(num_texts: int, length: int) -> torch.Tensor:
        raise ImportError("No module named 'tokenizers'")

    def fail(*arguments: Any) -> Any:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(gpu_parts.accuracy, "demo_tokens", absent)
    monkeypatch.setattr(gpu_parts.accuracy, "write_large_checkpoint", fail)
    ledger = quiet_ledger(tmp_path, "accuracy")
    measure_accuracy(ledger, Budget(100.0), CPU, tmp_path)
    perplexity, logits = ledger.rows
    assert perplexity.is_right is None and "tokenizers" in perplexity.note
    assert logits.is_right is False and "no kernel image" in logits.note
    assert isinstance(AccuracySizes().random_shape, ModelConfig) and isinstance(gpu_parts.accuracy.RECIPES[0], Recipe)
