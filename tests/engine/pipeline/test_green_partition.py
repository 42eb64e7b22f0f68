"""A device split in two by a driver that is told what to answer."""

from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.pipeline.green_partition import GRANULE, GreenPartition, GreenPartitionError

DEVICE = torch.device("cuda", 0)


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_NOT_SUPPORTED = 801


class FakeDriver:
    """cuda.bindings.driver as far as a partition needs it; `refused` names the function that fails."""

    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)
    CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)

    def __init__(self, refused: str = "") -> None:
        self.refused = refused
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            if name == self.refused:
                return (Status.CUDA_ERROR_NOT_SUPPORTED,) + (None,) * (3 if "Split" in name else 1)
            return Status.CUDA_SUCCESS, *getattr(self, f"answer_{name}")(*arguments)

        return call

    def answer_cuDeviceGet(self, index: int) -> tuple[Any, ...]:  # noqa: N802
        return (f"device {index}",)

    def answer_cuDeviceGetDevResource(self, device: str, kind: int) -> tuple[Any, ...]:  # noqa: N802
        return (self._resource(132),)

    def answer_cuDevSmResourceSplitByCount(self, groups: int, whole: Any, flags: int, count: int) -> tuple[Any, ...]:  # noqa: N802
        given = -(-count // GRANULE) * GRANULE
        return [self._resource(given)], groups, self._resource(whole.sm.smCount - given)

    def answer_cuDevResourceGenerateDesc(self, resources: list[Any], count: int) -> tuple[Any, ...]:  # noqa: N802
        assert len(resources) == count
        return (f"{resources[0].sm.smCount} multiprocessors",)

    def answer_cuGreenCtxCreate(self, description: str, device: str, flags: int) -> tuple[Any, ...]:  # noqa: N802
        return (f"context of {description}",)

    def answer_cuGreenCtxStreamCreate(self, context: str, flags: int, priority: int) -> tuple[Any, ...]:  # noqa: N802
        return (1000 + len(self.calls),)

    def answer_cuGetErrorName(self, status: Status) -> tuple[Any, ...]:  # noqa: N802
        return (status.name.encode(),)

    def answer_cuGetErrorString(self, status: Status) -> tuple[Any, ...]:  # noqa: N802
        return (b"operation not supported",)

    @staticmethod
    def _resource(num_sms: int) -> Any:
        return SimpleNamespace(sm=SimpleNamespace(smCount=num_sms))


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


@pytest.mark.parametrize("name", ["cuDevSmResourceSplitByCount", "cuGreenCtxCreate", "cuGreenCtxStreamCreate"])
def test_a_refusal_has_the_words_of_the_driver(name: str) -> None:
    with pytest.raises(GreenPartitionError, match=f"{name}.*CUDA_ERROR_NOT_SUPPORTED: operation not supported"):
        GreenPartition.split(DEVICE, 40, driver=FakeDriver(name))


def test_a_missing_package_and_an_old_one_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GreenPartitionError, match="has no cuDeviceGet"):
        GreenPartition.split(DEVICE, 40, driver=SimpleNamespace())

    def absent(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(GreenPartitionError, match="not installed"):
        GreenPartition.split(DEVICE, 40)
