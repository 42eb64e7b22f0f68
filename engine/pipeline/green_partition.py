"""`GreenPartition`: the multiprocessors of a CUDA device in two parts, and a stream that keeps to each.

torch 2.11's own green contexts always take the first multiprocessors, so two of them overlap; the driver splits them
into a group and what remains (cuda.bindings, which comes with torch). A part restricts the work of its own stream and
reserves nothing: whatever runs at the same time must be on the other stream. Kernels that launch as many programs as
the device has multiprocessors must be told of their part's number. A captured graph keeps the part that a kernel was
captured on, so a partition must outlive its graphs; whoever made it destroys it after them.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import torch

# Hopper hands multiprocessors out in groups of eight, and eight at least.
GRANULE = 8


class GreenPartitionError(RuntimeError):
    """The driver, or the package that calls it, does not split the device; the message is its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GreenPart:
    """A stream, and the number of multiprocessors that its work runs on; both belong to the green `context`."""

    stream: torch.cuda.Stream
    num_sms: int
    context: object

    def destroy(self, calls: "_Calls") -> None:
        """Raises `GreenPartitionError` where the driver refuses."""
        calls("cuStreamDestroy", self.stream.cuda_stream)
        calls("cuGreenCtxDestroy", self.context)


@dataclass(frozen=True, slots=True, kw_only=True)
class GreenPartition:
    """`first` has the multiprocessors asked for, rounded up to a multiple of GRANULE, and `second` the others."""

    first: GreenPart
    second: GreenPart
    device: torch.device
    driver: Any

    @classmethod
    def split(
        cls, device: torch.device, num_first: int, *, priorities: tuple[int, int] = (0, 0), driver: Any = None
    ) -> "GreenPartition":
        """Split the device, the current one if it has no number; a lower priority goes first. `driver` is
        `cuda.bindings.driver`.

        Raises `GreenPartitionError` where that is missing, or refuses.
        """
        driver = driver or _bindings()
        torch.cuda.synchronize(device)  # makes the device's primary context, in which kernels are loaded
        calls = _Calls(driver)
        number = calls("cuDeviceGet", torch.cuda.current_device() if device.index is None else device.index)
        if not hasattr(driver, "CUdevResourceType"):
            raise GreenPartitionError("cuda.bindings.driver has no CUdevResourceType: it is older than green contexts.")
        whole = calls("cuDeviceGetDevResource", number, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM)
        groups, _, rest = calls("cuDevSmResourceSplitByCount", 1, whole, 0, num_first)
        if len(groups) != 1:
            raise GreenPartitionError(f"The driver made {len(groups)} groups of {num_first} multiprocessors, not 1.")
        first = _part(calls, driver, number, groups[0], device, priorities[0])
        try:
            second = _part(calls, driver, number, rest, device, priorities[1])
        except GreenPartitionError:
            first.destroy(calls)
            raise
        return cls(first=first, second=second, device=device, driver=driver)

    def destroy(self) -> None:
        """Wait for the device, then give both parts back: nothing may be queued on their streams any more.

        Raises `GreenPartitionError` where the driver refuses; it is asked for both.
        """
        torch.cuda.synchronize(self.device)
        calls = _Calls(self.driver)
        try:
            self.first.destroy(calls)
        finally:
            self.second.destroy(calls)


def _part(
    calls: "_Calls", driver: Any, number: object, resource: Any, device: torch.device, priority: int
) -> GreenPart:
    description = calls("cuDevResourceGenerateDesc", [resource], 1)
    default = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
    context = calls("cuGreenCtxCreate", description, number, default)
    flag = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
    try:
        handle = calls("cuGreenCtxStreamCreate", context, flag, priority)
    except GreenPartitionError:
        calls("cuGreenCtxDestroy", context)
        raise
    stream = torch.cuda.ExternalStream(int(handle), device)  # type: ignore[no-untyped-call]
    return GreenPart(stream=stream, num_sms=int(resource.sm.smCount), context=context)


class _Calls:
    """Calls functions of the driver, whose answers begin with a status."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    def __call__(self, name: str, *arguments: object) -> Any:
        """What the answer holds after the status: one thing, or several."""
        function = getattr(self._driver, name, None)
        if function is None:
            raise GreenPartitionError(f"cuda.bindings.driver has no {name}.")
        status, *answer = function(*arguments)
        if int(status) != 0:
            raise GreenPartitionError(f"{name}{arguments[-1:]} was refused: {self._described(status)}")
        return answer[0] if len(answer) == 1 else answer or None

    def _described(self, status: Any) -> str:
        """The driver's own words, where it has some."""
        words = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            found, text = getattr(self._driver, name)(status)
            if int(found) == 0 and text:
                words.append(text.decode() if isinstance(text, bytes) else str(text))
        return ": ".join(words) or str(status)


def _bindings() -> Any:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise GreenPartitionError(f"cuda.bindings is not installed: {error}") from error
