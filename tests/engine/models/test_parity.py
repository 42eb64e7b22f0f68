"""Every architecture computes what transformers computes, on one rank and on several, through the paged cache."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.model_config import Architecture, DType, ModelConfig
from engine.random_checkpoint import sized_config, write_random_checkpoint
from engine.rope_config import RopeConfig
from engine.tensor_parallel import TensorParallel
from tests.engine.models.paged_run import Case, load, paged_logits, run_rank
from tests.engine.rank_processes import run_ranks

LLAMA3 = RopeConfig(
    kind="llama3", theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
YARN = RopeConfig(kind="yarn", factor=4.0, attention_factor=1.2, original_max_position_embeddings=16)

MODELS: dict[str, ModelConfig] = {
    "llama": sized_config(Architecture.LLAMA),
    "llama-own-head-dim": sized_config(Architecture.LLAMA, head_dim=24),
    "llama3-rope": sized_config(Architecture.LLAMA, rope=LLAMA3, num_layers=3),
    "llama-linear-rope": sized_config(Architecture.LLAMA, rope=RopeConfig(kind="linear", factor=3.0)),
    "llama-dynamic-rope": sized_config(Architecture.LLAMA, rope=RopeConfig(kind="dynamic", factor=2.0)),
    "llama-yarn": sized_config(Architecture.LLAMA, rope=YARN),
    "llama-tied": sized_config(Architecture.LLAMA, tie_word_embeddings=True),
    "llama-biases": sized_config(Architecture.LLAMA, attention_bias=True, mlp_bias=True),
    "llama-one-kv-head-odd-vocabulary": sized_config(Architecture.LLAMA, num_kv_heads=1, vocab_size=301),
    "mistral-window": sized_config(Architecture.MISTRAL, head_dim=24, sliding_window=7),
    "qwen2": sized_config(Architecture.QWEN2),
    "qwen2-some-windows": replace(sized_config(Architecture.QWEN2, num_layers=3), sliding_windows=(None, 7, None)),
    "qwen3": sized_config(Architecture.QWEN3, head_dim=24, rope=RopeConfig(theta=1e6)),
    "qwen3-tied": sized_config(Architecture.QWEN3, head_dim=24, tie_word_embeddings=True, attention_bias=True),
    "mixtral": sized_config(Architecture.MIXTRAL),
    "mixtral-window": sized_config(Architecture.MIXTRAL, num_experts=8, sliding_window=7),
    "qwen3-moe": sized_config(Architecture.QWEN3_MOE, num_experts=8, num_experts_per_token=3),
    "qwen3-moe-some-dense": sized_config(Architecture.QWEN3_MOE, num_layers=3, num_dense_layers=1, sliding_window=7),
    "qwen3-moe-raw-scores": replace(sized_config(Architecture.QWEN3_MOE), norm_topk_prob=False),
}

# One model per architecture. Where experts are many, rounding sends some tokens to others (see the test below).
BFLOAT16 = ("llama", "mistral-window", "qwen2", "qwen3", "mixtral", "qwen3-moe")


def _error(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())


def _token_errors(ours: Tensor, reference: Tensor) -> Tensor:
    errors: Tensor = (ours - reference).norm(dim=-1) / reference.norm(dim=-1)
    return errors


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the named model's checkpoint, written at the first call."""
    root = tmp_path_factory.mktemp("checkpoints")

    def write(name: str) -> Path:
        if not (root / name).exists():
            write_random_checkpoint(root / name, MODELS[name], seed=1)
        return root / name

    return write


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny GEMMs are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def two_ranks(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], list[Tensor]]:
    """Logits of the named model by one rank of a group of two; all models run in one pair of processes."""
    output = tmp_path_factory.mktemp("logits")
    cases = [Case(name=name, path=checkpoint(name)) for name in MODELS]
    cases += [Case(name=f"{name}-bfloat16", path=checkpoint(name), dtype=DType.BFLOAT16) for name in BFLOAT16]
    rendezvous = f"file://{output / 'rendezvous'}"
    run_ranks(run_rank, 2, rendezvous, cases, output)
    return lambda name, rank: torch.load(output / f"{name}-{rank}.pt")


def _transformers_logits(path: Path, dtype: torch.dtype) -> list[Tensor]:
    """Each prompt in one forward pass, without a cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    with torch.inference_mode():
        return [model(tokens[None]).logits[0].float() for tokens in Case(name="", path=path).tokens]


@pytest.mark.parametrize("name", MODELS)
def test_float32_logits_equal_transformers(name: str, checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint(name)
    model, config = load(path, TensorParallel())
    ours = paged_logits(model, config, Case(name=name, path=path).tokens)
    for mine, reference in zip(ours, _transformers_logits(path, torch.float32), strict=True):
        assert _error(mine, reference) < 1e-5
        assert torch.equal(mine.argmax(-1), reference.argmax(-1))


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_equal_transformers(
    name: str, checkpoint: Callable[[str], Path], two_ranks: Callable[[str, int], list[Tensor]]
) -> None:
    references = _transformers_logits(checkpoint(name), torch.float32)
    for first, second, reference in zip(two_ranks(name, 0), two_ranks(name, 1), references, strict=True):
        assert torch.equal(first, second)
        assert _error(first, reference) < 1e-5
        assert torch.equal(first.argmax(-1), reference.argmax(-1))


@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_logits_equal_transformers(
    name: str, checkpoint: Callable[[str], Path], two_ranks: Callable[[str, int], list[Tensor]]
) -> None:
    path = checkpoint(name)
    model, config = load(path, TensorParallel(), DType.BFLOAT16)
    ours = paged_logits(model, config, Case(name=name, path=path).tokens)
    references = _transformers_logits(path, torch.bfloat16)
    ranks = two_ranks(f"{name}-bfloat16", 0), two_ranks(f"{name}-bfloat16", 1)
    for alone, first, second, reference in zip(ours, *ranks, references, strict=True):
        assert torch.equal(first, second)
        assert _error(alone, reference) < 2e-2
        assert _error(first, reference) < 2e-2


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_as_close_to_the_truth_as_transformers(name: str, checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint(name)
    model, config = load(path, TensorParallel(), DType.BFLOAT16)
    ours = paged_logits(model, config, Case(name=name, path=path).tokens)
    theirs = _transformers_logits(path, torch.bfloat16)
    truth = _transformers_logits(path, torch.float32)
    # Rounding sends a token with two nearly equal experts to either, here as in transformers: a few tokens may differ.
    share = 0.75 if MODELS[name].num_experts else 1.0
    for mine, other, exact in zip(ours, theirs, truth, strict=True):
        assert _token_errors(mine, other).quantile(share) < 3e-2
        assert _token_errors(mine, other).median() < 1.5e-2
        assert _token_errors(mine, exact).median() < 1.3 * _token_errors(other, exact).median()
        if not MODELS[name].num_experts:
            assert _error(mine, other) < 2e-2
