"""Reading recorded traces: when requests came and how long they were, never what they said.

Two families of formats are understood, plain or gzipped, by their columns. CSV: of the Azure LLM inference traces
(TIMESTAMP, ContextTokens, GeneratedTokens; a TIMESTAMP of letters is an unknown time) and of ServeGen (timestamp in
seconds, input_tokens, output_tokens). JSON lines: of Mooncake (timestamp in milliseconds, input_length, output_length,
hash_ids: one id per 512-token block of the prompt, equal ids being equal content).
"""

import csv
import gzip
import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import IO, Any

from engine.errors import ConfigError
from engine.workloads.workload import PlannedRequest, Workload


def read_trace(path: Path, num_requests: int | None = None) -> Workload:
    """The first `num_requests` rows (default: all), in order, the first arriving at 0.

    Requests have no arrival times where the trace has none. Raises `ConfigError` naming file and line.
    """
    requests: list[PlannedRequest] = []
    origin: float | None = None
    for line, row in islice(_rows(path), num_requests):
        try:
            request = _request(row)
        except (KeyError, ValueError, TypeError) as error:
            raise ConfigError(f"{path}, line {line}: cannot make a request of {dict(row)} ({error!r}).") from error
        if request.arrival_seconds is not None:
            origin = request.arrival_seconds if origin is None else origin
            request = request.arriving(request.arrival_seconds - origin)
        requests.append(request)
    if not requests:
        raise ConfigError(f"The trace {path} has no requests.")
    if len({request.arrival_seconds is None for request in requests}) > 1:
        raise ConfigError(f"The trace {path} has times for some requests only.")
    return Workload(requests=tuple(requests), description=f"trace {path.name}")


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, row by column name) of a .csv, .jsonl, .csv.gz or .jsonl.gz file."""
    name = path.name.removesuffix(".gz")
    if not name.endswith((".csv", ".jsonl")):
        raise ConfigError(f"The trace {path} must be a .csv or .jsonl file, plain or with .gz.")
    try:
        with _open(path) as file:
            if name.endswith(".csv"):
                yield from enumerate(csv.DictReader(file), start=2)
            else:
                yield from ((line, json.loads(text)) for line, text in enumerate(file, start=1) if text.strip())
    except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"Cannot read the trace {path}: {error}.") from error


def _open(path: Path) -> IO[str]:
    return gzip.open(path, "rt") if path.suffix == ".gz" else path.open()


def _request(row: Mapping[str, Any]) -> PlannedRequest:
    if "hash_ids" in row:
        timestamp = row.get("timestamp")
        return PlannedRequest(
            num_prompt_tokens=int(row["input_length"]),
            num_output_tokens=_output(row, "output_length"),
            arrival_seconds=None if timestamp is None else float(timestamp) / 1000,
            block_ids=tuple(int(block) for block in row["hash_ids"]),
        )
    if "ContextTokens" in row:
        timestamp = str(row["TIMESTAMP"])
        return PlannedRequest(
            num_prompt_tokens=int(row["ContextTokens"]),
            num_output_tokens=_output(row, "GeneratedTokens"),
            arrival_seconds=None if timestamp.isalpha() else _wall_clock(timestamp),
        )
    return PlannedRequest(
        num_prompt_tokens=int(row["input_tokens"]),
        num_output_tokens=_output(row, "output_tokens"),
        arrival_seconds=float(row["timestamp"]),
    )


def _output(row: Mapping[str, Any], column: str) -> int:
    """Output tokens; 0, which a workload replaces, where the trace tells none."""
    value = row.get(column)
    return 0 if value is None else int(value)


def _wall_clock(timestamp: str) -> float:
    """Seconds since an arbitrary origin of "2023-11-16 18:15:46.6805900"; digits beyond microseconds count too."""
    whole, _, fraction = timestamp.partition(".")
    seconds = (datetime.fromisoformat(whole) - datetime(1970, 1, 1)).total_seconds()
    return seconds + (float(f"0.{fraction}") if fraction else 0.0)
