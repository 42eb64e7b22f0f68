"""A `Timeline` as a trace in Chrome's JSON format, which https://ui.perfetto.dev and chrome://tracing show.

One process a rank, one thread a lane, complete events ("ph": "X") in microseconds. Events of one thread must not
overlap, so collectives in flight together get threads of their own.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.pipeline.drawing.track import Track, tracks
from engine.pipeline.schedule import ALL_UNITS, Lane
from engine.pipeline.timeline import Timeline, TimelineEvent

_TRACKS_PER_LANE = 100


def write_trace(timeline: Timeline, path: Path) -> None:
    """Write the file; raises `ConfigError` where that is not possible."""
    try:
        path.write_text(json.dumps(trace(timeline)) + "\n")
    except OSError as error:
        raise ConfigError(f"The trace cannot be written to {path}: {error.strerror}.") from error


def trace(timeline: Timeline) -> dict[str, Any]:
    """The JSON object of a trace."""
    rows = tracks(timeline.events)
    return {
        "displayTimeUnit": "ms",
        "otherData": {"title": timeline.title, "source": "predicted" if timeline.is_predicted else "recorded"},
        "traceEvents": [
            *(entry for rank in sorted({row.rank for row in rows}) for entry in _process(rank)),
            *(entry for row in rows for entry in _thread(row)),
            *(_event(event, _thread_id(row)) for row in rows for event in row.events),
        ],
    }


def _process(rank: int) -> Iterator[dict[str, Any]]:
    yield _metadata("process_name", rank, 0, name=f"rank {rank}")
    yield _metadata("process_sort_index", rank, 0, sort_index=rank)


def _thread(row: Track) -> Iterator[dict[str, Any]]:
    thread = _thread_id(row)
    yield _metadata("thread_name", row.rank, thread, name=row.name)
    yield _metadata("thread_sort_index", row.rank, thread, sort_index=thread)


def _metadata(kind: str, process: int, thread: int, **args: str | int) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": args}


def _thread_id(row: Track) -> int:
    return _TRACKS_PER_LANE * list(Lane).index(row.lane) + row.number + 1


def _event(event: TimelineEvent, thread: int) -> dict[str, Any]:
    args: dict[str, str | float] = {}
    if event.layer is not None:
        args["layer"] = event.layer
    if event.stop_token > event.start_token:
        args |= {"tokens": f"{event.start_token}:{event.stop_token}", "nano_batch": event.nano_batch}
    if event.share < ALL_UNITS:
        args["share"] = event.share / ALL_UNITS
    return {
        "ph": "X",
        "name": event.operation,
        "cat": event.lane.value,
        "pid": event.rank,
        "tid": thread,
        "ts": 1e6 * event.start,
        "dur": 1e6 * (event.end - event.start),
        "args": args,
    }
