"""Runs the same random step through the plain model and through a pipeline; imported by tests and by their ranks."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from engine.config import EngineConfig
from engine.kv_cache import KVCache
from engine.model_config import Architecture, DType, ModelConfig
from engine.models import build_model
from engine.models.decoder import Decoder
from engine.pipeline.graph import OperationGraph
from engine.pipeline.host_lanes import HostLanes
from engine.pipeline.lanes import Lanes
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.schedule import Schedule
from engine.pipeline.stopwatch import Stopwatch
from engine.random_checkpoint import sized_config, write_random_checkpoint
from engine.step_inputs import StepInputs
from engine.tensor_parallel import TensorParallel
from engine.weights import load_weights

BLOCK_SIZE = 4
MAX_LENGTH = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomBatch:
    """Sequences of one step. `decode_lengths` count the new token; `chunks` are (first position, tokens).

    `shares_prefix`: the second chunk's sequence reads the first's blocks, some of which the first writes in this step.
    """

    decode_lengths: tuple[int, ...]
    chunks: tuple[tuple[int, int], ...]
    shares_prefix: bool = False
    seed: int = 0

    @property
    def num_prefills(self) -> int:
        """Prefill tokens."""
        return sum(size for _, size in self.chunks)

    @property
    def num_tokens(self) -> int:
        """Decodes and prefill tokens."""
        return len(self.decode_lengths) + self.num_prefills


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How far the pipeline's `num_rows` hidden states and its cache are from the plain model's, and which tokens each
    would draw.
    """

    num_rows: int
    relative_error: float
    cache_error: float
    is_identical: bool
    plain_tokens: list[int]
    pipeline_tokens: list[int]


def write_checkpoints(folder: Path) -> dict[Architecture, Path]:
    """A tiny checkpoint of every architecture, with a window and a dense layer where it can have one."""
    paths = {}
    for architecture in Architecture:
        paths[architecture] = folder / architecture.name
        config = sized_config(
            architecture,
            hidden_size=32,
            intermediate_size=48,
            num_layers=3,
            vocab_size=257,
            dtype=DType.FLOAT32,
            sliding_window=9 if architecture is Architecture.MISTRAL else None,
            num_dense_layers=1 if architecture is Architecture.QWEN3_MOE else 0,
        )
        write_random_checkpoint(paths[architecture], config, 1)
    return paths


def planned_graph(path: Path, size: int) -> OperationGraph:
    """The graph that a pipeline of the checkpoint's model plans for, as a rank of `size` has it."""
    model_config = ModelConfig.from_checkpoint(path)
    model = build_model(model_config, TensorParallel(0, size), torch.float32, torch.device("cpu"))
    return Pipeline(model, model_config.hidden_size).graph


def compare(
    path: Path,
    dtype: DType,
    batch: RandomBatch,
    schedule: str,
    *,
    overlaps: bool,
    size: int = 1,
    lanes: Lanes | None = None,
    wanted: tuple[int, ...] | None = None,
) -> Outcome:
    """Both ways over equal caches, on this rank of a group of `size`; of a schedule without a cut, `wanted` rows."""
    return compare_loaded(*_loaded(path, dtype, size), batch, schedule, lanes or HostLanes(overlaps=overlaps), wanted)


def compare_loaded(
    model: Decoder,
    pipeline: Pipeline,
    config: EngineConfig,
    batch: RandomBatch,
    schedule: str,
    lanes: Lanes,
    wanted: tuple[int, ...] | None = None,
) -> Outcome:
    """Both ways over equal caches, of a model that is there."""
    parsed = Schedule.parse(schedule)
    pipeline.check(parsed)
    with torch.inference_mode():
        plain_step, plain_cache = _step(batch, config)
        step, kv_cache = _step(batch, config)
        plain_TE = model(plain_step)
        cut = parsed.cut.scaled(step.num_decodes, len(step.tokens) - step.num_decodes)
        if wanted is None:
            ordered_TE = pipeline.run(step, parsed, lanes, Stopwatch())
            order = torch.from_numpy(cut.positions_of(torch.arange(len(step.tokens)).numpy()))
            hidden_TE = model.norm(ordered_TE[order])
        else:
            wanted_K = torch.tensor(wanted, dtype=torch.int64)
            hidden_TE = model.norm(pipeline.run(step, parsed, lanes, Stopwatch(), wanted_K))
            plain_TE = plain_TE[wanted_K] if len(hidden_TE) == len(wanted) else plain_TE
        tokens = [model.logits(states).argmax(dim=-1).tolist() for states in (plain_TE, hidden_TE)]
    caches = zip((*plain_cache.keys, *plain_cache.values), (*kv_cache.keys, *kv_cache.values), strict=True)
    return Outcome(
        num_rows=len(hidden_TE),
        relative_error=_error(hidden_TE, plain_TE),
        cache_error=max(_error(ours, plain) for plain, ours in caches),
        is_identical=torch.equal(hidden_TE, plain_TE),
        plain_tokens=tokens[0],
        pipeline_tokens=tokens[1],
    )


def _error(ours: Tensor, plain: Tensor) -> float:
    return ((ours - plain).abs().max() / plain.abs().max()).item() if plain.numel() else 0.0


def compare_on_rank(
    _: object,
    path: Path,
    dtype: DType,
    batch: RandomBatch,
    schedule: str,
    overlaps: bool,
    wanted: tuple[int, ...] | None = None,
) -> Outcome:
    """`compare` as a rank of a `LocalGroup`."""
    return compare(path, dtype, batch, schedule, overlaps=overlaps, size=dist.get_world_size(), wanted=wanted)


@cache
def _loaded(path: Path, dtype: DType, size: int) -> tuple[Decoder, Pipeline, EngineConfig]:
    tensor_parallel = TensorParallel(dist.get_rank(), size, dist.group.WORLD) if size > 1 else TensorParallel()
    model_config = ModelConfig.from_checkpoint(path)
    config = EngineConfig(
        model=model_config,
        checkpoint=path,
        dtype=dtype,
        tensor_parallel=size,
        block_size=BLOCK_SIZE,
        max_model_len=MAX_LENGTH,
    )
    model = build_model(model_config, tensor_parallel, getattr(torch, dtype.value), torch.device("cpu"))
    load_weights(model, config, tensor_parallel)
    return model, Pipeline(model, model_config.hidden_size), config


def _step(batch: RandomBatch, config: EngineConfig) -> tuple[StepInputs, KVCache]:
    """The step's inputs over a cache of random contents, the same at every call and on every rank."""
    generator = torch.Generator().manual_seed(batch.seed)
    lengths = [*batch.decode_lengths, *(first + count for first, count in batch.chunks)]
    counts = [1] * len(batch.decode_lengths) + [count for _, count in batch.chunks]
    width = config.max_blocks_per_sequence
    tables = torch.randperm(len(lengths) * width, generator=generator).view(-1, width)
    num_decodes = len(batch.decode_lengths)
    if batch.shares_prefix:
        first, second = num_decodes, num_decodes + 1
        shared = min(lengths[first], batch.chunks[1][0]) // BLOCK_SIZE
        tables[second, :shared] = tables[first, :shared]
    kv_cache = KVCache.allocate(config, len(lengths) * width, torch.device("cpu"))
    for tensor in (*kv_cache.keys, *kv_cache.values):
        filling = torch.randn(
            tensor.shape[0], config.model.num_kv_heads, *tensor.shape[2:], generator=generator, dtype=torch.float64
        )
        tensor.copy_(filling[:, : tensor.shape[1]])
    positions = [torch.arange(end - count, end) for end, count in zip(lengths, counts, strict=True)]
    slots = [
        table[where // BLOCK_SIZE] * BLOCK_SIZE + where % BLOCK_SIZE
        for table, where in zip(tables, positions, strict=True)
    ]
    empty = torch.empty(0, dtype=torch.int64)
    step = StepInputs(
        tokens=torch.randint(0, config.model.vocab_size, (sum(counts),), generator=generator),
        positions=torch.cat([empty, *positions]),
        slots=torch.cat([empty, *slots]),
        decode_block_tables=tables[:num_decodes],
        decode_lengths=torch.tensor(lengths[:num_decodes], dtype=torch.int64),
        prefill_block_tables=tables[num_decodes:],
        num_decodes=num_decodes,
        max_decode_length=max(lengths[:num_decodes], default=0),
        prefill_chunk_sizes=tuple(counts[num_decodes:]),
        prefill_context_lengths=tuple(lengths[num_decodes:]),
        kv_cache=kv_cache,
    )
    return step, kv_cache
