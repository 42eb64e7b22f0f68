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
    """The flat int64 and float64 `arrays` as tensors of `device`, without waiting for the copy."""
    num_elements = sum(array.size for array in arrays.values())
    buffer = torch.empty(num_elements, dtype=torch.int64, pin_memory=device.type == "cuda")
    if arrays:
        np.concatenate([array.view(np.int64) for array in arrays.values()], out=buffer.numpy())
    on_device = buffer.to(device, non_blocking=True)
    parts = torch.split_with_sizes(on_device, [array.size for array in arrays.values()])
    return {
        name: part.view(torch.float64) if array.dtype == np.float64 else part
        for (name, array), part in zip(arrays.items(), parts, strict=True)
    }
