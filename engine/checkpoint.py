"""`Checkpoint`: which tensors a checkpoint folder holds, of what shape and in which file, from safetensors headers.

No tensor data is read and torch is not needed: a safetensors file starts with eight bytes that tell the length of a
JSON header, which names each tensor's dtype, shape and bytes (https://github.com/huggingface/safetensors#format).
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engine.config_json import ConfigJson
from engine.errors import CheckpointError

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"

_MAX_HEADER_BYTES: Final = 100_000_000  # the limit of the safetensors library
FP8: Final = "F8_E4M3"  # as safetensors calls float8_e4m3fn
_ELEMENT_BYTES: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, FP8: 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a checkpoint; `dtype` by its safetensors name."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_float(self) -> bool:
        """Whether it holds floating-point numbers that can be loaded, those in FP8 with the scales beside them."""
        return self.dtype in _ELEMENT_BYTES

    @property
    def element_bytes(self) -> int:
        """Bytes of one element; of floating-point tensors only."""
        return _ELEMENT_BYTES[self.dtype]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor; of floating-point tensors only."""
        return math.prod(self.shape) * self.element_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The tensors of a checkpoint by name."""

    path: Path
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Read the headers of model.safetensors, or of the files that model.safetensors.index.json lists.

        Raises `CheckpointError` when neither is there, or a file is missing, cut short or malformed.
        """
        if (path / SINGLE_FILE).exists():
            return cls(path=path, tensors=dict(_read_header(path / SINGLE_FILE)))
        if not (path / INDEX_FILE).exists():
            raise CheckpointError(_nothing_to_load(path))
        tensors: dict[str, StoredTensor] = {}
        for file in _indexed_files(path):
            tensors.update(_read_header(path / file))
        return cls(path=path, tensors=tensors)


def _nothing_to_load(path: Path) -> str:
    if not path.is_dir():
        return f"{path} is not a folder; a Hugging Face checkpoint folder is needed."
    message = f"{path} holds neither {SINGLE_FILE} nor {INDEX_FILE}"
    pickles = sorted(file.name for file in path.glob("*.bin"))
    if pickles:
        return f"{message}, only {pickles[0]}: pickled weights are not loaded; convert them to safetensors."
    return f"{message}."


def _indexed_files(path: Path) -> list[str]:
    index = ConfigJson.read(path / INDEX_FILE).object("weight_map")
    files = sorted({index.text(name) for name in index.names()})
    for file in files:
        if Path(file).name != file:
            raise CheckpointError(f"{path / INDEX_FILE}: {file!r} is not the name of a file beside it.")
    return files


def _read_header(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        with file.open("rb") as stream:
            num_file_bytes = stream.seek(0, 2)
            stream.seek(0)
            length = int.from_bytes(stream.read(8), "little")
            if num_file_bytes < 8 or length > min(num_file_bytes - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{file} is not a safetensors file, or is cut short: its header does not fit.")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} is malformed: its header is not JSON: {error}.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} is malformed: its header is not a JSON object.")
    num_data_bytes = num_file_bytes - 8 - length
    for name, entry in header.items():
        if name != "__metadata__":
            yield name, _stored_tensor(file, name, entry, num_data_bytes)


def _stored_tensor(file: Path, name: str, entry: Any, num_data_bytes: int) -> StoredTensor:
    """Check one entry of a header: its bytes lie in the file and are as many as its shape takes."""
    try:
        shape = tuple(int(size) for size in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
        tensor = StoredTensor(file=file, dtype=str(entry["dtype"]), shape=shape)
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file} is malformed: the header's entry of {name} is {json.dumps(entry)}.") from error
    if end > num_data_bytes:
        raise CheckpointError(
            f"{file} is cut short: {name} ends at byte {end} of the data, but only {num_data_bytes} are there."
        )
    if not 0 <= begin <= end or min(shape, default=0) < 0 or (tensor.is_float and end - begin != tensor.num_bytes):
        raise CheckpointError(
            f"{file} is malformed: {name} of shape {list(shape)} in {tensor.dtype} cannot be bytes {begin} to {end}."
        )
    return tensor
