"""Memory for plans is taken before a step needs it: as much as it will need, and no more."""

from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.model_config import Architecture, DType
from engine.models import build_model
from engine.models.decoder import Decoder
from engine.pipeline.host_lanes import HostLanes
from engine.pipeline.nano_batch import NanoBatch
from engine.pipeline.pipeline import Pipeline
from engine.random_checkpoint import sized_config
from engine.tensor_parallel import TensorParallel
from tests.engine.pipeline.equal_runs import BLOCK_SIZE, MAX_LENGTH, RandomBatch, compare_loaded
from tests.engine.pipeline.schedule_strategies import sequential

FEW = RandomBatch(decode_lengths=(3,), chunks=((0, 2),))
MANY = RandomBatch(decode_lengths=(5, 9, 20, 3), chunks=((0, 36),))
NUM_TOKENS = 40


@pytest.fixture(scope="module", params=[Architecture.LLAMA, Architecture.QWEN3_MOE])
def loaded(request: pytest.FixtureRequest) -> tuple[Decoder, EngineConfig]:
    """A model with random weights; of Qwen3-MoE the first layer's graph differs from the others'."""
    num_dense_layers = 1 if request.param is Architecture.QWEN3_MOE else 0
    shape = sized_config(request.param, hidden_size=32, num_layers=3, num_dense_layers=num_dense_layers)
    model = build_model(shape, TensorParallel(), torch.float64, torch.device("cpu"))
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_()
    config = EngineConfig(
        model=shape,
        checkpoint=Path("/nonexistent"),
        dtype=DType.FLOAT64,
        block_size=BLOCK_SIZE,
        max_model_len=MAX_LENGTH,
    )
    return model, config


def test_what_was_reserved_is_enough(loaded: tuple[Decoder, EngineConfig]) -> None:
    model, config = loaded
    held: list[int] = []
    for reserves in (True, False):
        pipeline = Pipeline(model, config.model.hidden_size)
        halves = sequential(pipeline.graph, NanoBatch(2, 18), NanoBatch(2, 18))
        compare_loaded(model, pipeline, config, FEW, str(pipeline.sequential), HostLanes(overlaps=False))
        before = pipeline.arena_bytes
        if reserves:
            pipeline.reserve([halves], NUM_TOKENS)
            assert pipeline.arena_bytes > before
            held.append(pipeline.arena_bytes)
        outcome = compare_loaded(model, pipeline, config, MANY, str(halves), HostLanes(overlaps=True))
        assert outcome.relative_error <= 1e-12
        held.append(pipeline.arena_bytes)
    reserved, after, without = held
    if config.model.architecture == Architecture.LLAMA:  # else the layers of the other graph may need more
        assert reserved == after
    assert reserved <= without == after


def test_what_is_there_already_is_kept(loaded: tuple[Decoder, EngineConfig]) -> None:
    model, config = loaded
    pipeline = Pipeline(model, config.model.hidden_size)
    halves = sequential(pipeline.graph, NanoBatch(2, 18), NanoBatch(2, 18))
    compare_loaded(model, pipeline, config, MANY, str(halves), HostLanes(overlaps=False))
    before = pipeline.arena_bytes
    assert before > 0
    pipeline.reserve([], 10 * NUM_TOKENS)
    pipeline.reserve([halves], NUM_TOKENS // 2)
    assert pipeline.arena_bytes == before
