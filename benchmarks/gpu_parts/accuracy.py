"""The part `accuracy`: what FP8 costs, on the device, with its kernels: perplexity of the demo model on text of its own
kind, and the error of logits of a few layers of Llama-3-8B's sizes with random weights.

Perplexity is compared with bfloat16's on the same device, logits with float32 in plain torch. Prompts go through the
paged cache in chunks, so that later ones read what earlier ones have stored in its number format.
"""

import math
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from gpu_parts.budget import NO_TIME, Budget
from gpu_parts.large_checkpoint import write_large_checkpoint
from gpu_parts.ledger import Ledger, Row
from torch import Tensor
from torch.nn.functional import cross_entropy

from engine.config import DeviceKind, EngineConfig
from engine.gpu_model import use_gpu_kernels
from engine.kv_cache import KVCache
from engine.model_config import Architecture, DType, ModelConfig
from engine.models import build_model
from engine.models.decoder import Decoder
from engine.number_format import NumberFormat
from engine.random_checkpoint import sized_config
from engine.step_inputs import StepInputs
from engine.tensor_parallel import TensorParallel
from engine.weights import load_weights

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo_model"
_CORPUS_SEED = 20_011  # none that the demo model was trained on


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Number formats of products and cache; the largest error of logits, and of perplexity relative to bfloat16's."""

    name: str
    products: NumberFormat
    cache: NumberFormat
    most_error: float
    most_perplexity: float


RECIPES = (
    Recipe(
        name="bfloat16", products=NumberFormat.BFLOAT16, cache=NumberFormat.BFLOAT16,
        most_error=0.03, most_perplexity=1.0,
    ),
    Recipe(
        name="FP8 weights", products=NumberFormat.FP8, cache=NumberFormat.BFLOAT16,
        most_error=0.12, most_perplexity=1.03,
    ),
    Recipe(
        name="FP8 weights and cache", products=NumberFormat.FP8, cache=NumberFormat.FP8,
        most_error=0.15, most_perplexity=1.03,
    ),
)  # fmt: skip
# Llama-3-8B's but for the number of layers and the vocabulary, which takes long to write.
RANDOM_SHAPE = sized_config(
    Architecture.LLAMA,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=4,
    num_heads=32,
    num_kv_heads=8,
    vocab_size=8192,
    max_position_embeddings=8192,
    dtype=DType.BFLOAT16,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracySizes:
    """`num_texts` prompts of `text_length` tokens of the demo model's own kind of text; the random layers and their
    prompt, which comes in chunks of `chunk`.
    """

    num_texts: int = 24
    text_length: int = 256
    chunk: int = 64
    num_tokens: int = 512
    random_shape: ModelConfig = RANDOM_SHAPE


def measure_accuracy(
    ledger: Ledger, budget: Budget, device: torch.device, folder: Path, sizes: AccuracySizes | None = None
) -> None:
    """A row per recipe, of perplexity and of logits; each is wrong beyond its bound."""
    sizes = sizes or AccuracySizes()
    for group, stage in (("perplexity", _perplexities), ("logits", _logits)):
        if not budget.has(4):
            ledger.skip(group, "all", NO_TIME)
            continue
        try:
            stage(ledger, budget, device, folder, sizes)
        except ImportError as error:
            ledger.skip(group, "all", f"left out: {error}")
        except Exception as error:  # the other stage may still be right
            ledger.add(Row(group=group, name="all", is_right=False, note=f"{type(error).__name__}: {error}"[:300]))


def _perplexities(ledger: Ledger, budget: Budget, device: torch.device, folder: Path, sizes: AccuracySizes) -> None:
    rows = demo_tokens(sizes.num_texts, sizes.text_length)
    reference: float | None = None
    for recipe in RECIPES:
        if not budget.has(2):
            ledger.skip("perplexity", f"demo model, {recipe.name}", NO_TIME)
            continue
        told: list[str] = []
        model, config = _loaded(DEMO / "model", recipe, device, sizes.text_length, told)
        losses = [
            cross_entropy(prompt_logits(model, config, device, row, sizes.chunk)[:-1].float(), row[1:].to(device))
            for row in rows
        ]
        perplexity = math.exp(torch.stack(losses).mean().item())
        reference = reference or perplexity
        ratio = perplexity / reference
        note = f"{ratio:.4f} x bfloat16's, at most {recipe.most_perplexity}; {rows.numel():,} tokens"
        is_right = ratio <= recipe.most_perplexity and perplexity < config.model.vocab_size / 10 and not told
        ledger.add(
            Row(
                group="perplexity", name=f"demo model, {recipe.name}", value=perplexity, is_right=is_right,
                note="; ".join([note, *told]), details={"relative_to_bfloat16": ratio},
            )
        )  # fmt: skip


def _logits(ledger: Ledger, budget: Budget, device: torch.device, folder: Path, sizes: AccuracySizes) -> None:
    path = folder / "random-layers"
    write_large_checkpoint(path, sizes.random_shape)
    tokens = torch.randint(
        sizes.random_shape.vocab_size, (sizes.num_tokens,), generator=torch.Generator().manual_seed(1)
    )  # fmt: skip
    exact = Recipe(
        name="float32", products=NumberFormat.FLOAT32, cache=NumberFormat.FLOAT32, most_error=0.0, most_perplexity=1.0
    )
    model, config = _loaded(path, exact, device, sizes.num_tokens, None)
    expected = prompt_logits(model, config, device, tokens, sizes.chunk).double()
    del model
    for recipe in RECIPES:
        name = f"{sizes.random_shape.num_layers} layers of {sizes.random_shape.hidden_size}, {recipe.name}"
        if not budget.has(2):
            ledger.skip("logits", name, NO_TIME)
            continue
        told: list[str] = []
        model, config = _loaded(path, recipe, device, sizes.num_tokens, told)
        found = prompt_logits(model, config, device, tokens, sizes.chunk).double()
        del model
        error = float((found - expected).norm() / expected.norm())
        same = float((found.argmax(-1) == expected.argmax(-1)).double().mean())
        note = f"at most {recipe.most_error}; {100 * same:.1f} % of the best tokens the same"
        ledger.add(
            Row(
                group="logits", name=name, value=error, unit="norm", is_right=error <= recipe.most_error and not told,
                note="; ".join([note, *told]), details={"same_best": same},
            )
        )  # fmt: skip


def demo_tokens(num_texts: int, length: int) -> Tensor:
    """[texts, length]: text that the demo model was not trained on, without conversations; raises `ImportError` where
    the package `tokenizers` is missing.
    """
    from tokenizers import Tokenizer

    sys.path.insert(0, str(DEMO))
    try:
        from corpus import documents
        from corpus.chat import TURN_START
    finally:
        sys.path.remove(str(DEMO))
    tokenizer = Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json"))
    ids: list[int] = []
    for text in (text for text in documents(_CORPUS_SEED) if TURN_START not in text):
        ids += tokenizer.encode(text).ids
        if len(ids) >= num_texts * length:
            break
    return torch.tensor(list(islice(ids, num_texts * length))).view(num_texts, length)


def prompt_logits(model: Decoder, config: EngineConfig, device: torch.device, tokens: Tensor, chunk: int) -> Tensor:
    """Logits [T, vocabulary] of a prompt whose chunks read what those before them have cached."""
    num_blocks = config.max_blocks_per_sequence
    cache = KVCache.allocate(config, num_blocks, device)
    tables = torch.arange(num_blocks, device=device)[None]
    logits = []
    with torch.inference_mode():
        for start in range(0, len(tokens), chunk):
            part = tokens[start : start + chunk].to(device)
            positions = torch.arange(start, start + len(part), device=device)
            step = StepInputs(
                tokens=part,
                positions=positions,
                slots=positions,
                decode_block_tables=tables[:0],
                decode_lengths=positions[:0],
                prefill_block_tables=tables,
                num_decodes=0,
                max_decode_length=0,
                prefill_chunk_sizes=(len(part),),
                prefill_context_lengths=(start + len(part),),
                kv_cache=cache,
                prefill_starts=torch.tensor([0, len(part)], device=device),
                prefill_lengths=torch.tensor([start + len(part)], device=device),
            )
            logits.append(model.logits(model(step)))
    return torch.cat(logits)


def _loaded(
    path: Path, recipe: Recipe, device: torch.device, length: int, told: list[str] | None
) -> tuple[Decoder, EngineConfig]:
    """A model with its weights, computed on a GPU by kernels, which tell `told` where they cannot, or, where that is
    None, by plain torch.
    """
    model_config = ModelConfig.from_checkpoint(path)
    config = EngineConfig(
        model=model_config,
        checkpoint=path,
        dtype=recipe.products.dtype,
        device=DeviceKind(device.type),
        max_model_len=min(model_config.max_position_embeddings, length),
        product_format=recipe.products,
        kv_cache_format=recipe.cache,
    )
    alone = TensorParallel()
    model = build_model(config.model, alone, getattr(torch, config.dtype.value), device, in_fp8=config.in_fp8)
    load_weights(model, config, alone)
    if device.type == "cuda" and told is not None:
        use_gpu_kernels(model, config, device, told.append)
    return model, config
