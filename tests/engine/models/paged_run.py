"""Runs a model through the paged cache the way a scheduler would: prompt chunks and decodes of several sequences mixed.

Imported by tests and by the spawned ranks of a tensor-parallel test.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from engine.config import EngineConfig
from engine.kv_cache import KVCache
from engine.model_config import DType, ModelConfig
from engine.models import build_model
from engine.models.decoder import Decoder
from engine.step_inputs import StepInputs
from engine.tensor_parallel import TensorParallel
from engine.weights import load_weights

BLOCK_SIZE = 4
# Tokens of sequence 0 and 1 in each step; a single token after the first step is a decode. Together 41 and 26.
STEPS = ((11, 0), (13, 9), (1, 16), (12, 0), (1, 1), (1, 0), (2, 0))
LENGTHS = (sum(step[0] for step in STEPS), sum(step[1] for step in STEPS))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One checkpoint to run in one dtype, its own unless given."""

    name: str
    path: Path
    dtype: DType | None = None

    @property
    def tokens(self) -> tuple[Tensor, ...]:
        """Two prompts that the case's vocabulary has, the same in every process."""
        vocab_size = ModelConfig.from_checkpoint(self.path).vocab_size
        generator = torch.Generator().manual_seed(7)
        return tuple(torch.randint(0, vocab_size, (length,), generator=generator) for length in LENGTHS)


def load(path: Path, tensor_parallel: TensorParallel, dtype: DType | None = None) -> tuple[Decoder, EngineConfig]:
    """A model with its weights, on this rank."""
    model_config = ModelConfig.from_checkpoint(path)
    config = EngineConfig(
        model=model_config,
        checkpoint=path,
        dtype=dtype or model_config.dtype,
        tensor_parallel=tensor_parallel.size,
        block_size=BLOCK_SIZE,
        max_model_len=64,
    )
    model = build_model(model_config, tensor_parallel, getattr(torch, config.dtype.value), torch.device("cpu"))
    load_weights(model, config, tensor_parallel)
    return model, config


def steps_of(tokens: Sequence[Tensor], config: EngineConfig) -> Iterable[tuple[StepInputs, list[tuple[int, int, int]]]]:
    """Each step's inputs, and the (sequence, first position, count) of its tokens in their order."""
    num_blocks = config.max_blocks_per_sequence
    cache = KVCache.allocate(config, len(tokens) * num_blocks, torch.device("cpu"))
    shuffled = torch.randperm(len(tokens) * num_blocks, generator=torch.Generator().manual_seed(3))
    tables = shuffled.view(len(tokens), num_blocks)
    done = [0] * len(tokens)
    for counts in STEPS:
        parts = [(sequence, done[sequence], count) for sequence, count in enumerate(counts) if count]
        parts.sort(key=lambda part: not (part[2] == 1 and part[1]))
        yield _step_inputs(parts, tokens, tables, cache), parts
        for sequence, _, count in parts:
            done[sequence] += count


def paged_logits(model: Decoder, config: EngineConfig, tokens: Sequence[Tensor]) -> list[Tensor]:
    """Logits [length, vocabulary] of every position of every sequence."""
    logits = [torch.full((len(sequence), config.model.vocab_size), torch.nan) for sequence in tokens]
    with torch.inference_mode():
        for step, parts in steps_of(tokens, config):
            rows = model.logits(model(step))
            for (sequence, start, count), part in zip(
                parts, torch.split(rows, [part[2] for part in parts]), strict=True
            ):
                logits[sequence][start : start + count] = part
    return logits


def run_rank(rank: int, size: int, rendezvous: str, cases: Sequence[Case], output: Path) -> None:
    """One rank of a tensor-parallel group; every rank saves its logits, which must be equal."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
    tensor_parallel = TensorParallel(rank, size, dist.group.WORLD)
    for case in cases:
        model, config = load(case.path, tensor_parallel, case.dtype)
        torch.save(paged_logits(model, config, case.tokens), output / f"{case.name}-{rank}.pt")
    dist.destroy_process_group()


def _step_inputs(
    parts: list[tuple[int, int, int]], tokens: Sequence[Tensor], tables: Tensor, cache: KVCache
) -> StepInputs:
    num_decodes = sum(count == 1 and start > 0 for _, start, count in parts)
    sequences = torch.tensor([sequence for sequence, _, _ in parts])
    lengths = torch.tensor([start + count for _, start, count in parts])
    counts = [count for _, _, count in parts]
    positions = [torch.arange(start, start + count) for _, start, count in parts]
    slots = [
        tables[part[0], where // BLOCK_SIZE] * BLOCK_SIZE + where % BLOCK_SIZE
        for part, where in zip(parts, positions, strict=True)
    ]
    chunk_sizes = tuple(counts[num_decodes:])
    return StepInputs(
        tokens=torch.cat([tokens[sequence][start : start + count] for sequence, start, count in parts]),
        positions=torch.cat(positions),
        slots=torch.cat(slots),
        decode_block_tables=tables[sequences[:num_decodes]],
        decode_lengths=lengths[:num_decodes],
        prefill_block_tables=tables[sequences[num_decodes:]],
        num_decodes=num_decodes,
        max_decode_length=max(lengths[:num_decodes].tolist(), default=0),
        prefill_chunk_sizes=chunk_sizes,
        prefill_context_lengths=tuple(lengths[num_decodes:].tolist()),
        kv_cache=cache,
    )
