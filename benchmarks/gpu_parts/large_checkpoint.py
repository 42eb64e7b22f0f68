"""A random checkpoint of many gigabytes in seconds: one layer's weights are drawn, and every layer has them.

Products take as long as with weights of their own, whose bytes are read from other addresses just the same.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.checkpoint import SINGLE_FILE
from engine.model_config import ModelConfig
from engine.random_checkpoint import write_random_checkpoint

_LAYER = "model.layers.0."
_PIECE_BYTES = 64 << 20


def write_large_checkpoint(folder: Path, shape: ModelConfig) -> None:
    """As `write_random_checkpoint`; of architectures whose config.json lists nothing by layer."""
    windows = shape.sliding_windows[:1]
    write_random_checkpoint(folder, replace(shape, num_layers=1, sliding_windows=windows))
    settings = json.loads((folder / "config.json").read_text())
    settings["num_hidden_layers"] = shape.num_layers
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    single = folder / SINGLE_FILE
    first = single.rename(folder / "one-layer")
    try:
        _repeat_layer(first, single, shape.num_layers)
    finally:
        first.unlink()
    assert ModelConfig.from_checkpoint(folder) == shape, "the file of one layer must say the same as the wanted shape"


def _repeat_layer(source: Path, target: Path, num_layers: int) -> None:
    """Copy a safetensors file, tensors of layer 0 once for every layer."""
    with source.open("rb") as given, target.open("wb") as written:
        size = int.from_bytes(given.read(8), "little")
        entries: dict[str, Any] = json.loads(given.read(size))
        metadata = entries.pop("__metadata__")
        header: dict[str, Any] = {"__metadata__": metadata}
        places: list[tuple[int, int]] = []
        end = 0
        for name, entry in _repeated(entries, num_layers):
            start, stop = entry["data_offsets"]
            header[name] = {**entry, "data_offsets": [end, end + stop - start]}
            places.append((8 + size + start, stop - start))
            end += stop - start
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        written.write(len(text).to_bytes(8, "little"))
        written.write(text)
        for start, count in places:
            given.seek(start)
            while count:
                piece = given.read(min(count, _PIECE_BYTES))
                written.write(piece)
                count -= len(piece)


def _repeated(entries: dict[str, Any], num_layers: int) -> Iterator[tuple[str, Any]]:
    for name, entry in entries.items():
        if name.startswith(_LAYER):
            for layer in range(num_layers):
                yield f"model.layers.{layer}.{name.removeprefix(_LAYER)}", entry
        else:
            yield name, entry
