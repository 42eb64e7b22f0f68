"""The ways between GPUs, on recorded fakes: which is taken for what, how ranks agree, what is said where one lacks."""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.config import DeviceKind, EngineConfig, PipelineMode
from engine.errors import ConfigError
from engine.model_config import DType
from engine.network import network_of
from engine.pipeline.rank_agreement import RankAgreement
from engine.symmetric_sums import SymmetricSums, last_won, unsupported
from engine.tensor_parallel import TensorParallel

MakeConfig = Callable[..., EngineConfig]
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
HOUR = timedelta(hours=1)


class FakeOptions:
    def __init__(self) -> None:
        self.config = SimpleNamespace()
        self.is_high_priority_stream = False


class Machine:
    """Two GPUs that are not there: `log` has what was asked of them, `others` how attempts ended on the other rank."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.failure = ""
        self.multicast_ptr = 0
        self.others: list[float] = []
        self.machines: set[int] = set()
        self.groups: list[FakeOptions] = []

    def network(self, config: EngineConfig, rank: int = 0) -> TensorParallel:
        network = network_of(config, rank, CUDA, HOUR)
        self.log.clear()
        return network

    def empty(self, num_elements: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.failure == "empty":
            raise RuntimeError("CUDA driver error: invalid device ordinal\nmore")
        return torch.zeros(num_elements, dtype=dtype)

    def rendezvous(self, buffer: Tensor, group_name: str) -> Any:
        if self.failure == "rendezvous":
            raise RuntimeError("no peer access between the devices.")
        assert group_name == "0"
        return SimpleNamespace(multicast_ptr=self.multicast_ptr)

    def smallest(self, numbers: list[float]) -> list[float]:
        if numbers[0] > 1.0:  # the name of a machine
            return [min(numbers[0], *self.machines)] if self.machines else numbers
        return [min(number, self.others.pop(0) if self.others else 1.0) for number in numbers]

    def new_group(self, **settings: Any) -> str:
        assert settings["backend"] == "nccl" and settings["timeout"] == HOUR
        self.groups.append(settings["pg_options"])
        return "narrow"

    def all_reduce(self, partial: Tensor, group: Any, async_op: bool = False) -> Any:
        self.log.append(f"{group if isinstance(group, str) else 'wide'} {partial.numel()}")
        return SimpleNamespace(wait=lambda: None) if async_op else None

    def operation(self, name: str) -> Callable[..., None]:
        def run(shared: Tensor, kind: str, group_name: str, *output: Tensor) -> None:
            assert (kind, group_name) == ("sum", "0")
            self.log.append(f"{name} {shared.numel()}")
            sums = 2 * shared  # the other rank has the same
            (output[0] if output else shared).copy_(sums + 1 if self.failure == name else sums)

        return run


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    machine = Machine()
    wide = SimpleNamespace(group_name="0")
    names = "one_shot_all_reduce_out", "two_shot_all_reduce_out", "multimem_all_reduce_"
    operations = {name: machine.operation(name) for name in (*names, "multimem_one_shot_all_reduce_out")}
    monkeypatch.setattr("torch.distributed._symmetric_memory.empty", machine.empty)
    monkeypatch.setattr("torch.distributed._symmetric_memory.rendezvous", machine.rendezvous)
    monkeypatch.setattr(torch.ops, "symm_mem", SimpleNamespace(**operations))
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=FakeOptions), raising=False)
    monkeypatch.setattr(dist, "new_group", machine.new_group)
    monkeypatch.setattr(dist, "all_reduce", machine.all_reduce)
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=wide))
    monkeypatch.setattr(RankAgreement, "largest", lambda _, numbers: list(numbers))
    monkeypatch.setattr(RankAgreement, "smallest", lambda _, numbers: machine.smallest(numbers))
    yield machine


@pytest.fixture
def pair(engine_config: MakeConfig) -> EngineConfig:
    """Two ranks on GPUs, steps of 1,024 x 64 bfloat16 elements at most: 128 KiB."""
    return engine_config(
        device=DeviceKind.CUDA,
        dtype=DType.BFLOAT16,
        tensor_parallel=2,
        max_batch_tokens=16384,
        symmetric_bytes=2**20,
    )


@pytest.mark.parametrize("has_multicast", [False, True])
def test_sums_take_the_way_of_their_size(machine: Machine, pair: EngineConfig, has_multicast: bool) -> None:
    machine.multicast_ptr = 4096 if has_multicast else 0
    network = machine.network(pair)
    for num_elements in (8, 16, 2**17, 2**18, 2**19, 2**20):
        message = torch.ones(num_elements // 8, 8, dtype=torch.bfloat16)
        assert network.all_reduce(message) is message
        is_symmetric = 16 <= num_elements <= 2**19
        assert message[0, 0] == message[-1, -1] == (2 if is_symmetric else 1)
    short, long = ("multimem_one_shot_all_reduce_out", "multimem_all_reduce_") if has_multicast else (
        "one_shot_all_reduce_out",
        "two_shot_all_reduce_out",
    )  # fmt: skip
    expected = ["wide 8", f"{short} 16", f"{short} 131072", f"{long} 262144", f"{long} 524288", "wide 1048576"]
    assert machine.log == expected


def test_other_messages_go_through_nccl(machine: Machine, pair: EngineConfig) -> None:
    network = machine.network(pair)
    network.all_reduce(torch.ones(4, 16))  # float32
    network.all_reduce(torch.ones(16, 4, dtype=torch.bfloat16).t())
    assert machine.log == ["wide 64", "wide 64"]


def test_collectives_beside_others_take_few_units(machine: Machine, pair: EngineConfig) -> None:
    network = machine.network(replace(pair, network_ctas=5, symmetric_bytes=0))
    (options,) = machine.groups
    assert (options.config.min_ctas, options.config.max_ctas, options.is_high_priority_stream) == (1, 5, True)
    for is_beside in (False, True):
        assert network.start_all_reduce(torch.ones(3), is_beside=is_beside) is not None
    assert machine.log == ["wide 3", "narrow 3"]
    sequential = machine.network(replace(pair, pipeline=PipelineMode.SEQUENTIAL, symmetric_bytes=0))
    assert sequential.narrow_group is None and len(machine.groups) == 1
    sequential.start_all_reduce(torch.ones(3), is_beside=True)
    assert machine.log == ["wide 3"]


def test_a_small_sum_is_there_at_once_and_a_silent_one_is_none(machine: Machine, pair: EngineConfig) -> None:
    network, message = machine.network(pair), torch.ones(16, dtype=torch.bfloat16)
    with network.silent():
        assert network.start_all_reduce(message) is None and message[0] == 1
        assert network.all_gather(message).shape == (32,)
    assert machine.log == []
    assert network.start_all_reduce(message) is None and message[0] == 2


@pytest.mark.parametrize(
    ("failure", "others", "words"),
    [
        ("empty", [], "memory for them could not be had: CUDA driver error: invalid device ordinal."),
        ("rendezvous", [], "ranks cannot see each other's memory: no peer access between the devices."),
        ("two_shot_all_reduce_out", [], "tried out, they fail: ones of 2 ranks add up to 3."),
        ("", [0.0, 0.0], "another rank cannot sum through symmetric memory."),
        ("", [1.0, 0.0], "another rank cannot sum through symmetric memory."),
        ("", [1.0, 1.0, 1.0, 0.0], "another rank cannot sum through symmetric memory."),
    ],
)
def test_without_symmetric_memory_nccl_sums_everything_and_once_it_is_said_why(
    machine: Machine,
    pair: EngineConfig,
    caplog: pytest.LogCaptureFixture,
    failure: str,
    others: list[float],
    words: str,
) -> None:
    machine.failure, machine.others = failure, others
    network = machine.network(pair)
    assert network.small_sums is None
    assert [record.message for record in caplog.records] == [f"NCCL sums small messages, too: {words}"]
    network.all_reduce(torch.ones(16, dtype=torch.bfloat16))
    assert machine.log == ["wide 16"]


def test_ranks_on_several_machines_share_no_memory(
    machine: Machine, pair: EngineConfig, caplog: pytest.LogCaptureFixture
) -> None:
    machine.machines = {2}
    assert machine.network(pair).small_sums is None
    assert [record.message for record in caplog.records] == [
        "NCCL sums small messages, too: the ranks are on several machines."
    ]


@pytest.mark.parametrize("num_visible", [1, 2])
def test_a_gpu_that_is_a_ranks_own_is_not_taken_for_a_shared_one(
    machine: Machine, pair: EngineConfig, monkeypatch: pytest.MonkeyPatch, num_visible: int
) -> None:
    name = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_visible)
    machine.network(pair)
    assert os.environ.get(name) == ("1" if num_visible == 1 else None)


def test_half_precision_is_not_summed_so(
    machine: Machine, pair: EngineConfig, caplog: pytest.LogCaptureFixture
) -> None:
    assert machine.network(replace(pair, dtype=DType.FLOAT16)).small_sums is None
    assert "symmetric memory sums bfloat16 and float32, not float16" in caplog.text
    assert unsupported(torch.bfloat16) is None


def test_links_add_up_only_where_they_do_for_every_rank(machine: Machine, pair: EngineConfig) -> None:
    machine.multicast_ptr, machine.others = 4096, [1.0, 1.0, 0.0]
    machine.network(pair).all_reduce(torch.ones(16, dtype=torch.bfloat16))
    assert machine.log == ["one_shot_all_reduce_out 16"]


def test_the_limit_is_measured_unless_given(
    machine: Machine, pair: EngineConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ours take 5 us and 1 us for every 8 KiB, theirs 10 us and a quarter of that: 8 KiB to 32 KiB are won."""

    def seconds(run: Callable[[], object]) -> float:
        machine.log.clear()
        run()
        (entry,) = machine.log
        way, num_elements = entry.split()
        size = int(num_elements) * 2 / 8192
        return 10 + size / 4 if way == "wide" else 5 + size

    monkeypatch.setattr("engine.symmetric_sums._seconds", seconds)
    real = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *sizes, **settings: real(*sizes, **{**settings, "device": "cpu"}))
    with caplog.at_level(logging.INFO):
        sums = machine.network(replace(pair, symmetric_bytes=None)).small_sums
    assert isinstance(sums, SymmetricSums) and sums.limit == 32768
    assert "up to 32768 bytes go through symmetric memory" in caplog.text


@pytest.mark.parametrize(
    ("ours", "expected"), [([1, 1, 1], 4), ([1, 3, 1], 1), ([2, 1, 1], 0), ([1, 1, 5], 2), ([], 0)]
)
def test_what_is_won_ends_where_it_is_first_lost(ours: list[float], expected: int) -> None:
    sizes = [1, 2, 4][: len(ours)]
    assert last_won(sizes, ours, [2.0] * len(ours)) == expected


def test_a_group_on_cpus_has_one_way(machine: Machine, pair: EngineConfig) -> None:
    network = network_of(pair, 1, CPU, HOUR)
    assert (network.rank, network.size, network.narrow_group, network.small_sums) == (1, 2, None, None)


@pytest.mark.parametrize("name", ["network_ctas", "symmetric_bytes"])
def test_settings_are_checked(engine_config: MakeConfig, name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"{name} must be .*-1: " if name == "network_ctas" else rf"{name} must be 0 "
    ):
        engine_config(**{name: -1})
    with pytest.raises(ConfigError, match=r"network_ctas must be 1\.\.32, but is 33: so many execution units may a"):
        engine_config(network_ctas=33)
