"""The profiler measures every node of real layers, alone and in pairs, resumes, and agrees between ranks."""

import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine.batch_shape import BatchShape
from engine.errors import ConfigError
from engine.model_config import Architecture
from engine.operation import Resource
from engine.pipeline import profiler
from engine.pipeline.agreed_times import AgreedTimes, overlapped_speeds
from engine.pipeline.profile import MeasuredCosts, Profile
from engine.pipeline.synthetic_step import synthetic_cache, synthetic_step
from engine.pipeline.timer import HostTimer, Load
from engine.random_checkpoint import sized_config, write_random_checkpoint
from engine.tensor_parallel import Collective, TensorParallel
from tests.engine.pipeline.profile_run import config_of, profile_rank, profiler_of, traced_layer
from tests.engine.rank_processes import run_ranks


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[Architecture], Path]:
    def write(architecture: Architecture) -> Path:
        write_random_checkpoint(tmp_path / architecture, sized_config(architecture))
        return tmp_path / architecture

    return write


@pytest.mark.parametrize("architecture", [Architecture.LLAMA, Architecture.QWEN3_MOE])
def test_every_node_is_measured_alone(architecture: Architecture, checkpoint: Callable[[Architecture], Path]) -> None:
    config = config_of(checkpoint(architecture), 1)
    traced = traced_layer(config, TensorParallel())
    seen: list[tuple[int, int]] = []
    profile = profiler_of(traced, config, TensorParallel()).profile(progress=lambda *done: seen.append(done))

    assert list(profile.nodes) == [node.name for node in traced.graph.nodes]
    assert profile.layer == traced.graph.signature
    assert profile.interference == ()
    assert seen == [(number, len(traced.graph.nodes)) for number in range(1, len(traced.graph.nodes) + 1)]
    for node in traced.graph.nodes:
        samples = profile.nodes[node.name].samples
        assert len(samples) == (4 if node.cache_reads else 2)
        assert all(0 < sample.seconds < 1 for sample in samples)
        contexts = {sample.shape.decode_context + sample.shape.prefill_context for sample in samples}
        assert contexts == ({8, 32} if node.cache_reads else {0})
    costs = MeasuredCosts(profile, traced.graph)
    shape = BatchShape(num_decodes=10, num_prefills=30, decode_context=20, prefill_context=20)
    assert all(costs.seconds(node, shape) > 0 for node in traced.graph.nodes)
    assert Profile.parse(str(profile)) == profile


def test_a_partial_profile_is_continued_and_another_one_is_not(
    checkpoint: Callable[[Architecture], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(checkpoint(Architecture.LLAMA), 1)
    traced = traced_layer(config, TensorParallel())
    path = tmp_path / "profile.json"

    def stop_after(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profiler_of(traced, config, TensorParallel()).profile(path, stop_after)
    begun = Profile.read(path)
    assert list(begun.nodes) == [node.name for node in traced.graph.nodes[:3]]

    finished = profiler_of(traced, config, TensorParallel()).profile(path)
    assert finished == Profile.read(path)
    assert {name: finished.nodes[name] for name in begun.nodes} == begun.nodes
    assert len(finished.nodes) == len(traced.graph.nodes)

    stale = str(finished).replace(torch.__version__, "1.0")
    for text, level, reason in ((stale, logging.INFO, f"torch 1.0 -> {torch.__version__}"), ("{", 30, "not a usable")):
        path.write_text(text)
        caplog.clear()
        with caplog.at_level(level):
            anew = profiler_of(traced, config, TensorParallel()).profile(path)
        assert reason in caplog.text
        assert anew.nodes["qkv_proj"] != finished.nodes["qkv_proj"]
        assert Profile.read(path) == anew


def test_a_file_that_must_be_written_is_insisted_on(
    checkpoint: Callable[[Architecture], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = config_of(checkpoint(Architecture.LLAMA), 1)
    traced = traced_layer(config, TensorParallel())
    monkeypatch.setattr(profiler.Profiler, "_load", lambda *_: None)
    monkeypatch.setattr(AgreedTimes, "medians", lambda _, loads, *__, **___: [0.001] * len(loads))
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "profile.json"
    with pytest.raises(ConfigError, match=f"{path} cannot be written"):
        profiler_of(traced, config, TensorParallel()).profile(path)
    profile = profiler_of(traced, config, TensorParallel()).profile(path, must_write=False)
    assert len(profile.nodes) == len(traced.graph.nodes)
    (record,) = caplog.records
    assert str(path) in record.getMessage()


def test_two_ranks_measure_pairs_and_end_with_the_same_profile(
    checkpoint: Callable[[Architecture], Path], tmp_path: Path
) -> None:
    folder = checkpoint(Architecture.LLAMA)
    run_ranks(profile_rank, 2, folder, tmp_path)
    full, again = ((tmp_path / f"{name}-0.json").read_text() for name in ("full", "again"))
    assert full == (tmp_path / "full-1.json").read_text()
    assert again == (tmp_path / "again-1.json").read_text()

    first, second = Profile.parse(full), Profile.parse(again)
    # The graph of a rank of two, from a model that needs no weights for it.
    graph_nodes = set(first.nodes)
    reduces = {name for name in graph_nodes if "all_reduce" in name}
    others = graph_nodes - reduces
    assert len(reduces) == 2
    pairs = {(pair.node, pair.beside) for pair in first.interference}
    assert pairs == {*itertools.product(others, reduces), *itertools.product(reduces, others)}
    assert all(0 < pair.speed <= 1 for pair in first.interference)
    kept = list(first.nodes)[:3]
    assert [first.nodes[name] for name in kept] == [second.nodes[name] for name in kept]
    assert second.interference[:6] == first.interference[:6]
    assert set(second.nodes) == graph_nodes
    assert {(pair.node, pair.beside) for pair in second.interference} == pairs
    assert second == Profile.read(tmp_path / "profile.json")
    for rank in range(2):  # only the first one's folder cannot be written
        assert "cannot be written" in (tmp_path / f"refused-{rank}").read_text()


@pytest.mark.parametrize(
    ("decodes", "decode_context", "prefills", "prefill_context"),
    [(7, 20, 0, 0), (0, 0, 30, 4), (0, 0, 30, 40), (5, 8, 33, 17), (1, 1, 1, 1), (16, 48, 64, 48)],
)
def test_a_synthetic_step_has_the_shape_that_was_asked_for(
    decodes: int, decode_context: int, prefills: int, prefill_context: int, checkpoint: Callable[[Architecture], Path]
) -> None:
    config = config_of(checkpoint(Architecture.LLAMA), 1)
    cache = synthetic_cache(config, 2000, torch.device("cpu"))
    shape = BatchShape(
        num_decodes=decodes,
        num_prefills=prefills,
        decode_context=decode_context,
        prefill_context=prefill_context,
    )
    step = synthetic_step(shape, config.max_model_len, cache, torch.device("cpu"))
    contexts = step.positions.double() + 1
    assert (step.num_decodes, len(step.positions)) == (decodes, decodes + prefills)
    assert int(step.positions.min()) >= 0 and int(contexts.max()) <= config.max_model_len
    if decodes:
        assert float(contexts[:decodes].mean()) == pytest.approx(decode_context, abs=0.5)
        assert torch.equal(step.decode_lengths.double(), contexts[:decodes])
        assert step.max_decode_length == int(contexts[:decodes].max())
    if prefills:
        assert float(contexts[decodes:].mean()) == pytest.approx(prefill_context, abs=0.5)
    assert sum(step.prefill_chunk_sizes) == prefills
    assert int(step.slots.max()) < cache.num_blocks * cache.block_size
    assert len(set(step.slots.tolist())) == decodes + prefills


def test_speeds_are_counted_for_the_time_that_both_ran() -> None:
    assert overlapped_speeds((1.0, 1.0), (1.0, 1.0)) == (1.0, 1.0)
    assert overlapped_speeds((1.0, 1.0), (2.0, 2.0)) == (0.5, 0.5)
    # Three seconds of work beside one second's: both at half speed for two seconds, then the longer one alone.
    assert overlapped_speeds((3.0, 1.0), (4.0, 2.0)) == (0.5, 0.5)
    assert overlapped_speeds((1.0, 3.0), (1.25, 3.0)) == pytest.approx((0.8, 1.0))
    assert overlapped_speeds((1.1, 1.0), (1.0, 9.0)) == (1.0, 0.05)  # noise and starvation have limits


class _Future:
    def __init__(self, ends: list[Callable[[object], None]]) -> None:
        self.add_done_callback = ends.append


class _Flight:
    """A collective that lands when a clock that the test moves says so."""

    def __init__(self, clock: list[float], lands: float) -> None:
        self._clock, self._lands = clock, lands
        self._callbacks: list[Callable[[object], None]] = []

    def wait(self) -> None:
        self._clock[0] = max(self._clock[0], self._lands)
        for callback in self._callbacks:
            callback(self)

    def get_future(self) -> _Future:
        return _Future(self._callbacks)


def test_the_host_timer_tells_when_each_of_two_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("engine.pipeline.timer.time.perf_counter", lambda: clock[0])

    def compute() -> None:
        clock[0] += 1.0

    def start() -> Collective:
        return _Flight(clock, clock[0] + 5.0)

    timer = HostTimer()
    assert timer.seconds(Load(compute)) == 1.0
    assert timer.together(Load(compute), 2, Load(start, start), 3) == (2.0, 5.0)
    assert timer.together(Load(compute), 4, Load(start, start), 0)[0] == 4.0
    assert timer.together(Load(compute), 0, Load(start, start), 1) == (0.0, 5.0)


def test_medians_withstand_a_disturbance(
    checkpoint: Callable[[Architecture], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that is a second late in every fifth reading does not change what a node costs."""
    config = config_of(checkpoint(Architecture.LLAMA), 1)
    traced = traced_layer(config, TensorParallel())
    readings = itertools.count()

    class Disturbed(HostTimer):
        def seconds(self, load: Load) -> float:
            load.run()
            return 1.0 if next(readings) % 5 == 4 else 1e-3

    monkeypatch.setattr(profiler, "HostTimer", Disturbed)
    profile = profiler_of(traced, config, TensorParallel()).profile()
    seconds = {sample.seconds for node in profile.nodes.values() for sample in node.samples}
    assert seconds == {1e-3}
    assert all(node.resource is not Resource.NETWORK for node in traced.graph.nodes)
