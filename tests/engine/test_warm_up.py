"""What a rank runs before it serves: every kernel that a request may ask for, at sizes that tell what steps take."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

from engine.batch import Batch
from engine.model_config import Architecture
from engine.request import SamplingParams
from engine.warm_up import WAYS_OF_SAMPLING, warm_up_batches
from tests.engine.batch_script import BatchScript
from tests.engine.gpu_case import NUM_BLOCKS, config_of, runner_of

pytest.importorskip("triton")
from engine.kernels.gpu import sampling, sampling_filter
from engine.kernels.gpu.planned_draw import draw_planned

Launched = set[tuple[str, tuple[tuple[str, object], ...]]]


class _Noting:
    """A kernel that notes which of its specialisations are launched: switches, and the format of the logits."""

    def __init__(self, name: str, kernel: Any, launched: Launched) -> None:
        self._name, self._kernel, self._launched = name, kernel, launched

    def __getitem__(self, grid: object) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            switches = {name: value for name, value in options.items() if name.isupper()}
            switches["dtype"] = arguments[0].dtype
            self._launched.add((self._name, tuple(sorted(switches.items()))))
            self._kernel[grid](*arguments, **options)

        return launch


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launched]:
    noted: Launched = set()
    for module, name in ((sampling, "draw_kernel"), (sampling, "merge_kernel"), (sampling_filter, "threshold_kernel")):
        monkeypatch.setattr(module, name, _Noting(name, getattr(module, name), noted))
    yield noted


def test_no_way_of_sampling_is_met_for_the_first_time_in_service(launched: Launched) -> None:
    config = config_of(Architecture.LLAMA)
    runner = runner_of(config, kernels=False)
    runner._model.lm_head.draw = draw_planned
    sections: set[str] = set()
    for batch in warm_up_batches(config, NUM_BLOCKS, is_gpu=True):
        if batch.num_decodes > 1:
            continue  # more rows run no other kernels, and the interpreter a row after the other
        pending = runner.launch(batch)
        assert pending._plan is not None
        sections |= {name.split("_")[0] for name in pending._plan.arrays}
        pending.wait()
    assert sections == {"plain", "filtered", "penalised", "bias", "banned", "logprobs"}
    warm = set(launched)
    assert len(warm) == 6, "three of draw, the thresholds of all filters and of min_p, merge"
    launched.clear()
    script = BatchScript(NUM_BLOCKS, config.block_size)
    for temperature, top_k, top_p, min_p in product((0.0, 0.7), (0, 4), (1.0, 0.5), (0.0, 0.2)):
        way = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=3)
        script.admit(0, [5], way)
        runner.launch(script.step(prefills=[(0, 1)])).wait()
    assert launched <= warm


def test_all_rows_and_few_meet_every_way_of_sampling() -> None:
    config = config_of(Architecture.LLAMA)
    batches = list(warm_up_batches(config, NUM_BLOCKS, is_gpu=True))
    first, decodes = batches[0], batches[1:]
    assert (first.num_tokens, first.num_decodes) == (config.max_batch_tokens, 0)
    assert {batch.num_decodes for batch in decodes} == {config.max_sequences, 2, 1}

    def ways(batch: Batch) -> set[SamplingParams]:
        return {admission.sampling for admission in batch.admissions}

    for size in (config.max_sequences, 2, 1):
        alone = [ways(batch) for batch in decodes if batch.num_decodes == size]
        assert all({way} in alone for way in WAYS_OF_SAMPLING)
    for way in WAYS_OF_SAMPLING:
        way.validate(config.model.vocab_size)


def test_blocks_go_round_where_the_cache_is_small() -> None:
    config = config_of(Architecture.LLAMA)
    for batch in warm_up_batches(config, 2, is_gpu=True):
        assert set(batch.block_updates[:, 2].tolist()) <= {0, 1}
        assert len(batch.block_updates) == sum(-(-count // config.block_size) for count in batch.counts.tolist())


def test_a_cpu_runs_two_tiny_steps() -> None:
    first, second = warm_up_batches(config_of(Architecture.LLAMA), NUM_BLOCKS, is_gpu=False)
    assert (first.num_tokens, second.num_tokens, second.num_decodes) == (8, 1, 1)
