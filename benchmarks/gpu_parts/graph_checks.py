"""The rows `graphs` of the part `correctness`: padded steps replayed from CUDA graphs against steps launched as large
as they are, over many random mixes of decodes and chunks.

Each step is computed twice, from the same cache: launched, then padded. In between, what the first has written to the
cache is spoilt, and with it every slot that no sequence owns and whatever the padded steps hold between two of them:
what padding reads, or fails to write, shows. Compared are the hidden states of rows that draw, the keys and values
written, and the tokens drawn.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from gpu_parts.batch_mixes import KINDS, BatchMixes
from gpu_parts.budget import NO_TIME, Budget
from gpu_parts.graph_count import GraphCount
from gpu_parts.ledger import Ledger, Row
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Batch
from engine.config import DeviceKind, EngineConfig
from engine.gpu_model import use_gpu_kernels
from engine.kernels.reference import LARGEST_CACHED
from engine.kv_cache import KVCache
from engine.model_config import Architecture, ModelConfig
from engine.model_runner import ModelRunner
from engine.models import build_model
from engine.models.decoder import Decoder
from engine.number_format import NumberFormat
from engine.pipeline.capture import Captures
from engine.pipeline.pipeline import Pipeline
from engine.random_checkpoint import sized_config, write_random_checkpoint
from engine.tensor_parallel import TensorParallel
from engine.weights import load_weights

# Errors of the norm of hidden states, and of keys and values; the least share of equal tokens. Products of other sizes
# round otherwise.
BOUNDS = {
    NumberFormat.FLOAT32: (1e-4, 1e-4, 1.0),
    NumberFormat.BFLOAT16: (2e-2, 2e-2, 0.95),
    NumberFormat.FP8: (6e-2, 6e-2, 0.9),
}
# Some that steps are padded to: those of exactly so many tokens are full.
_BUCKET_SIZES = (2, 4, 8, 16, 32, 64, 128, 256, 384, 512)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSizes:
    """Of the model, the steps and their number. `head_dim` times eight heads are the hidden size."""

    num_layers: int = 2
    head_dim: int = 64
    num_rows: int = 40
    num_blocks: int = 120
    block_size: int = 64
    max_batch_tokens: int = 512
    num_steps: int = 100
    formats: Sequence[NumberFormat] = tuple(BOUNDS)
    architectures: Sequence[Architecture] = (Architecture.LLAMA, Architecture.MIXTRAL)


def check_graphs(
    ledger: Ledger, budget: Budget, folder: Path, device: torch.device, seed: int, sizes: GraphSizes | None = None
) -> None:
    """One row per architecture and number format."""
    sizes = sizes or GraphSizes()
    for architecture in sizes.architectures:
        for number_format in sizes.formats:
            name = f"{architecture.value} {number_format.value}"
            if not budget.has(3):
                ledger.skip("graphs", name, NO_TIME)
                continue
            try:
                row = _compared(architecture, folder, device, seed, number_format, sizes, budget)
            except Exception as error:  # the others may still be right
                row = Row(group="graphs", name=name, is_right=False, note=f"{type(error).__name__}: {error}"[:300])
            ledger.add(replace(row, name=name))


def _compared(
    architecture: Architecture,
    folder: Path,
    device: torch.device,
    seed: int,
    number_format: NumberFormat,
    sizes: GraphSizes,
    budget: Budget,
) -> Row:
    config = _config(architecture, folder, device, number_format, sizes)
    count = GraphCount()
    with count.counting(), torch.inference_mode():
        told: list[str] = []
        model = _model(config, device, told)
        cache = KVCache.allocate(config, sizes.num_blocks, device)
        runner = ModelRunner(
            config, model, Pipeline(model, config.model.hidden_size), cache, device, uses_gpu_kernels=True
        )
        if told:
            return Row(group="graphs", name="", is_right=False, note="; ".join(told))
        runner.pad_steps(Captures(device) if device.type == "cuda" else None)
        mixes = BatchMixes(
            seed,
            num_rows=sizes.num_rows,
            num_blocks=sizes.num_blocks,
            block_size=sizes.block_size,
            vocab_size=config.model.vocab_size,
            bucket_sizes=[size for size in _BUCKET_SIZES if size <= sizes.max_batch_tokens],
        )
        comparison = _Comparison(runner, model, cache)
        num_steps = 0
        for batch in mixes.batches(sizes.num_steps):
            if not budget.has(1):
                break
            comparison.step(batch, mixes.slots(batch))
            num_steps += 1
    mixes.kinds["full bucket"] = comparison.num_full
    absent = [kind for kind in KINDS if not mixes.kinds[kind]]
    hidden, written, equal = BOUNDS[number_format]
    errors = comparison.errors
    is_right = errors["hidden"] <= hidden and errors["cache"] <= written and comparison.equal_share >= equal
    is_replayed = device.type != "cuda" or count.num_replayed >= num_steps
    is_right &= is_replayed and comparison.num_padding > 0
    note = (
        f"{num_steps} steps, {comparison.num_padding} rows added; keys and values {errors['cache']:.1e}, "
        f"{100 * comparison.equal_share:.1f} % of tokens equal; {count.num_captured} graphs, {count.num_replayed} "
        "replays"
    )
    note += "" if is_replayed else "; NOT REPLAYED from graphs"
    note += f"; no step with {', '.join(absent)}" if absent else ""
    return Row(
        group="graphs", name="", value=errors["hidden"], unit="norm", is_right=is_right, note=note,
        details={"kinds": dict(mixes.kinds), **errors},
    )  # fmt: skip


class _Comparison:
    """Runs steps both ways; `errors` are the largest of all steps, infinite where anything is not a number."""

    def __init__(self, runner: ModelRunner, model: Decoder, cache: KVCache) -> None:
        self.errors = {"hidden": 0.0, "cache": 0.0}
        self._runner, self._model, self._cache = runner, model, cache
        self._padded = runner.padded
        self.num_padding = self.num_full = 0
        self._num_equal = self._num_drawn = 0
        for tensor in (*cache.keys, *cache.values):
            _comparable(tensor).fill_(_spoilt_element(tensor))

    @property
    def equal_share(self) -> float:
        """Of all tokens drawn."""
        return self._num_equal / max(1, self._num_drawn)

    def step(self, batch: Batch, slots: list[int]) -> None:
        """Launched, then padded, whose tokens and cache later steps go on from."""
        places = torch.tensor(slots, device=self._cache.keys[0].device)
        blocks, offsets = places // self._cache.block_size, places % self._cache.block_size
        self._runner.padded = None
        tokens, hidden_KE, _ = self._launched(batch)
        written = self._written(blocks, offsets)
        for tensor in (*self._cache.keys, *self._cache.values):
            _comparable(tensor)[blocks, :, offsets] = _spoilt_element(tensor)
        self._runner.padded = self._padded
        _spoil(self._padded)
        again, padded_KE, num_padding = self._launched(batch)
        self.num_padding += num_padding
        self.num_full += not num_padding and batch.num_tokens > 1
        self._note("cache", self._written(blocks, offsets), written)
        if hidden_KE is not None and padded_KE is not None:
            self._note("hidden", padded_KE, hidden_KE)
        self._num_equal += int((tokens == again).sum())
        self._num_drawn += len(tokens)

    def _launched(self, batch: Batch) -> tuple[NDArray[np.int32], Tensor | None, int]:
        """Tokens, the hidden states [K, E] that they were drawn from, and how many rows were added."""
        with _norm_inputs(self._model) as seen:
            output = self._runner.launch(batch).wait()
        return output.token_ids, seen[-1] if seen else None, output.num_padding_tokens

    def _written(self, blocks: Tensor, offsets: Tensor) -> Tensor:
        """Keys and values of all layers at some places."""
        tensors = (*self._cache.keys, *self._cache.values)
        return torch.stack([_comparable(tensor)[blocks, :, offsets].view(tensor.dtype).float() for tensor in tensors])

    def _note(self, name: str, given: Tensor, expected: Tensor) -> None:
        difference = (given.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
        error = float(difference)
        self.errors[name] = max(self.errors[name], math.inf if math.isnan(error) else error)


@contextmanager
def _norm_inputs(model: Decoder) -> Iterator[list[Tensor]]:
    """What the last norm is given while this lasts: the rows that draw."""
    seen: list[Tensor] = []
    handle = model.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    try:
        yield seen
    finally:
        handle.remove()


def _spoil(holder: object) -> None:
    """Every number of floating point that padded steps keep between two of them becomes NaN."""
    for value in vars(holder).values():
        if isinstance(value, Tensor) and value.is_floating_point():
            value.fill_(math.nan)
        elif "padded" in type(value).__module__ and hasattr(value, "__dict__"):
            _spoil(value)


def _comparable(tensor: Tensor) -> Tensor:
    """FP8 can be indexed and filled as bytes alone."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def _spoilt_element(tensor: Tensor) -> float | int:
    """The largest that a cache can hold: 448 in e4m3, as a byte."""
    return 0x7E if tensor.element_size() == 1 else LARGEST_CACHED


def _config(
    architecture: Architecture, folder: Path, device: torch.device, number_format: NumberFormat, sizes: GraphSizes
) -> EngineConfig:
    path = folder / f"graphs-{architecture.name}"
    if not path.exists():
        shape = sized_config(
            architecture,
            num_layers=sizes.num_layers,
            hidden_size=8 * sizes.head_dim,
            intermediate_size=12 * sizes.head_dim,
            num_heads=8,
            num_kv_heads=2,
            head_dim=sizes.head_dim,
            max_position_embeddings=512,
        )
        write_random_checkpoint(path, shape, seed=5)
    return EngineConfig(
        model=ModelConfig.from_checkpoint(path),
        checkpoint=path,
        dtype=number_format.dtype,
        product_format=number_format,
        device=DeviceKind(device.type),
        max_model_len=256,
        max_batch_tokens=sizes.max_batch_tokens,
        max_sequences=sizes.num_rows,
        block_size=sizes.block_size,
    )


def _model(config: EngineConfig, device: torch.device, told: list[str]) -> Decoder:
    """With its weights, computed by kernels; `told` why not."""
    alone = TensorParallel()
    model = build_model(config.model, alone, getattr(torch, config.dtype.value), device, in_fp8=config.in_fp8)
    load_weights(model, config, alone)
    use_gpu_kernels(model, config, device, told.append)
    return model
