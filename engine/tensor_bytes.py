"""`tensor_bytes`: the bytes of all tensors that an object of the engine holds, found by following its attributes.

For accounts of memory: what somebody adds to a rank's state is counted without being told of.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn


def tensor_bytes(holder: Any) -> dict[str, int]:
    """Bytes by device type ("cpu", "cuda"); memory that several tensors share counts once."""
    totals: dict[str, int] = {}
    counted: set[tuple[str, int]] = set()
    for array in _arrays(holder, set()):
        if isinstance(array, np.ndarray):
            device, address, num_bytes = "cpu", array.ctypes.data, array.nbytes
        elif array.is_mkldnn:  # its layout is its own, and its size that of the elements
            device, address, num_bytes = "cpu", id(array), array.numel() * array.element_size()
        else:
            storage = array.untyped_storage()
            device, address, num_bytes = array.device.type, storage.data_ptr(), storage.nbytes()
        if (device, address) not in counted:
            counted.add((device, address))
            totals[device] = totals.get(device, 0) + num_bytes
    return totals


def _arrays(holder: Any, seen: set[int]) -> Iterator[Any]:
    if id(holder) in seen:
        return
    seen.add(id(holder))
    if isinstance(holder, Tensor | np.ndarray):
        yield holder
    elif isinstance(holder, Mapping):
        for value in holder.values():
            yield from _arrays(value, seen)
    elif isinstance(holder, list | tuple | set | frozenset):
        for value in holder:
            yield from _arrays(value, seen)
    elif isinstance(holder, nn.Module) or type(holder).__module__.startswith("engine."):
        yield from _arrays(getattr(holder, "__dict__", {}), seen)
        for name in getattr(type(holder), "__slots__", ()):
            yield from _arrays(getattr(holder, name, None), seen)
