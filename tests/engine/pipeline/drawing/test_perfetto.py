"""The trace has the form that Perfetto reads: metadata, then complete events that do not overlap in a thread."""

import json
from itertools import groupby, pairwise
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.pipeline.drawing.perfetto import trace, write_trace
from engine.pipeline.schedule import Lane
from engine.pipeline.timeline import Timeline
from tests.engine.pipeline.drawing.timelines import event, layered


def test_structure_of_a_trace(tmp_path: Path) -> None:
    timeline = layered(4, num_ranks=2)
    write_trace(timeline, tmp_path / "trace.json")
    written = json.loads((tmp_path / "trace.json").read_text())
    assert written["displayTimeUnit"] == "ms" and written["otherData"]["source"] == "predicted"
    entries = written["traceEvents"]
    threads = {
        (entry["pid"], entry["tid"]): entry["args"]["name"] for entry in entries if entry["name"] == "thread_name"
    }
    processes = {entry["pid"]: entry["args"]["name"] for entry in entries if entry["name"] == "process_name"}
    assert processes == {0: "rank 0", 1: "rank 1"}
    assert sorted(threads.values()) == ["compute", "compute", "network", "network"]
    complete = [entry for entry in entries if entry["ph"] == "X"]
    assert {entry["ph"] for entry in entries} == {"M", "X"} and len(complete) == len(timeline.events)
    for entry in complete:
        assert threads[entry["pid"], entry["tid"]] == entry["cat"]
    first = next(entry for entry in complete if entry["name"] == "attention_all_reduce" and entry["args"]["layer"] == 1)
    assert (first["ts"], first["dur"]) == pytest.approx((14000.0, 5000.0))
    assert first["args"] == {"layer": 1, "tokens": "0:256", "nano_batch": 0, "share": 0.1}


def test_collectives_in_flight_together_do_not_overlap_in_a_thread() -> None:
    timeline = Timeline("", (event("x", Lane.NETWORK, 0, 5), event("y", Lane.NETWORK, 2, 6)), False)
    complete = [entry for entry in trace(timeline)["traceEvents"] if entry["ph"] == "X"]
    for _, entries in groupby(sorted(complete, key=lambda entry: (entry["tid"], entry["ts"])), lambda e: e["tid"]):
        assert all(before["ts"] + before["dur"] <= after["ts"] for before, after in pairwise(entries))
    assert len({entry["tid"] for entry in complete}) == 2


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone/trace.json: No such file"):
        write_trace(layered(1), tmp_path / "gone" / "trace.json")
