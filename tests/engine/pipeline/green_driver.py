"""A driver that splits a device in two, as it is told. Imported by tests."""

from enum import IntEnum
from types import SimpleNamespace
from typing import Any

from engine.pipeline.green_partition import GRANULE


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_NOT_SUPPORTED = 801


class FakeDriver:
    """cuda.bindings.driver as far as a partition needs it; `refused` names the function that fails."""

    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)
    CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)

    def __init__(self, refused: str = "", num_sms: int = 132) -> None:
        self.refused = refused
        self.num_sms = num_sms
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
        return (self._resource(self.num_sms),)

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

    def answer_cuStreamDestroy(self, stream: int) -> tuple[Any, ...]:  # noqa: N802
        return ()

    def answer_cuGreenCtxDestroy(self, context: str) -> tuple[Any, ...]:  # noqa: N802
        return ()

    def answer_cuGetErrorName(self, status: Status) -> tuple[Any, ...]:  # noqa: N802
        return (status.name.encode(),)

    def answer_cuGetErrorString(self, status: Status) -> tuple[Any, ...]:  # noqa: N802
        return (b"operation not supported",)

    @staticmethod
    def _resource(num_sms: int) -> Any:
        return SimpleNamespace(sm=SimpleNamespace(smCount=num_sms))
