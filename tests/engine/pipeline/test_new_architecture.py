"""A new architecture needs one model file and no line in the pipeline: this is one, of a kind that no other is.

Attention and feed-forward read the same norm and are added up before one collective, as in GPT-J and PaLM (arXiv
2204.02311, section 2); the feed-forward has no gate, but an activation that the library does not know.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from torch import Tensor, nn
from torch.nn import functional

from engine.batch_shape import BatchShape
from engine.config import EngineConfig
from engine.layers.attention import DecodeAttention, JoinTokens, PrefillAttention, RotaryAndKVWrite
from engine.layers.collective import AllReduce
from engine.layers.linear import ColumnParallelLinear, QKVLinear, RowParallelLinear
from engine.layers.norm import RMSNorm
from engine.layers.rotary import RotaryTable
from engine.model_config import Architecture, DType, ModelConfig
from engine.models.decoder import Decoder
from engine.operation import Operation, Resource, Work
from engine.pipeline.collective_placement import with_gather_branch
from engine.pipeline.devices import data_sheet
from engine.pipeline.host_lanes import HostLanes
from engine.pipeline.operation_table import operation_table
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.placement import CPU_LANES, GPU_LANES
from engine.pipeline.plan import Plan
from engine.pipeline.planner import plan
from engine.pipeline.roofline import RooflineCosts
from engine.pipeline.schedule import Lane, Schedule
from engine.pipeline.sequential import sequential_schedule
from engine.pipeline.tracer import TracedLayer, trace_layer
from engine.pipeline.verify import verify
from engine.random_checkpoint import sized_config
from engine.step_inputs import StepInputs
from engine.tensor_parallel import TensorParallel
from tests.engine.pipeline.batch_strategies import batches
from tests.engine.pipeline.equal_runs import BLOCK_SIZE, MAX_LENGTH, RandomBatch, compare_loaded
from tests.engine.pipeline.schedule_strategies import schedules

# ----- what would be engine/models/parallel.py


class SquaredRelu(Operation):
    """relu(x)^2 (arXiv 2109.08668, section 3.1)."""

    resource = Resource.MEMORY

    def __init__(self, width: int) -> None:
        """`width` is F, the columns on this rank."""
        super().__init__()
        self.width = width

    def forward(self, input_TF: Tensor) -> Tensor:
        """[T, F] -> [T, F]."""
        return functional.relu(input_TF).square()

    def work(self, shape: BatchShape, element_bytes: int) -> Work:
        """Reads and writes F columns; a comparison and a product for each element."""
        num_elements = shape.num_tokens * self.width
        return Work(flops=2 * num_elements, sharded_bytes=2 * num_elements * element_bytes)


class ParallelLayer(nn.Module):
    """x + attention(norm(x)) + feed_forward(norm(x)), whose partial sums the ranks add up together."""

    def __init__(self, config: ModelConfig, layer: int, tensor_parallel: TensorParallel, rotary: RotaryTable) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.num_heads * config.head_dim
        self.norm = RMSNorm(hidden, config.rms_norm_eps)
        self.qkv_proj = QKVLinear(config, tensor_parallel)
        self.rotary_and_kv_write = RotaryAndKVWrite(config, layer, tensor_parallel, rotary)
        self.decode_attention = DecodeAttention(config, layer, tensor_parallel)
        self.prefill_attention = PrefillAttention(config, layer, tensor_parallel)
        self.join_tokens = JoinTokens(width // tensor_parallel.size)
        self.o_proj = RowParallelLinear(width, hidden, tensor_parallel)
        self.up_proj = ColumnParallelLinear(hidden, config.intermediate_size, tensor_parallel)
        self.squared_relu = SquaredRelu(config.intermediate_size // tensor_parallel.size)
        self.down_proj = RowParallelLinear(config.intermediate_size, hidden, tensor_parallel)
        self.all_reduce = AllReduce(tensor_parallel, hidden)

    def forward(self, hidden_TE: Tensor, step: StepInputs) -> Tensor:
        """[T, E] -> [T, E]."""
        normed_TE = self.norm(hidden_TE)
        query_THd = self.rotary_and_kv_write(self.qkv_proj(normed_TE), step)
        attended_TA = self.join_tokens(self.decode_attention(query_THd, step), self.prefill_attention(query_THd, step))
        multiplied_TE = self.down_proj(self.squared_relu(self.up_proj(normed_TE)))
        hidden_TE = hidden_TE + self.all_reduce(self.o_proj(attended_TA) + multiplied_TE)
        return hidden_TE


# ----- what the pipeline makes of it

BATCH = BatchShape(num_decodes=1024, num_prefills=1024, decode_context=256, prefill_context=256)
LARGE = sized_config(
    Architecture.LLAMA, hidden_size=4096, intermediate_size=16384, num_layers=28, num_heads=32, num_kv_heads=32
)
SMALL = sized_config(Architecture.LLAMA, hidden_size=32, intermediate_size=48, num_layers=3, vocab_size=257)
SLACK = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


def _traced(size: int) -> TracedLayer:
    """A large layer of a rank of `size`, without weights."""
    rotary = RotaryTable(LARGE, torch.float32, torch.device("meta"))
    with torch.device("meta"):
        layer = ParallelLayer(LARGE, 0, TensorParallel(0, size), rotary)
    return trace_layer(layer, LARGE.hidden_size)


def _planned(size: int) -> tuple[TracedLayer, Plan]:
    """For H200s whose lanes do not slow each other: one overlaps attention with products, two the network as well."""
    traced = with_gather_branch(_traced(size))
    costs = RooflineCosts(traced, replace(data_sheet("h200"), sharing=None), size, 2)
    return traced, plan(traced.graph, costs, BATCH, num_layers=LARGE.num_layers, seconds=5, workers=2)


@pytest.fixture(scope="module")
def small() -> tuple[Decoder, Pipeline, EngineConfig]:
    """One rank's model with random weights, in float64."""
    torch.manual_seed(0)
    config = replace(SMALL, architecture="ParallelForCausalLM")
    rotary = RotaryTable(config, torch.float64, torch.device("cpu"))
    layers = [ParallelLayer(config, layer, TensorParallel(), rotary) for layer in range(config.num_layers)]
    model = Decoder(config, TensorParallel(), layers).to(torch.float64).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) / parameter.shape[-1] ** (0.5 * (parameter.dim() > 1))
    engine_config = EngineConfig(
        model=config,
        checkpoint=Path("/nonexistent"),
        dtype=DType.FLOAT64,
        block_size=BLOCK_SIZE,
        max_model_len=MAX_LENGTH,
    )
    return model, Pipeline(model, config.hidden_size), engine_config


def test_its_layer_is_traced() -> None:
    alone, of_two = _traced(1).graph, _traced(2).graph
    shared = ["qkv_proj", "decode_attention", "prefill_attention", "up_proj", "down_proj", "o_proj"]
    assert [node.name for node in alone.nodes] == shared
    assert [node.name for node in of_two.nodes] == [*shared, "all_reduce", "add_1"]
    assert of_two.by_name["qkv_proj"].cache_writes
    assert of_two.by_name["qkv_proj"].outputs == ("norm", "rotary_and_kv_write")
    assert of_two.by_name["up_proj"].inputs == ("norm",), "the feed-forward waits for the norm and not for attention"
    assert [call.name for call in of_two.by_name["down_proj"].calls] == ["squared_relu", "down_proj"]
    assert of_two.by_name["all_reduce"].inputs == ("add",)


@pytest.mark.parametrize("size", [1, 2])
def test_its_costs_follow_from_the_model(size: int) -> None:
    traced, device = _traced(size), data_sheet("h200")
    table = operation_table(traced, BATCH, device, num_devices=size, num_layers=1, element_bytes=2)
    rows = {row.name: row for row in table.rows}
    hidden, intermediate, num_tokens = LARGE.hidden_size, LARGE.intermediate_size, 2048
    for name, num_weights in (("qkv_proj", 3 * hidden * hidden), ("up_proj", hidden * intermediate)):
        assert rows[name].flops == pytest.approx(2 * num_tokens * num_weights, rel=0.01)
    assert rows["decode_attention"].bound is Resource.MEMORY
    costs = RooflineCosts(traced, device, size, 2)
    assert all(costs.seconds(node, BATCH) > 0 for node in traced.graph.nodes)
    network_bytes = sum(row.network_bytes for row in table.rows)
    assert network_bytes == pytest.approx(2 * (size - 1) * num_tokens * hidden * 2)


@pytest.mark.parametrize("size", [1, 2])
def test_it_is_planned_to_overlap(size: int) -> None:
    traced, planned = _planned(size)
    verify(planned.schedule, traced.graph)
    assert {lane for lane, steps in planned.schedule.lanes.items() if steps} == set(GPU_LANES[: 1 + size])
    assert planned.speedup > 1.5 and planned.gap < 0.05
    assert planned.lower_bound_seconds <= planned.best.period_seconds


def test_a_cpu_s_plan_hides_its_collective() -> None:
    traced = _traced(2)
    costs = RooflineCosts(traced, replace(data_sheet("h200"), sharing=None, network_bandwidth=20e9), 2, 2)
    planned = plan(traced.graph, costs, BATCH, num_layers=LARGE.num_layers, lanes=CPU_LANES, seconds=3, workers=2)
    verify(planned.schedule, traced.graph)
    assert {step.node for step in planned.schedule.lanes[Lane.NETWORK]} == {"all_reduce"}
    assert planned.speedup > 1.1


def test_random_schedules_compute_what_the_plain_model_does(small: tuple[Decoder, Pipeline, EngineConfig]) -> None:
    @settings(SLACK, max_examples=40)
    @given(schedule=schedules(small[1].graph), batch=batches())
    def check(schedule: Schedule, batch: RandomBatch) -> None:
        assume(schedule.fits(len(batch.decode_lengths), batch.num_prefills))
        outcome = compare_loaded(*small, batch, str(schedule), HostLanes(overlaps=True))
        assert outcome.relative_error <= 1e-12
        assert outcome.cache_error <= 1e-12
        assert outcome.pipeline_tokens == outcome.plain_tokens

    check()


def test_the_plan_for_a_large_one_runs_a_small_one(small: tuple[Decoder, Pipeline, EngineConfig]) -> None:
    _, planned = _planned(1)
    batch = RandomBatch(decode_lengths=(5, 9, 20, 3), chunks=((0, 7), (4, 9)), seed=1)
    for schedule in (planned.schedule, sequential_schedule(small[1].graph)):
        outcome = compare_loaded(*small, batch, str(schedule), HostLanes(overlaps=True))
        assert outcome.relative_error <= 1e-12
        assert outcome.pipeline_tokens == outcome.plain_tokens
    assert outcome.is_identical, "one operation after the other is the plain model to the bit"
