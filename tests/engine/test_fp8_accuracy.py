"""What FP8 costs in accuracy: logits of random models, and the perplexity of the demo model on text of its own kind.

The figures are those of the arithmetic, which is a GPU's: products of e4m3 values with a scale per row, summed in
float32, and keys and values read back from e4m3.
"""

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from engine.model_config import Architecture, DType
from engine.number_format import NumberFormat
from engine.random_checkpoint import sized_config, write_random_checkpoint
from tests.engine.fp8_model import load, prompt_logits

FP8, BFLOAT16, FLOAT32 = NumberFormat.FP8, NumberFormat.BFLOAT16, NumberFormat.FLOAT32
DEMO = Path(__file__).parents[2] / "deploy" / "demo_model"
TOKENS = torch.randint(0, 512, (48,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tests this small are slower on several threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "architecture", [Architecture.LLAMA, Architecture.QWEN2, Architecture.QWEN3, Architecture.MIXTRAL]
)
def test_logits_of_random_models(architecture: Architecture, tmp_path: Path) -> None:
    # All experts for every token: rounding shall not send one elsewhere, which is another kind of error.
    model = sized_config(
        architecture, hidden_size=256, intermediate_size=512, num_layers=4, num_experts=4, num_experts_per_token=4
    )
    write_random_checkpoint(tmp_path, model)
    exact = prompt_logits(*load(tmp_path, FLOAT32), TOKENS, 16)
    errors = {}
    for name, products, cache in (
        ("bfloat16", BFLOAT16, BFLOAT16),
        ("FP8 cache", BFLOAT16, FP8),
        ("FP8 products", FP8, BFLOAT16),
        ("FP8", FP8, None),
    ):
        errors[name] = _relative_error(prompt_logits(*load(tmp_path, products, cache), TOKENS, 16), exact)
    print(f"{architecture}:", {name: f"{100 * error:.2f} %" for name, error in errors.items()})
    assert errors["bfloat16"] < 0.02
    assert 1.5 * errors["bfloat16"] < errors["FP8 cache"] < 0.05
    assert 1.5 * errors["FP8 cache"] < errors["FP8 products"] < 0.12
    assert errors["FP8"] < 1.2 * errors["FP8 products"]


def test_activations_of_any_dtype(tmp_path: Path) -> None:
    """The error is that of FP8, not that of bfloat16 between the products."""
    write_random_checkpoint(tmp_path, sized_config(Architecture.LLAMA, hidden_size=256, intermediate_size=512))
    exact = prompt_logits(*load(tmp_path, FLOAT32), TOKENS, 16)
    wide, narrow = (
        _relative_error(prompt_logits(*load(tmp_path, FP8, dtype=dtype), TOKENS, 16), exact)
        for dtype in (DType.FLOAT32, DType.BFLOAT16)
    )
    assert 0.01 < wide < 1.1 * narrow < 0.15


@pytest.mark.slow
def test_perplexity_of_the_demo_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer

    monkeypatch.syspath_prepend(str(DEMO))
    from corpus import documents
    from corpus.chat import TURN_START

    path = DEMO / "model"
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    ids: list[int] = []
    # Of no seed that it was trained on, and without the questions of conversations, which it was not taught to ask.
    plain = (text for text in documents(20_011) if TURN_START not in text)
    for text in islice(plain, 200):
        ids += tokenizer.encode(text).ids
    rows = torch.tensor(ids[: 24 * 256]).view(24, 256)
    perplexities = {}
    for name, products, cache in (
        ("float32", FLOAT32, None),
        ("bfloat16", BFLOAT16, None),
        ("FP8 cache", BFLOAT16, FP8),
        ("FP8 products", FP8, BFLOAT16),
        ("FP8", FP8, None),
    ):
        model, config = load(path, products, cache, dtype=products.dtype, max_model_len=256)
        losses = [cross_entropy(prompt_logits(model, config, row, 64)[:-1], row[1:]) for row in rows]
        perplexities[name] = math.exp(torch.stack(losses).mean().item())
    print({name: f"{value:.4f}" for name, value in perplexities.items()})
    assert perplexities["bfloat16"] < 8  # it does know this kind of text
    assert perplexities["FP8"] < 1.03 * perplexities["bfloat16"]
    assert perplexities["FP8 cache"] < 1.01 * perplexities["bfloat16"]
