"""Nothing reads or writes the tensors of a collective that is still in flight: one rank of two, whose collectives hold
NaN until somebody waits for them. What the other rank would add is zero.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engine.config import EngineConfig
from engine.layers.collective import AllReduce
from engine.layers.embedding import EmbeddingShard
from engine.layers.rotary import RotaryTable
from engine.model_config import Architecture, DType
from engine.models import LAYERS
from engine.models.decoder import Decoder
from engine.pipeline.host_lanes import HostLanes
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.schedule import Schedule
from engine.random_checkpoint import sized_config
from engine.step_inputs import StepInputs
from engine.tensor_parallel import Collective, TensorParallel
from tests.engine.pipeline.batch_strategies import batches
from tests.engine.pipeline.equal_runs import BLOCK_SIZE, MAX_LENGTH, RandomBatch, compare_loaded
from tests.engine.pipeline.schedule_strategies import schedules


class Late:
    """Poison until waited for."""

    flying = 0

    def __init__(self, reduced: Tensor) -> None:
        self._reduced, self._result = reduced, reduced.clone()
        self._done: torch.futures.Future[None] = torch.futures.Future()
        reduced.fill_(float("nan"))
        Late.flying += 1

    def wait(self) -> None:
        assert not self._done.done(), "waited for twice"
        assert self._reduced.isnan().all(), "written while in flight"
        self._reduced.copy_(self._result)
        self._done.set_result(None)
        Late.flying -= 1

    def get_future(self) -> Any:
        return self._done


@dataclass(frozen=True, slots=True)
class LateRank(TensorParallel):
    """Rank 0 of two."""

    def all_reduce(self, partial: Tensor) -> Tensor:
        return partial

    def start_all_reduce(self, partial: Tensor, *, is_beside: bool = False) -> Collective:
        return Late(partial)

    def all_gather(self, shard: Tensor) -> Tensor:
        return torch.cat((shard, shard), dim=-1)


class ReducedElsewhere(AllReduce):
    """Leaves what it reads as it is."""

    is_in_place = False


class ReducedFirst(nn.Module):
    """A layer whose first operation is a collective on the layer's input."""

    def __init__(self, layer: nn.Module, hidden_size: int, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        self.first = ReducedElsewhere(tensor_parallel, hidden_size)
        self.layer = layer

    def forward(self, hidden_TE: Tensor, step: StepInputs) -> Tensor:
        output_TE: Tensor = self.layer(self.first(hidden_TE), step)
        return output_TE


@pytest.mark.parametrize("reduces_first", [False, True])
@pytest.mark.parametrize("architecture", [Architecture.LLAMA, Architecture.MIXTRAL])
def test_what_is_in_flight_is_waited_for(architecture: Architecture, reduces_first: bool) -> None:
    torch.manual_seed(0)
    config = sized_config(architecture, hidden_size=32, intermediate_size=48, num_layers=3, vocab_size=256)
    rank, rotary = LateRank(0, 2), RotaryTable(config, torch.float64, torch.device("cpu"))
    layers = [LAYERS[architecture](config, layer, rank, rotary) for layer in range(config.num_layers)]
    if reduces_first:
        layers = [ReducedFirst(layer, config.hidden_size, rank) for layer in layers]
    model = Decoder(config, rank, layers)
    model.embed_tokens.shard = EmbeddingShard(config.vocab_size, config.hidden_size, TensorParallel())  # all of it
    model = model.to(torch.float64).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) / parameter.shape[-1] ** (0.5 * (parameter.dim() > 1))
    pipeline = Pipeline(model, config.hidden_size)
    engine_config = EngineConfig(
        model=config,
        checkpoint=Path("/nonexistent"),
        dtype=DType.FLOAT64,
        tensor_parallel=2,
        block_size=BLOCK_SIZE,
        max_model_len=MAX_LENGTH,
    )

    @settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
    @given(schedule=schedules(pipeline.graph), batch=batches(), overlaps=st.booleans())
    def check(schedule: Schedule, batch: RandomBatch, overlaps: bool) -> None:
        assume(schedule.fits(len(batch.decode_lengths), batch.num_prefills))
        outcome = compare_loaded(model, pipeline, engine_config, batch, str(schedule), HostLanes(overlaps=overlaps))
        assert outcome.relative_error <= 1e-12
        assert outcome.cache_error <= 1e-12
        assert Late.flying == 0

    check()
