"""Each mechanism gives every step its stream and its units, inside a capture too, and changes no result."""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine import gpu_operations
from engine.batch_shape import BatchShape
from engine.layers.linear import ColumnParallelLinear
from engine.model_config import Architecture
from engine.pipeline import green_partition
from engine.pipeline.capture import Captures
from engine.pipeline.device_lanes import DeviceLanes
from engine.pipeline.granted_loads import PAIRED_SHARE, GrantedLoads
from engine.pipeline.layer_program import BoundNode
from engine.pipeline.pipeline import Pipeline
from engine.pipeline.schedule import ALL_UNITS, Lane, Mechanism, Schedule
from engine.pipeline.stopwatch import Stopwatch
from engine.pipeline.stream_lanes import StreamLanes
from engine.pipeline.synthetic_step import synthetic_cache, synthetic_step
from engine.pipeline.values import Values
from engine.step_inputs import StepInputs
from engine.tensor_parallel import TensorParallel
from engine.units_at_hand import UnitGrant, UnitsAtHand
from tests.engine.gpu_case import config_of, random_model
from tests.engine.pipeline.deferred_cuda import DEVICE, DeferredCuda, DeferredStream, deferred_cuda, recorded_graphs
from tests.engine.pipeline.green_driver import FakeDriver

pytest.importorskip("triton")
# On a device itself, the part `pipeline` of `make gpu` runs every mechanism.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted, the device is made up")

NUM_UNITS = 16  # three tenths are 8, and so are seven
BATCH = BatchShape(num_decodes=4, num_prefills=6, decode_context=18, prefill_context=8)
CONFIG = config_of(Architecture.LLAMA)
COMPUTE = (
    "o_proj[0:5]*7@1 gate_up_proj[0:5]*7@1 down_proj[0:5]*7@1 qkv_proj[0:5]*7 prefill_attention[0:5]*7"
    " o_proj[5:10]*7@1 gate_up_proj[5:10]*7@1 down_proj[5:10]*7@1 qkv_proj[5:10]*7 prefill_attention[5:10]*7"
)
MEMORY = "decode_attention[0:5]*3 decode_attention[5:10]*3"


def schedule_by(mechanism: Mechanism, memory: str = MEMORY) -> Schedule:
    text = f"nano-batches: 2+3 2+3\noverlap: {mechanism}\ncompute: {COMPUTE}\nmemory: {memory}\n"
    if mechanism is Mechanism.CORESIDENT:
        text = text.replace("*7", "").replace("*3", "")
    return Schedule.parse(text)


@dataclass
class Launches:
    """What kernels were launched with: by the name of the function, (stream, units left to others, what it took)."""

    cuda: DeferredCuda
    computes: bool
    of: dict[str, list[tuple[str, int | None, Any]]] = field(default_factory=dict)

    def note(self, patch: pytest.MonkeyPatch, name: str, took: Callable[[dict[str, Any]], Any]) -> None:
        """Note the calls of a function of `gpu_operations`; slow ones go on only where something is to be computed."""
        real = getattr(gpu_operations, name)

        def noted(*arguments: Any, **options: Any) -> Any:
            spared = torch._C._get_sm_carveout_experimental()
            self.of.setdefault(name, []).append((self.cuda.current.name, spared, took(options)))
            if self.computes or not (name == "gemm" or name.endswith("attention")):
                return real(*arguments, **options)
            # What is slow to interpret is left out; whoever reads the result reads something of its shape.
            output = options["output"]
            return arguments[0].new_zeros(len(arguments[0]), len(arguments[1])) if output is None else output

        patch.setattr(gpu_operations, name, noted)


@contextmanager
def recorded_device(driver: FakeDriver | None = None, *, computes: bool = True) -> Iterator[Launches]:
    """A device of few units, whose driver splits it, and what is launched there.

    Unless it `computes`, whatever lies in memory is computed with, and may be anything.
    """
    overflow = np.errstate() if computes else np.errstate(all="ignore")
    with deferred_cuda() as cuda, pytest.MonkeyPatch.context() as patch, overflow:
        launches = Launches(cuda, computes)
        properties = SimpleNamespace(multi_processor_count=NUM_UNITS)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        patch.setattr(green_partition, "_bindings", lambda: driver or FakeDriver(num_sms=NUM_UNITS))

        def external(handle: int, device: object) -> DeferredStream:
            cuda.streams.append(DeferredStream(cuda, f"part {handle}"))
            cuda.streams[-1].cuda_stream = handle
            return cuda.streams[-1]

        patch.setattr(torch.cuda, "ExternalStream", external)
        launches.note(patch, "decode_attention", lambda options: (options["num_ctas"], options["is_planned"]))
        for name in ("rms_norm", "silu_mul", "rotate_and_write"):
            launches.note(patch, name, lambda options: options["num_ctas"])
        launches.note(patch, "prefill_attention", lambda options: None)
        launches.note(patch, "gemm", lambda options: (options["num_sms"], options["config"].num_stages))
        yield launches


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """Of a model that kernels compute; it has run before, so that it knows the shapes of all values."""
    model = random_model(CONFIG, kernels=True)
    gpu_operations.compute_with_kernels(model, UnitsAtHand(NUM_UNITS))
    pipeline = Pipeline(model, CONFIG.model.hidden_size)
    with recorded_device():
        hidden_states(pipeline, pipeline.sequential.scaled(4, 6), StreamLanes(DEVICE, overlaps=False))
    return pipeline


def step_of() -> StepInputs:
    torch.manual_seed(0)
    cache = synthetic_cache(CONFIG, 400, torch.device("cpu"))
    return synthetic_step(BATCH, CONFIG.max_model_len, cache, torch.device("cpu"))


@torch.inference_mode()
def hidden_states(pipeline: Pipeline, schedule: Schedule, lanes: StreamLanes) -> torch.Tensor:
    pipeline.check(schedule)
    hidden = pipeline.run(step_of(), schedule, lanes, Stopwatch())
    return hidden[torch.from_numpy(schedule.cut.positions_of(torch.arange(10).numpy()))]


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    """Of plain torch."""
    pipeline = Pipeline(random_model(CONFIG, kernels=False), CONFIG.model.hidden_size)
    with deferred_cuda():
        return hidden_states(pipeline, pipeline.sequential.scaled(4, 6), StreamLanes(DEVICE, overlaps=False))


def test_streams_limit_the_programs_of_every_step_to_its_share(pipeline: Pipeline, expected: torch.Tensor) -> None:
    """One nano-batch's attention has three tenths and the other's all of the units, by plans of their own."""
    schedule = schedule_by(Mechanism.STREAMS, "decode_attention[0:5]*3 decode_attention[5:10]")
    with recorded_device() as launches:
        actual = hidden_states(pipeline, schedule, StreamLanes(DEVICE, overlaps=True))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert launches.of["decode_attention"] == [
        ("high", 8, (8, False)),
        ("high", None, (32, False)),
        ("high", 8, (8, True)),
        ("high", None, (32, True)),
    ]
    for name in ("rms_norm", "silu_mul", "rotate_and_write"):
        assert set(launches.of[name]) == {("main", 8, 8)}, name
    assert "gemm" not in launches.of
    assert pipeline.units is not None and pipeline.units.grant.num_units == NUM_UNITS


def test_one_plan_serves_different_numbers_of_programs(pipeline: Pipeline, expected: torch.Tensor) -> None:
    """The same tokens attended with all units in the first layer, with few in the second: one plan serves both."""
    units, numbers = pipeline.units, iter((NUM_UNITS, 3))
    assert units is not None
    real = Values.run

    def run(values: Values, bound: BoundNode, *arguments: Any) -> None:
        grant = units.grant
        if bound.node.name == "decode_attention":
            grant = UnitGrant(num_units=next(numbers), is_apart=False)
        with units.granted(grant):
            real(values, bound, *arguments)

    with recorded_device() as launches, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Values, "run", run)
        actual = hidden_states(pipeline, pipeline.sequential.scaled(4, 6), StreamLanes(DEVICE, overlaps=False))
    assert [took for _, _, took in launches.of["decode_attention"]] == [(NUM_UNITS, False), (3, True)]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_green_parts_have_a_stream_each_and_kernels_know_them(pipeline: Pipeline, expected: torch.Tensor) -> None:
    with recorded_device() as launches:
        lanes = StreamLanes(DEVICE, overlaps=True)
        actual = hidden_states(pipeline, schedule_by(Mechanism.GREEN), lanes)
        launches.computes = False
        hidden_states(pipeline, schedule_by(Mechanism.GREEN), lanes)
        parts = [stream.name for stream in launches.cuda.streams if stream.name.startswith("part")]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert len(parts) == 2, "one split serves all steps"
    # A part is all its own, so attention puts two programs on each unit, and rows have as many as they like.
    assert {launch[:2] + launch[2][:1] for launch in launches.of["decode_attention"]} == {(parts[0], 8, 16)}
    assert set(launches.of["silu_mul"]) == {(parts[1], 8, None)}
    assert torch._C._get_sm_carveout_experimental() is None


def test_coresident_kernels_leave_room_for_each_other(pipeline: Pipeline, expected: torch.Tensor) -> None:
    with recorded_device() as launches:
        actual = hidden_states(pipeline, schedule_by(Mechanism.CORESIDENT), StreamLanes(DEVICE, overlaps=True))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert {launch[:2] + launch[2][:1] for launch in launches.of["decode_attention"]} == {("high", None, 16)}
    assert set(launches.of["gemm"]) == {("main", None, (16, 3))}
    assert len(launches.of["gemm"]) == 2 * 2 * 4  # nano-batches, layers, products of a layer
    assert set(launches.of["silu_mul"]) == {("main", None, None)}


@pytest.mark.parametrize("mechanism", list(Mechanism))
def test_a_capture_records_what_a_launch_would_have(pipeline: Pipeline, mechanism: Mechanism) -> None:
    """Captures launch twice and record once: thrice the same streams, programs and settings of the library."""
    step = step_of()
    with recorded_device(computes=False) as launches, recorded_graphs(launches.cuda) as graphs, torch.inference_mode():
        lanes, schedule = StreamLanes(DEVICE, overlaps=True), schedule_by(mechanism)
        pipeline.run(step, schedule, lanes, Stopwatch())
        launched = {name: list(calls) for name, calls in launches.of.items()}
        launches.of.clear()
        Captures(DEVICE).capture(lambda: pipeline.run(step, schedule, lanes, Stopwatch()))
        assert graphs.log.count("begin") == 1
    for name, calls in launched.items():
        num_calls = len(calls)
        again = [("main" if stream == "side" else stream, *rest) for stream, *rest in launches.of[name]]
        assert len(again) == 3 * num_calls and again[-num_calls:] == calls, name
    assert torch._C._get_sm_carveout_experimental() is None
    assert pipeline.units is not None and pipeline.units.grant.is_apart


@pytest.mark.parametrize(
    ("mechanism", "words"),
    [(Mechanism.GREEN, "cuGreenCtxCreate.*NOT_SUPPORTED"), (Mechanism.CORESIDENT, "kernels that are too large")],
)
def test_a_refused_mechanism_is_told_once_and_lanes_are_streams(
    pipeline: Pipeline,
    mechanism: Mechanism,
    words: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline.units, "no_guests", "kernels that are too large")
    with recorded_device(FakeDriver("cuGreenCtxCreate"), computes=False) as launches, caplog.at_level(logging.WARNING):
        lanes = StreamLanes(DEVICE, overlaps=True)
        for _ in range(2):
            hidden_states(pipeline, schedule_by(mechanism), lanes)
    (record,) = caplog.records
    assert f"not by {mechanism}" in record.getMessage()
    assert re.search(words, record.getMessage())
    num_ctas = {Mechanism.GREEN: 8, Mechanism.CORESIDENT: 2 * NUM_UNITS}[mechanism]
    assert {(stream, took[0]) for stream, _, took in launches.of["decode_attention"]} == {("high", num_ctas)}
    assert "gemm" not in launches.of


@torch.inference_mode()
@pytest.mark.parametrize("num_outputs", [32, 24])
def test_a_product_in_fp8_leaves_room_too_where_its_columns_let_it(num_outputs: int) -> None:
    """24 columns would spill registers, so the library computes them."""
    torch.manual_seed(0)
    linear, units = ColumnParallelLinear(64, num_outputs, TensorParallel()), UnitsAtHand(NUM_UNITS)
    linear.use_fp8()
    linear.weight.copy_(torch.randn(num_outputs, 64))
    assert linear.weight_scale is not None
    linear.weight_scale.fill_(0.5)
    hidden = torch.randn(7, 64, dtype=torch.bfloat16)
    expected = linear(hidden)
    sizes: list[int] = []
    real: Any = vars(gpu_operations)["scaled_gemm"]

    def noted(*operands: Any, **options: Any) -> torch.Tensor:
        sizes.append(options["config"].num_stages)
        product: torch.Tensor = real(*operands, **options)
        return product

    output = torch.empty_like(expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_operations, "scaled_gemm", noted)
        with units.granted(UnitGrant(num_units=NUM_UNITS, is_apart=False, has_guest=True)):
            gpu_operations._multiply(linear, units, hidden, output=output)
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)
    assert sizes == ([3] if num_outputs == 32 else [])


@torch.inference_mode()
def test_a_product_in_fp8_is_quantised_within_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    linear, units = ColumnParallelLinear(64, 32, TensorParallel()), UnitsAtHand(NUM_UNITS)
    linear.use_fp8()
    linear.weight.copy_(torch.randn(32, 64))
    assert linear.weight_scale is not None
    linear.weight_scale.fill_(0.5)
    hidden = torch.randn(7, 64, dtype=torch.bfloat16)
    expected = linear(hidden)
    limits: list[int | None] = []
    real: Any = vars(gpu_operations)["quantise_rows"]

    def noted(*operands: Any, num_ctas: int | None = None) -> Any:
        limits.append(num_ctas)
        return real(*operands, num_ctas=num_ctas)

    monkeypatch.setattr(gpu_operations, "quantise_rows", noted)
    with units.granted(UnitGrant(num_units=3, is_apart=False)):
        limited = gpu_operations._multiply(linear, units, hidden)
    torch.testing.assert_close(limited, expected, rtol=2e-2, atol=2e-2)
    assert limits == [3]


def test_lanes_and_parts_are_made_once_and_given_back_in_the_end() -> None:
    """Whoever runs or measures layers, and however often the mode changes."""
    driver = FakeDriver(num_sms=NUM_UNITS)
    with recorded_device(driver):
        device_lanes = DeviceLanes(DEVICE)
        for overlaps in (False, True, False, True):
            assert device_lanes.of(overlaps=overlaps) is device_lanes.of(overlaps=overlaps)
        lanes = device_lanes.of(overlaps=True)
        assert isinstance(lanes, StreamLanes) and lanes._grants is device_lanes.grants
        for lane, share in ((Lane.MEMORY, PAIRED_SHARE), (Lane.COMPUTE, ALL_UNITS - PAIRED_SHARE)):
            device_lanes.grants.of(Mechanism.GREEN, lane, share)
        assert GrantedLoads(DEVICE, None, device_lanes.grants).offered()[Mechanism.GREEN]
        assert made(driver) == (2, 0)
        for _ in range(2):
            device_lanes.close()
            assert made(driver) == (2, 2)


def made(driver: FakeDriver) -> tuple[int, int]:
    """How many parts were made, and how many were given back."""
    names = [call[0] for call in driver.calls]
    assert names.count("cuStreamDestroy") == names.count("cuGreenCtxDestroy")
    return names.count("cuGreenCtxCreate"), names.count("cuGreenCtxDestroy")


def test_a_part_that_is_not_given_back_is_told(caplog: pytest.LogCaptureFixture) -> None:
    driver = FakeDriver(num_sms=NUM_UNITS)
    with recorded_device(driver):
        device_lanes = DeviceLanes(DEVICE)
        device_lanes.grants.of(Mechanism.GREEN, Lane.MEMORY, PAIRED_SHARE)
        driver.refused = "cuGreenCtxDestroy"
        device_lanes.close()
    assert "A part of the device was not given back: cuGreenCtxDestroy" in caplog.text
