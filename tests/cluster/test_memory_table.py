"""What an operator sees of memory at the start, and what Prometheus does."""

import os

import pytest
from prometheus_client import CollectorRegistry

from cluster.memory_metrics import MemoryCollector
from cluster.memory_table import memory_tables
from cluster.start_display import StartDisplay
from engine import MemoryPart, MemoryUse
from engine.host_memory import ResidentMemory

MEBIBYTE = 2**20
REPLICA = MemoryUse(
    process="replica",
    pid=os.getpid(),
    parts={MemoryPart.LIBRARIES: 170 * MEBIBYTE, MemoryPart.CONTROL: 2 * MEBIBYTE},
    memory=ResidentMemory(resident=172 * MEBIBYTE, proportional=110 * MEBIBYTE, anonymous=90 * MEBIBYTE),
)
RANK = MemoryUse(
    process="rank 0",
    pid=2**22 + 1,  # no process can have it
    parts={
        MemoryPart.LIBRARIES: 300 * MEBIBYTE,
        MemoryPart.WEIGHTS: 100 * MEBIBYTE,
        MemoryPart.KV_CACHE: 255 * MEBIBYTE,
    },
    memory=ResidentMemory(resident=660 * MEBIBYTE, proportional=610 * MEBIBYTE, anonymous=560 * MEBIBYTE),
    cache_budget=256 * MEBIBYTE,
)


def test_columns_add_up() -> None:
    (table,) = memory_tables({"abc": (REPLICA, RANK), "unmeasured": ()})
    title, *rows, cache = table.splitlines()
    assert title == "Memory of replica abc in MiB:"
    assert rows[0].split() == ["replica", "rank", "0"]
    cells = {row[:28].strip(): row[28:].split() for row in rows[1:]}
    assert cells["weights"] == ["-", "100.0"]
    assert cells["unexplained"] == ["-", "5.0"], "the replica's parts are all measured: nothing could be left over"
    assert cells["resident (RSS)"] == ["172.0", "660.0"]
    for column in (0, 1):
        parts = [row[column] for name, row in cells.items() if not name.startswith(("resident", "its"))]
        assert sum(float(cell) for cell in parts if cell != "-") == float(cells["resident (RSS)"][column])
    assert cache == "The KV cache of a rank takes 255.0 of the 256.0 MiB it is allowed."


def test_what_lies_on_a_gpu_is_apart() -> None:
    rank = MemoryUse(
        process="rank 0",
        pid=1,
        parts={MemoryPart.LIBRARIES: MEBIBYTE},
        memory=ResidentMemory(resident=MEBIBYTE, proportional=MEBIBYTE, anonymous=0),
        device_parts={MemoryPart.KV_CACHE: 7 * MEBIBYTE},
        cache_budget=8 * MEBIBYTE,
    )
    (table,) = memory_tables({"abc": (rank,)})
    assert "on the GPU: KV cache" in table
    assert table.endswith("takes 7.0 of the 8.0 MiB it is allowed.")
    assert float(next(line for line in table.splitlines() if "unexplained" in line).split()[-1]) == 0


def test_metrics_have_every_part_and_the_rest() -> None:
    registry = CollectorRegistry()
    registry.register(MemoryCollector((REPLICA, RANK), model="m", replica="r"))
    labels = {"model": "m", "replica": "r", "process": "rank 0"}
    assert registry.get_sample_value("nanoserve_memory_bytes", labels | {"part": "weights"}) == 100 * MEBIBYTE
    assert registry.get_sample_value("nanoserve_memory_bytes", labels | {"part": "unexplained"}) == 5 * MEBIBYTE
    assert registry.get_sample_value("nanoserve_kv_cache_budget_bytes", labels) == 256 * MEBIBYTE
    assert registry.get_sample_value("nanoserve_resident_memory_bytes", labels) is None, "the rank has ended"
    own = registry.get_sample_value("nanoserve_resident_memory_bytes", labels | {"process": "replica"})
    assert own is not None
    assert own > 10 * MEBIBYTE


def test_what_ranks_do_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    display = StartDisplay()
    for text in ("compiling 4 kernels for this CPU, once", "compiling 4 kernels for this CPU, once", "planning"):
        display.doing(text)
    assert capsys.readouterr().err.splitlines() == ["Compiling 4 kernels for this CPU, once.", "Planning."]
