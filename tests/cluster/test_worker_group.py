"""The rank actors: the same tokens as one process, and every way a rank can fail surfaces soon, by name."""

import asyncio
import os
import pickle
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from cluster.step_transport import Failed, Hello, RankLink, RankSocket
from cluster.worker_group import WorkerGroup, _Start
from engine import (
    CapacityError,
    CheckpointError,
    DeviceKind,
    DType,
    EngineConfig,
    EngineDeadError,
    LLMEngine,
    MemoryPart,
    ModelConfig,
    NanoserveError,
    Request,
    RequestId,
    SamplingParams,
)
from engine.inline_executor import InlineExecutor
from engine.memory_budget import bytes_per_block
from engine.model_config import Architecture
from engine.random_checkpoint import sized_config, write_random_checkpoint

pytestmark = pytest.mark.ray
RANK_OPTIONS = [{"num_cpus": 0}, {"num_cpus": 0}]


@pytest.fixture(scope="module", autouse=True)
def private_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster for this module, unless the session has one already."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    directory = tmp_path_factory.mktemp("r")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=str(directory))
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_random_checkpoint(path, sized_config(Architecture.LLAMA))
    return EngineConfig(
        model=ModelConfig.from_checkpoint(path),
        checkpoint=path,
        dtype=DType.FLOAT32,
        device=DeviceKind.CPU,
        tensor_parallel=2,
        max_model_len=256,
        max_batch_tokens=64,
        max_sequences=16,
        num_blocks=64,
        num_threads=1,
        plan_seconds=0,
    )


def requests() -> list[Request]:
    sampling = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    return [
        Request(request_id=RequestId(f"r{i}"), prompt_token_ids=tuple(range(i + 1, 30)), sampling=sampling)
        for i in range(6)
    ]


async def tokens(engine: LLMEngine) -> list[list[int]]:
    async def one(request: Request) -> list[int]:
        return [token async for output in engine.generate(request) for token in output.token_ids]

    return await asyncio.gather(*map(one, requests()))


async def test_two_ranks_draw_the_tokens_of_one_process(config: EngineConfig) -> None:
    seen: list[tuple[int, int]] = []
    group = WorkerGroup(config, RANK_OPTIONS, lambda done, total: seen.append((done, total)))
    engine = LLMEngine(config, group)
    assert (await engine.start()).num_blocks == 64
    together = await tokens(engine)
    await engine.close()
    assert seen[-1][0] == seen[-1][1] > 0, "the progress of loading ends at its end"
    assert sorted(group.pids) == [0, 1]
    assert [(use.process, use.pid) for use in group.memory] == [(f"rank {rank}", group.pids[rank]) for rank in (0, 1)]
    assert all(use.parts[MemoryPart.KV_CACHE] == 64 * bytes_per_block(config) for use in group.memory)
    twin_config = replace(config, tensor_parallel=1)
    twin = LLMEngine(twin_config, InlineExecutor(twin_config))
    await twin.start()
    assert together == await tokens(twin)
    await twin.close()


async def test_a_step_is_recorded_by_every_rank_and_draws_the_same(config: EngineConfig) -> None:
    group = WorkerGroup(config, RANK_OPTIONS)
    engine = LLMEngine(config, group)
    await engine.start()
    assert await group.recorder.record(0.1) == (), "idle"
    expected = await tokens(engine)
    asked = asyncio.create_task(group.recorder.record(30.0))
    await asyncio.sleep(0)
    assert await tokens(engine) == expected
    ranks = await asked
    assert [rank.rank for rank in ranks] == [0, 1]
    assert len({rank.step for rank in ranks}) == 1
    for rank in ranks:
        assert {event.rank for event in rank.events} == {rank.rank}
        assert {event.lane.value for event in rank.events} == {"compute", "network"}
    assert abs(ranks[0].began - ranks[1].began) < 60, "both read the machine's clock"
    await engine.close()


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_killed_rank_ends_every_request_at_once_by_name(config: EngineConfig, rank: int) -> None:
    group = WorkerGroup(config, RANK_OPTIONS)
    engine = LLMEngine(config, group)
    await engine.start()
    sampling = SamplingParams(max_tokens=200, ignore_eos=True)
    request = Request(request_id=RequestId("long"), prompt_token_ids=(1, 2, 3), sampling=sampling)
    with pytest.raises(EngineDeadError, match=f"Rank {rank} died"):
        async for _ in engine.generate(request):
            os.kill(group.pids[rank], signal.SIGKILL)
    with pytest.raises(EngineDeadError, match=f"Rank {rank} died"):
        engine.submit(request, None)  # type: ignore[arg-type]
    await engine.close()


async def test_an_idle_rank_that_dies_is_noticed(config: EngineConfig) -> None:
    group = WorkerGroup(config, RANK_OPTIONS)
    await asyncio.to_thread(group.start)
    group.watch()
    os.kill(group.pids[1], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while group.death is None:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    assert "Rank 1 died" in str(group.death)
    await asyncio.to_thread(group.close)


def test_a_checkpoint_that_cannot_be_loaded_keeps_its_error(config: EngineConfig, tmp_path: Path) -> None:
    for file in config.checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    group = WorkerGroup(replace(config, checkpoint=tmp_path), RANK_OPTIONS)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        group.start()
    assert group._folder is None, "what was made for the ranks is gone"


def test_a_start_that_fails_before_any_rank_lives_leaves_nothing(
    config: EngineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    too_long = tmp_path / ("x" * 100)  # for the path of a Unix socket
    too_long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(too_long))
    with pytest.raises(EngineDeadError, match="too long"):
        WorkerGroup(config, RANK_OPTIONS).start()
    assert list(too_long.iterdir()) == []


@pytest.mark.parametrize(
    "errors",
    [
        (CapacityError("Another rank of the group has no room."), CapacityError("no room")),
        (EngineDeadError("Rank 0 failed while starting: lost a peer"), CapacityError("no room")),
        (CapacityError("no room"), EngineDeadError("Rank 1 failed while starting: lost a peer")),
    ],
)
def test_a_start_that_fails_tells_the_cause(tmp_path: Path, errors: tuple[NanoserveError, NanoserveError]) -> None:
    path = str(tmp_path / "engine")
    links: dict[int, RankLink] = {}
    connections: list[RankLink] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        sockets = [RankSocket(path) for _ in errors]
        for rank, engine in enumerate(sockets):
            engine.send(Hello(rank, pid=rank))
        timers = [
            threading.Timer(0.3 + 0.2 * rank, engine.send, [Failed(errors[rank])])
            for rank, engine in enumerate(sockets)
        ]
        for timer in timers:
            timer.start()
        with pytest.raises(CapacityError, match=r"^no room$"):
            _Start(listener, [ray.put(rank) for rank in range(2)], None).wait(connections, links, {})
        for timer in timers:
            timer.join()
    for connection in connections:
        connection.close()
    for engine in sockets:
        engine._socket.close()


async def test_what_cannot_be_understood_ends_the_group(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def receive() -> None:
        raise pickle.UnpicklingError("not a message")

    group = WorkerGroup(config, RANK_OPTIONS)
    await asyncio.to_thread(group.start)
    group.watch()
    waiting = asyncio.get_running_loop().create_future()
    group._waiting.append(waiting)
    monkeypatch.setattr(group._links[0], "receive", receive)
    group._on_readable(0)
    with pytest.raises(EngineDeadError, match="Rank 0 sent what nobody can use: UnpicklingError"):
        await asyncio.wait_for(waiting, 60)
    group._on_readable(0)
    await asyncio.to_thread(group.close)


def test_closing_leaves_no_process(config: EngineConfig) -> None:
    group = WorkerGroup(config, RANK_OPTIONS)
    group.start()
    processes = list(group.pids.values())
    group.close()
    group.close()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in processes):
        assert time.monotonic() < deadline
        time.sleep(0.05)
