"""`BenchDevice`: what the parts know of the device that they measure, and what they time with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from gpu_parts.timing import GraphTimer, Timer

Inputs = TypeVar("Inputs")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchDevice:
    """`cache_bytes` is the size of the L2."""

    device: torch.device
    num_sms: int
    cache_bytes: int
    timer: Timer

    @classmethod
    def current(cls) -> "BenchDevice":
        """The current CUDA device."""
        device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(device)
        return cls(
            device=device,
            num_sms=properties.multi_processor_count,
            cache_bytes=properties.L2_cache_size,
            timer=GraphTimer(device),
        )

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def rotated(self, make: Callable[[], Inputs], num_bytes: int, most: int = 16) -> list[Inputs]:
        """As many sets of inputs of `num_bytes` each as are three times the L2 together, at least two."""
        count = max(2, min(most, -(-3 * self.cache_bytes // max(1, num_bytes))))
        return [make() for _ in range(count)]

    @contextmanager
    def limited_to(self, num_sms: int) -> Iterator[None]:
        """What libraries launch inside uses so many SMs, where they honour it: cublasLt and torch's scaled products.

        torch reads the setting at the launch, so a captured graph keeps it.
        """
        if not self.is_cuda:
            yield
            return
        before = torch.backends.cuda.preferred_blas_library()
        torch.backends.cuda.preferred_blas_library("cublaslt")
        torch._C._set_sm_carveout_experimental(self.num_sms - num_sms if num_sms < self.num_sms else None)
        try:
            yield
        finally:
            torch._C._set_sm_carveout_experimental(None)
            torch.backends.cuda.preferred_blas_library(before)
