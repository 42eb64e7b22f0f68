"""On a GPU the profiler measures every share by every mechanism, granted as steps are when they are served."""

import logging
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from engine.gpu_model import no_guests
from engine.model_config import Architecture, DType
from engine.pipeline import green_partition, profiler
from engine.pipeline.layer_program import LayerProgram
from engine.pipeline.placement import GPU_LANES, lane_of
from engine.pipeline.profile import Profile
from engine.pipeline.profile_grid import QUICK
from engine.pipeline.profiler import Profiler
from engine.pipeline.schedule import Lane, Mechanism
from engine.pipeline.timer import Load
from engine.pipeline.tracer import trace_layer
from engine.tensor_parallel import TensorParallel
from engine.units_at_hand import UnitGrant, UnitsAtHand
from tests.engine.gpu_case import config_of, random_model
from tests.engine.pipeline.deferred_cuda import DEVICE, NUM_UNITS, DeferredCuda, DeferredStream, deferred_cuda
from tests.engine.pipeline.green_driver import FakeDriver

CONFIG = config_of(Architecture.LLAMA)
TRACED = trace_layer(random_model(CONFIG, kernels=False).layers[0], CONFIG.model.hidden_size)
COMPUTING = [node for node in TRACED.graph.nodes if lane_of(node, GPU_LANES) is Lane.COMPUTE]
ATTENTION = TRACED.graph.by_name["decode_attention"]


@dataclass
class GrantTimer:
    """A load takes as long as the units that it was granted leave it; grants are noted with the stream they held on."""

    cuda: DeferredCuda
    units: UnitsAtHand
    now: UnitGrant | None = None
    stream: str = ""
    paired: set[tuple[str, UnitGrant, str, UnitGrant]] = field(default_factory=set)

    def work(self) -> None:
        """What a load does here."""
        self.now, self.stream = self.units.grant, self.cuda.current.name

    def seconds(self, load: Load) -> float:
        load.run()
        assert self.now is not None
        return (1.25 if self.now.has_guest else 1.0) * NUM_UNITS / self.now.num_units

    def together(self, first: Load, num_first: int, second: Load, num_second: int) -> tuple[float, float]:
        """Each is slowed down to four fifths by the other."""
        seconds = [num_first * self.seconds(first)]
        one = (self.stream, self.now)
        seconds.append(num_second * self.seconds(second))
        if num_first and num_second:
            self.paired.add((*one, self.stream, self.now))  # type: ignore[arg-type]
            return seconds[0] * 1.25, seconds[1] * 1.25
        return seconds[0], seconds[1]


def profiled(driver: FakeDriver, units: UnitsAtHand, stored: Any = None) -> tuple[Profile, GrantTimer]:
    with deferred_cuda() as cuda, pytest.MonkeyPatch.context() as patch:
        timer = GrantTimer(cuda, units)
        patch.setattr(profiler, "CudaTimer", lambda: timer)
        patch.setattr(Profiler, "_load", lambda *_: Load(timer.work))
        patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        patch.setattr(green_partition, "_bindings", lambda: driver)

        def external(handle: int, device: object) -> DeferredStream:
            cuda.streams.append(DeferredStream(cuda, "part"))
            return cuda.streams[-1]

        patch.setattr(torch.cuda, "ExternalStream", external)
        made = Profiler(LayerProgram.of(TRACED), CONFIG, TensorParallel(), DEVICE, {}, QUICK, units)
        return made.profile(stored), timer


def test_every_share_is_measured_by_every_mechanism() -> None:
    profile, timer = profiled(FakeDriver(), UnitsAtHand(NUM_UNITS))
    assert profile.mechanisms == tuple(Mechanism)
    assert Profile.parse(str(profile)) == profile
    granted = [16, 24, 40, 56, 64, 76, 92, 108, 116, 132]
    for node in (*COMPUTING, ATTENTION):
        by = {mechanism: profile.by(mechanism).nodes[node.name].modes for mechanism in Mechanism}
        assert {mode.share: mode.speed for mode in by[Mechanism.STREAMS]} == pytest.approx(
            {share: granted[share - 1] / NUM_UNITS for share in range(1, 11)}
        )
        shares = [2, 3, 4, 5] if node is ATTENTION else [5, 6, 7, 8]
        assert [mode.share for mode in by[Mechanism.GREEN]] == [*shares, 10]
        parts = {2: 24, 3: 40, 4: 56, 5: 64, 6: 76, 7: 92, 8: 108, 10: 132}
        if node is not ATTENTION:
            parts[5] = 68  # what the driver leaves of a split at 64
        for mode in by[Mechanism.GREEN]:
            assert mode.speed == pytest.approx(parts[mode.share] / NUM_UNITS)
        assert {mode.share: mode.speed for mode in by[Mechanism.CORESIDENT]} == pytest.approx({10: 0.8})
    for mechanism in Mechanism:
        pairs = {(pair.node, pair.beside): pair.speed for pair in profile.by(mechanism).interference}
        assert pairs.keys() == {
            pair for node in COMPUTING for pair in ((node.name, ATTENTION.name), (ATTENTION.name, node.name))
        }
        assert all(speed < 1 for speed in pairs.values())
    limited = [UnitGrant(num_units=num_units, is_apart=False) for num_units in (92, 40)]
    beside = UnitGrant(num_units=132, is_apart=False, has_guest=True)
    assert timer.paired == {
        ("main", limited[0], "high", limited[1]),
        ("part", UnitGrant(num_units=92), "part", UnitGrant(num_units=40)),
        ("main", beside, "high", beside),
    }
    assert timer.units.grant == UnitGrant(num_units=NUM_UNITS)


def test_what_the_device_or_the_kernels_refuse_is_told_and_not_measured(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        profile, _ = profiled(FakeDriver("cuDevSmResourceSplitByCount"), UnitsAtHand(NUM_UNITS, "heads are too large"))
    assert profile.mechanisms == (Mechanism.STREAMS,)
    green, coresident = (record.getMessage() for record in caplog.records)
    assert "by green" in green and "operation not supported" in green
    assert "by coresident" in coresident and "heads are too large" in coresident


def test_a_profile_without_a_mechanism_is_completed(tmp_path: Any) -> None:
    path = tmp_path / "profile.json"
    partial, _ = profiled(FakeDriver("cuGreenCtxCreate"), UnitsAtHand(NUM_UNITS), path)
    whole, _ = profiled(FakeDriver(), UnitsAtHand(NUM_UNITS), path)
    assert Mechanism.GREEN not in partial.overlap and Mechanism.GREEN in whole.overlap
    assert whole == Profile.read(path)
    again, timer = profiled(FakeDriver(), UnitsAtHand(NUM_UNITS), path)
    assert again == whole and not timer.paired


def test_guests_are_for_sixteen_bits_and_heads_that_fit() -> None:
    assert "16 bits, not in float32" in (no_guests(CONFIG) or "")
    half = config_of(Architecture.LLAMA, dtype=DType.BFLOAT16)
    assert no_guests(half) is None
