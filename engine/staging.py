"""Staging: the host arrays of one step travel to the device together, in one copy.

One pinned buffer and one asynchronous copy replace a dozen small ones; on the CPU the buffer itself is the result.
Pinned buffers come from torch's caching host allocator, which reuses one only after its copy has ended, so that a
step can be staged while the previous one is still queued.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

HostArray = NDArray[np.int64] | NDArray[np.float64]


def stage(arrays: Mapping[str, HostArray], device: torch.device) -> dict[str, Tensor]:
    """The flat int64 and float64 `arrays` as tensors of `device`, without waiting for the copy.

    An array that has several names travels once, and its names share a tensor.
    """
    distinct = {id(array): array for array in arrays.values()}
    sizes = [array.size for array in distinct.values()]
    buffer = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    if distinct:
        np.concatenate([array.view(np.int64) for array in distinct.values()], out=buffer.numpy())
    on_device = buffer if device.type == "cpu" else buffer.to(device, non_blocking=True)
    parts = torch.split_with_sizes(on_device, sizes)
    tensors = {
        key: part.view(torch.float64) if array.dtype == np.float64 else part
        for (key, array), part in zip(distinct.items(), parts, strict=True)
    }
    return {name: tensors[id(array)] for name, array in arrays.items()}
