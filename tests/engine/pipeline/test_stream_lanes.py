import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.batch_shape import BatchShape
from engine.config import DeviceKind, EngineConfig
from engine.kv_cache import KVCache
from engine.layers.collective import CollectiveOperation
from engine.model_config import Architecture, DType
from engine.models import build_model
from engine.operation import Resource
from engine.pipeline.capture import Captures
from engine.pipeline.dependencies import Dependencies
from engine.pipeline.dispatch import Dispatch, dispatch_order
from engine.pipeline.flight import Flight
from engine.pipeline.graph import LAYER_INPUT, OperationGraph
from engine.pipeline.host_lanes import HostLanes
from engine.pipeline.lanes import Lanes, lanes_for
from engine.pipeline.layer_program import LayerProgram
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.schedule import Lane, Schedule
from engine.pipeline.stopwatch import Stopwatch
from engine.pipeline.stream_lanes import StreamLanes
from engine.pipeline.synthetic_step import synthetic_step
from engine.pipeline.values import Values
from engine.random_checkpoint import sized_config
from engine.tensor_parallel import TensorParallel
from tests.engine.pipeline.deferred_cuda import DEVICE, NUM_UNITS, DeferredCuda, DeferredEvent, deferred_cuda
from tests.engine.pipeline.equal_runs import RandomBatch, compare, planned_graph, write_checkpoints
from tests.engine.pipeline.schedule_strategies import any_graph, node, schedules

NUM_LAYERS = 3
Launch = tuple[str, int, int, int]


class _Recorder:
    """Programs and values of no model: what is launched is only noted, with the units spared for others."""

    def __init__(self, cuda: DeferredCuda, graph: OperationGraph) -> None:
        self.cuda = cuda
        self.launched: list[Launch] = []
        self.spared: list[int | None] = []
        self.beside: set[bool] = set()  # whether collectives were told that others run meanwhile
        self.programs = [cast(LayerProgram, SimpleNamespace(nodes=self._bound(graph)))] * NUM_LAYERS

    def run(self, bound: Any, layer: int, start: int, stop: int, stopwatch: Stopwatch) -> None:
        self._note((bound.node.name, layer, start, stop))

    def network_tensors(self, bound: Any, layer: int, start: int, stop: int) -> tuple[Any, Any]:
        return (bound.node.name, layer, start, stop), None

    def _note(self, launch: Launch) -> None:
        self.launched.append(launch)
        self.spared.append(torch._C._get_sm_carveout_experimental())
        self.cuda.queue(lambda: None)

    def _bound(self, graph: OperationGraph) -> dict[str, Any]:
        recorder = self

        class Collective(CollectiveOperation):
            def into(self, output: Any, input: Any, *, is_beside: bool = False) -> None:  # type: ignore[override]
                recorder.beside.add(is_beside)
                recorder._note(output)

        return {
            item.name: SimpleNamespace(
                node=item,
                calls=[
                    SimpleNamespace(
                        operation=Collective(TensorParallel(), 1) if item.resource is Resource.NETWORK else None
                    )
                ],
            )
            for item in graph.nodes
        }


def _run(
    cuda: DeferredCuda,
    lanes: Lanes,
    graph: OperationGraph,
    order: Sequence[Dispatch],
    ranges: Sequence[tuple[int, int]],
    stopwatch: Stopwatch | None = None,
) -> _Recorder:
    recorder = _Recorder(cuda, graph)
    lanes.run(order, ranges, recorder.programs, cast(Values, recorder), stopwatch or Stopwatch())
    return recorder


def _full(schedule: Schedule) -> list[tuple[int, int]]:
    return [(step.start, step.stop) for _, step in schedule.steps]


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_every_step_begins_after_what_it_needs_and_ends_before_the_join(data: st.DataObject) -> None:
    """Also where the batch is another than planned and leaves steps without tokens."""
    graph = data.draw(any_graph())
    schedule = data.draw(schedules(graph))
    planned = schedule.cut
    cut = planned.scaled(
        data.draw(st.integers(0, 9)) if planned.num_decodes else 0,
        data.draw(st.integers(0, 9)) if planned.num_prefills else 0,
    )
    ranges = [(planned.position_in(cut, start), planned.position_in(cut, stop)) for start, stop in _full(schedule)]
    overlaps = data.draw(st.booleans())
    with deferred_cuda() as cuda:
        lanes = StreamLanes(DEVICE, overlaps=overlaps)
        before_all = set(cuda.main.known)
        order = dispatch_order(schedule, graph, NUM_LAYERS)
        recorder = _run(cuda, lanes, graph, order, ranges)

        dependencies = Dependencies.of(schedule, graph)
        busy = [dispatch for dispatch in order if ranges[dispatch.placed.index][0] < ranges[dispatch.placed.index][1]]
        numbers = {(placed.index, layer): number for number, (placed, layer, _) in enumerate(busy)}
        assert recorder.launched == [(placed.step.node, layer, *ranges[placed.index]) for placed, layer, _ in busy]
        for (index, layer), number in numbers.items():
            assert before_all <= cuda.before[number]
            for producer, lag in dependencies.waits[index]:
                needed = numbers.get((producer, layer - lag))
                assert needed is None or needed in cuda.before[number]
        assert cuda.main.known >= set(range(len(busy)))
        if not overlaps:
            assert set(cuda.stream_of) <= {"main"} and DeferredEvent.num_made == 0
        cuda.settle(lambda count: data.draw(st.integers(0, count - 1)))


CHAIN = OperationGraph(
    (
        node("up", LAYER_INPUT),
        node("attend", "up", resource=Resource.MEMORY),
        node("reduce", "attend", resource=Resource.NETWORK),
        node("down", "reduce"),
    ),
    "down",
)
TWO_LANES = Schedule.parse(
    "nano-batches: 2+0 2+0\n"
    "compute: up[0:2] up[2:4]*7 down[0:2] down[2:4]\n"
    "memory: attend[0:2]*3 attend[2:4]\n"
    "network: reduce[0:2] reduce[2:4]\n"
)


def test_lanes_run_on_streams_of_their_own_and_overlap() -> None:
    with deferred_cuda() as cuda:
        order = dispatch_order(TWO_LANES, CHAIN, NUM_LAYERS)
        recorder = _run(cuda, StreamLanes(DEVICE, overlaps=True), CHAIN, order, _full(TWO_LANES))
    streams = {launch[0]: name for launch, name in zip(recorder.launched, cuda.stream_of, strict=True)}
    assert streams == {"up": "main", "down": "main", "attend": "high", "reduce": "side"}
    numbers = {launch: number for number, launch in enumerate(recorder.launched)}
    second_up, first_attend = numbers["up", 0, 2, 4], numbers["attend", 0, 0, 2]
    assert first_attend not in cuda.before[second_up] and second_up not in cuda.before[first_attend]


def test_events_are_made_once_and_only_where_somebody_waits() -> None:
    with deferred_cuda() as cuda:
        order = dispatch_order(TWO_LANES, CHAIN, NUM_LAYERS)
        lanes = StreamLanes(DEVICE, overlaps=True)
        _run(cuda, lanes, CHAIN, order, _full(TWO_LANES))
        num_forks_and_joins = 4
        awaited = {wait for dispatch in order for wait in dispatch.waits}
        assert DeferredEvent.num_made == len(awaited) + num_forks_and_joins
        _run(cuda, lanes, CHAIN, order, _full(TWO_LANES))
        assert DeferredEvent.num_made == len(awaited) + 2 * num_forks_and_joins
        assert all(set(range(len(order))) <= cuda.before[number] for number in range(len(order), 2 * len(order)))


def test_a_step_without_tokens_still_passes_on_what_it_waited_for() -> None:
    """`reduce` needs `up` and waits for `attend`, which waits for `up`; `attend` has no tokens this time."""
    graph = OperationGraph(
        (
            node("up", LAYER_INPUT),
            node("attend", "up", resource=Resource.MEMORY),
            node("reduce", "up attend", resource=Resource.NETWORK),
        ),
        "reduce",
    )
    schedule = Schedule.parse("nano-batches: 2+0\ncompute: up[0:2]\nmemory: attend[0:2]\nnetwork: reduce[0:2]\n")
    order = dispatch_order(schedule, graph, 1)
    assert order[2].placed.step.node == "reduce" and order[2].waits == (1,)
    with deferred_cuda() as cuda:
        ranges = [(0, 2), (1, 1), (0, 2)]
        recorder = _run(cuda, StreamLanes(DEVICE, overlaps=True), graph, order, ranges)
    assert [launch[0] for launch in recorder.launched] == ["up", "reduce"]
    assert cuda.before[1] == {0}


def test_shares_hold_for_the_launches_of_their_step_and_only_where_lanes_overlap() -> None:
    with deferred_cuda() as cuda:
        order = dispatch_order(TWO_LANES, CHAIN, NUM_LAYERS)
        recorder = _run(cuda, StreamLanes(DEVICE, overlaps=True), CHAIN, order, _full(TWO_LANES))
        notes = zip(recorder.launched, recorder.spared, strict=True)
        spared = {launch[0] + str(launch[2]): number for launch, number in notes}
        assert spared["up2"] == 40 and spared["attend0"] == NUM_UNITS - 40
        assert {spared[name] for name in spared.keys() - {"up2", "attend0"}} == {None}
        assert torch._C._get_sm_carveout_experimental() is None and recorder.beside == {True}
        recorder = _run(cuda, StreamLanes(DEVICE, overlaps=False), CHAIN, order, _full(TWO_LANES))
        assert set(recorder.spared) == {None} and recorder.beside == {False}


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_recorded_run_tells_when_each_step_ran_on_the_device(overlaps: bool) -> None:
    stopwatch = Stopwatch(rank=1, records_events=True)
    with deferred_cuda() as cuda:
        order = dispatch_order(TWO_LANES, CHAIN, NUM_LAYERS)
        recorder = _run(cuda, StreamLanes(DEVICE, overlaps=overlaps), CHAIN, order, _full(TWO_LANES), stopwatch)
    assert stopwatch.events is not None
    events = {(event.operation, event.layer, event.start_token, event.stop_token): event for event in stopwatch.events}
    assert list(events) == recorder.launched
    assert {event.operation: event.lane for event in events.values()} == {
        "up": Lane.COMPUTE,
        "attend": Lane.MEMORY,
        "reduce": Lane.NETWORK,
        "down": Lane.COMPUTE,
    }
    assert all(event.rank == 1 for event in events.values())
    first = min(event.start for event in events.values())
    assert max(event.end for event in events.values()) == pytest.approx(first + len(events) * 0.001)
    for (operation, layer, start, stop), event in events.items():
        assert event.end - event.start >= 0.001 - 1e-9 and event.start >= 0
        if operation == "reduce":
            assert events["attend", layer, start, stop].end <= event.start + 1e-9


def test_each_device_has_its_lanes() -> None:
    assert isinstance(lanes_for(torch.device("cpu"), overlaps=True), HostLanes)
    with deferred_cuda():
        assert isinstance(lanes_for(DEVICE, overlaps=True), StreamLanes)


class _SettledLanes:
    """`StreamLanes` whose work, real on the CPU, runs in a random order that streams and events allow."""

    runs_plainly = False

    def __init__(self, cuda: DeferredCuda, seed: int) -> None:
        self._cuda = cuda
        self._random = random.Random(seed)
        self._lanes = StreamLanes(DEVICE, overlaps=True)

    def begin(self, *arguments: Any) -> Flight | None:
        return self._lanes.begin(*arguments)

    def run(self, *arguments: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            real = Values.run
            patch.setattr(Values, "run", lambda *args: self._cuda.queue(partial(real, *args)))
            self._lanes.run(*arguments)
        self._cuda.settle(self._random.randrange)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[Architecture, Path]:
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"))


BATCHES = (
    RandomBatch(decode_lengths=(5, 9, 1, 30, 17), chunks=((0, 11), (4, 7), (20, 3)), seed=1),
    RandomBatch(decode_lengths=(), chunks=((0, 16), (8, 13)), shares_prefix=True, seed=2),
    RandomBatch(decode_lengths=(40, 2, 3, 8, 13, 21), chunks=(), seed=3),
)


@pytest.mark.parametrize("architecture", [Architecture.LLAMA, Architecture.QWEN3_MOE])
@given(st.data())
@settings(max_examples=12, deadline=None)
def test_whatever_order_streams_run_in_the_model_computes_the_same(
    checkpoints: dict[Architecture, Path], architecture: Architecture, data: st.DataObject
) -> None:
    path = checkpoints[architecture]
    graph = planned_graph(path, 1)
    batch = data.draw(st.sampled_from(BATCHES))
    schedule = data.draw(
        schedules(graph).filter(lambda schedule: schedule.fits(len(batch.decode_lengths), batch.num_prefills))
    )
    with deferred_cuda() as cuda:
        lanes = _SettledLanes(cuda, data.draw(st.integers(0, 2**16)))
        outcome = compare(path, DType.FLOAT64, batch, str(schedule), overlaps=True, lanes=lanes)
    assert outcome.relative_error <= 1e-12
    assert outcome.cache_error <= 1e-12
    assert outcome.pipeline_tokens == outcome.plain_tokens


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@torch.inference_mode()
def test_on_a_device_overlapping_changes_nothing_launched_or_captured() -> None:
    device = torch.device("cuda")
    shape = sized_config(Architecture.LLAMA, hidden_size=256, intermediate_size=512, num_layers=6)
    config = EngineConfig(
        model=shape, checkpoint=Path("unused"), dtype=DType.FLOAT32, device=DeviceKind.CUDA, max_model_len=256
    )
    model = build_model(shape, TensorParallel(), torch.float32, device)
    for parameter in model.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5)
    cache = KVCache.allocate(config, 2000, device)
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
    batch = BatchShape(num_decodes=96, num_prefills=64, decode_context=100, prefill_context=60)
    step = synthetic_step(batch, config.max_model_len, cache, device)
    step = replace(step, tokens=torch.randint_like(step.tokens, shape.vocab_size))
    pipeline = Pipeline(model, shape.hidden_size)
    schedule = Schedule.parse(
        "nano-batches: 48+32 48+32\n"
        "compute: o_proj[0:80]*7@1 gate_up_proj[0:80]*7@1 down_proj[0:80]*7@1 qkv_proj[0:80]*7"
        " prefill_attention[0:80] o_proj[80:160]*7@1 gate_up_proj[80:160]*7@1 down_proj[80:160]*7@1"
        " qkv_proj[80:160]*7 prefill_attention[80:160]\n"
        "memory: decode_attention[0:80] decode_attention[80:160]\n"
    )
    pipeline.check(schedule)
    order = torch.from_numpy(schedule.cut.positions_of(torch.arange(160).numpy())).to(device)
    expected = model(step)
    lanes = lanes_for(device, overlaps=True)

    def run() -> Tensor:
        return pipeline.run(step, schedule, lanes, Stopwatch())

    captured = Captures(device).capture(run)
    for launch in (run, captured.replay):
        for _ in range(20):
            hidden = model.norm(launch()[order])
            assert ((hidden - expected).abs().max() / expected.abs().max()).item() < 1e-4
            launch().fill_(torch.nan)
    recorded = Stopwatch(records_events=True)
    pipeline.run(step, schedule, lanes, recorded)
    assert recorded.events is not None
    assert {event.lane for event in recorded.events} == {Lane.COMPUTE, Lane.MEMORY}
    assert all(0 <= event.start < event.end for event in recorded.events)
