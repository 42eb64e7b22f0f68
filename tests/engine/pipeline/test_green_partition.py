"""A device split in two by a driver that is told what to answer."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.pipeline.green_partition import GreenPartition, GreenPartitionError
from tests.engine.pipeline.green_driver import FakeDriver

DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def torch_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: SimpleNamespace(cuda_stream=handle))


def test_two_parts_have_all_multiprocessors_and_a_stream_each() -> None:
    driver = FakeDriver()
    partition = GreenPartition.split(DEVICE, 90, priorities=(0, -1), driver=driver)
    assert (partition.first.num_sms, partition.second.num_sms) == (96, 36)
    assert partition.first.stream.cuda_stream != partition.second.stream.cuda_stream
    assert partition.first.context == "context of 96 multiprocessors"
    priorities = [call[-1] for call in driver.calls if call[0] == "cuGreenCtxStreamCreate"]
    assert priorities == [0, -1]
    (split,) = (call for call in driver.calls if call[0] == "cuDevSmResourceSplitByCount")
    assert (split[1], split[3], split[4]) == (1, 0, 90)


def test_a_device_without_a_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    driver = FakeDriver()
    for device, number in ((torch.device("cuda"), 3), (torch.device("cuda", 0), 0)):
        GreenPartition.split(device, 40, driver=driver)
        assert [call[1] for call in driver.calls if call[0] == "cuDeviceGet"][-1] == number


@pytest.mark.parametrize("name", ["cuDevSmResourceSplitByCount", "cuGreenCtxCreate", "cuGreenCtxStreamCreate"])
def test_a_refusal_has_the_words_of_the_driver(name: str) -> None:
    with pytest.raises(GreenPartitionError, match=f"{name}.*CUDA_ERROR_NOT_SUPPORTED: operation not supported"):
        GreenPartition.split(DEVICE, 40, driver=FakeDriver(name))


def test_a_missing_package_and_an_old_one_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GreenPartitionError, match="has no cuDeviceGet"):
        GreenPartition.split(DEVICE, 40, driver=SimpleNamespace())

    old = SimpleNamespace(cuDeviceGet=lambda index: (0, index))
    with pytest.raises(GreenPartitionError, match="older than green contexts"):
        GreenPartition.split(DEVICE, 40, driver=old)

    def absent(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(GreenPartitionError, match="not installed"):
        GreenPartition.split(DEVICE, 40)


def test_what_was_made_is_given_back() -> None:
    driver = FakeDriver()
    partition = GreenPartition.split(DEVICE, 90, driver=driver)
    driver.calls.clear()
    partition.destroy()
    streams = [part.stream.cuda_stream for part in (partition.first, partition.second)]
    assert driver.calls == [
        ("cuStreamDestroy", streams[0]), ("cuGreenCtxDestroy", "context of 96 multiprocessors"),
        ("cuStreamDestroy", streams[1]), ("cuGreenCtxDestroy", "context of 36 multiprocessors"),
    ]  # fmt: skip


def test_the_second_part_is_given_back_though_the_first_is_not() -> None:
    driver = FakeDriver()
    partition = GreenPartition.split(DEVICE, 90, driver=driver)
    driver.refused = "cuStreamDestroy"
    driver.calls.clear()
    with pytest.raises(GreenPartitionError, match="cuStreamDestroy"):
        partition.destroy()
    assert sum(call[0] == "cuStreamDestroy" for call in driver.calls) == 2


@pytest.mark.parametrize("number", [0, 1])
def test_a_split_that_is_refused_half_way_leaves_nothing(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver()
    real = driver.answer_cuGreenCtxStreamCreate
    made: list[int] = []

    def refuse_later(*arguments: Any) -> tuple[Any, ...]:
        made.append(1)
        if len(made) > number:
            raise GreenPartitionError("no more streams")
        return real(*arguments)

    monkeypatch.setattr(driver, "answer_cuGreenCtxStreamCreate", refuse_later)
    with pytest.raises(GreenPartitionError, match="no more streams"):
        GreenPartition.split(DEVICE, 90, driver=driver)
    names = [call[0] for call in driver.calls]
    assert names.count("cuGreenCtxDestroy") == names.count("cuGreenCtxCreate") == 1 + number
    assert names.count("cuStreamDestroy") == number
