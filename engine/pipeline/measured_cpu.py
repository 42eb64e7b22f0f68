"""The CPU of this machine as a `DeviceSpec`, from two measurements: the peak of its products and its memory's rate.

Loopback and other links are for the profiler to measure, so the network's rate is only what the caller knows of it.
"""

import os
import statistics
import time

import torch

from engine.config import DeviceKind
from engine.gemm_peak import SQUARES, linear_flops_per_second, using_threads
from engine.model_config import DType
from engine.pipeline.devices import CPU, DeviceSpec

COPIED_BYTES = 128 * 2**20
NUM_COPIES = 7


def measure_cpu(dtype: DType, num_threads: int, network_bandwidth: float | None = None) -> DeviceSpec:
    """Takes a few seconds and 256 MiB, with as many threads as a rank will have.

    Rates are for numbers of `dtype` only. `network_bandwidth` is in bytes per second, one way, if it is known.
    """
    with using_threads(num_threads), torch.inference_mode():
        peak = max(
            linear_flops_per_second((size, size, size), getattr(torch, dtype.value), torch.device("cpu"))
            for size in SQUARES[DeviceKind.CPU]
        )
        memory_bandwidth = _copy_bandwidth()
    return DeviceSpec(
        name=CPU,
        source=f"measured on this machine with {num_threads} threads",
        memory_bytes=float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
        memory_bandwidth=memory_bandwidth,
        flops_per_second={dtype.num_bytes: peak},
        network_bandwidth=network_bandwidth,
        num_units=num_threads,
        sharing=None,
    )


def _copy_bandwidth() -> float:
    """Bytes read and written per second, by the median copy of an array that no cache holds."""
    source, target = torch.ones(COPIED_BYTES, dtype=torch.uint8), torch.zeros(COPIED_BYTES, dtype=torch.uint8)
    samples: list[float] = []
    for _ in range(NUM_COPIES):
        started = time.perf_counter()
        target.copy_(source)
        samples.append(time.perf_counter() - started)
    return 2 * COPIED_BYTES / statistics.median(samples)
