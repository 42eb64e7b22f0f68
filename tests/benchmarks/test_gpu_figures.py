"""The parts that time kernels, on a device that only counts: every kernel is called, every row is there."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_parts.kernels_fast
import gpu_parts.operands
import pytest
import torch
from gpu_parts.budget import NO_TIME, Budget
from gpu_parts.ceilings import CeilingGrid, measure_ceilings, saturating_share
from gpu_parts.co_run import KILL_SHARE, Pair, PairGrid, criterion, forked, measure_pairs
from gpu_parts.kernels_fast import FastGrid, measure_kernels
from gpu_parts.operands import spread_lengths
from gpu_parts.timing import GraphTimer, Timing

from engine.kernels.gpu import decode_config, gemm_config
from tests.benchmarks.gpu_fakes import TINY_EXPERTS, TINY_MODEL, CallingTimer, fake_device, quiet_ledger
from tests.engine.kernels.gpu.sm90 import sm90_compiler

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy
READ_BYTES = 1 << 16
SMALL_FAST = FastGrid(
    model=TINY_MODEL,
    num_tokens=4,
    num_drawn=2,
    decodes=((2, 20),),
    ctas=(2, 6),
    prefills=(((16, 16), (4, 20)),),
    experts=((TINY_EXPERTS, 3),),
    read_bytes=READ_BYTES,
)


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_config, "CANDIDATES", gemm_config.CANDIDATES[-1:])
    candidates = [decode_config.CANDIDATES[-1], decode_config.CORESIDENT]
    monkeypatch.setattr(gpu_parts.kernels_fast, "decode_candidates", lambda *arguments: candidates)


@pytest.mark.slow
def test_ceilings_have_a_row_for_every_shape_library_and_number(tmp_path: Path) -> None:
    ledger, bench = quiet_ledger(tmp_path, "ceilings"), fake_device()
    grid = CeilingGrid(model=TINY_MODEL, tokens=(8,), sms=(6, 4, 99), ctas=(2, 6, 12), read_bytes=READ_BYTES)
    measure_ceilings(ledger, Budget(100.0), bench, grid)
    names = {row.name for row in ledger.rows}
    for product in ("QKV", "O", "UG", "D"):
        for kind in ("bf16", "fp8"):
            for library in ("cublasLt 6 SMs", "cublasLt 4 SMs", "ours 6 SMs", "ours 4 SMs"):
                assert f"{product} M=8 {kind} {library}" in names
            assert f"{product} M=8 {kind} ours 6 SMs 128x256x3" in names
    assert {"2 CTAs", "12 CTAs", "copy, read and written", "share of SMs that saturates (p_sat)"} <= names
    assert not any("99" in name for name in names)
    rows = {row.name: row for row in ledger.rows}
    row = rows["QKV M=8 bf16 ours 6 SMs"]
    seconds = row.details["seconds"]
    assert row.value == pytest.approx(2 * 8 * 128 * 64 / seconds / 1e12)
    assert row.percent is not None and 0 < row.percent < 100
    assert rows["2 CTAs"].value == pytest.approx(READ_BYTES / 1e-3 / 1e9)


@pytest.mark.slow
def test_without_time_rows_say_so(tmp_path: Path) -> None:
    ledger = quiet_ledger(tmp_path, "ceilings")
    grid = CeilingGrid(model=TINY_MODEL, tokens=(8,), sms=(6,), ctas=(2,), read_bytes=READ_BYTES)
    measure_ceilings(ledger, Budget(0.0), fake_device(), grid)
    left_out = [row.name for row in ledger.rows if row.note == NO_TIME]
    assert len(left_out) == 8
    ledger = quiet_ledger(tmp_path, "kernels-fast")
    measure_kernels(ledger, Budget(0.0), fake_device(), SMALL_FAST)
    assert sum(row.note == NO_TIME for row in ledger.rows) == 6


def test_the_share_that_saturates_is_the_smallest_near_the_best() -> None:
    assert saturating_share({40: 2000.0, 66: 3900.0, 92: 4000.0, 132: 4050.0}, 132) == 66 / 132


@pytest.mark.slow
def test_kernels_have_rates(tmp_path: Path) -> None:
    ledger, bench = quiet_ledger(tmp_path, "kernels-fast"), fake_device()
    measure_kernels(ledger, Budget(100.0), bench, SMALL_FAST)
    assert [row for row in ledger.rows if row.is_right is False or (row.value is None)] == []
    by_group: dict[str, list[str]] = {}
    for row in ledger.rows:
        by_group.setdefault(row.group, []).append(row.name)
    assert set(by_group) == {
        "ceiling", "decode attention", "prefill", "memory", "sampling", "experts", "decode choices",
    }  # fmt: skip
    assert len(by_group["memory"]) == 9 and len(by_group["sampling"]) == 8
    assert "2 x 20 fp8 6 CTAs" in by_group["decode attention"]
    assert len([name for name in by_group["decode choices"] if "104 registers" in name]) >= 2
    row = next(row for row in ledger.rows if row.name == "rms_norm")
    assert row.value == pytest.approx(4 * 4 * 64 / row.details["seconds"] / 1e9)
    assert row.ceiling is not None


@pytest.mark.slow
def test_a_stage_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_parts.kernels_fast, "rms_norm", fail)
    monkeypatch.setattr(gpu_parts.kernels_fast, "prefill_flops", fail)
    ledger = quiet_ledger(tmp_path, "kernels-fast")
    measure_kernels(ledger, Budget(100.0), fake_device(), SMALL_FAST)
    notes = {(row.group, row.name): row.note for row in ledger.rows}
    assert "no such kernel" in notes["prefill attention", "all"]
    assert "no such kernel" in notes["memory", "rms_norm"]
    assert any(row.group == "experts" and row.value for row in ledger.rows)


def test_lengths_are_spread_around_their_mean() -> None:
    lengths = spread_lengths(512, 1300)
    assert len(lengths) == 512 and min(lengths) == 975 and max(lengths) == 1625
    assert sum(lengths) / 512 == pytest.approx(1300, rel=1e-3)
    assert lengths != sorted(lengths) and lengths == spread_lengths(512, 1300)


def unforked(pair: Pair) -> Callable[[], object]:
    """Both lanes one after the other."""
    return lambda: [run() for run in (pair.attention, *pair.products)]


def test_every_mechanism_is_paired_and_judged(tmp_path: Path) -> None:
    ledger, bench = quiet_ledger(tmp_path, "co-run"), fake_device()
    grid = PairGrid(model=TINY_MODEL, num_tokens=8, decodes=(2, 20), sms=(4, 6), ctas=(2, 6), parts=(2,))
    measure_pairs(ledger, Budget(100.0), bench, grid, unforked)
    names = [row.name for row in ledger.rows]
    pairs = [name for name in names if "attention" in name and ":" in name]
    assert len(pairs) == len(set(pairs)) == 2 * 2 * 2 + 2
    assert pairs[:3] == [
        "none: cublasLt 4 SMs, attention 2 CTAs",
        "coresident: ours 6 SMs, attention 6 CTAs",
        "none: ours 4 SMs, attention 2 CTAs",
    ]
    rows = {row.name: row for row in ledger.rows}
    total = sum(rows[name].value or 0.0 for name in ("attention alone", "products alone, cublasLt"))
    pair = rows[pairs[0]]
    assert pair.details["share_of_sum"] == pytest.approx((pair.value or 0.0) / total)
    best = min(rows[name].details["share_of_sum"] for name in pairs)
    assert rows["best joint time over the sum"].value == pytest.approx(best)
    assert rows["green"].note == "needs a CUDA device"


def test_the_criterion_is_printed() -> None:
    assert "go on" in criterion(KILL_SHARE - 0.01, "green").note
    assert "too little" in criterion(KILL_SHARE + 0.01, "green").note


class RecordedCuda:
    """Streams, events and graphs that write down what happens; a replay takes as many ms as calls were captured."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now = 0.0
        self.captured: list[int] | None = None
        self.current = "default"

    def call(self, name: str) -> None:
        self.log.append(f"{name} on {self.current}")
        if self.captured is not None:
            self.captured[0] += 1

    def stream_of(self, name: str) -> Any:
        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: self.log.append(f"{name} waits for {other.name}"),
            synchronize=lambda: None,
        )

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda = self

        class Entered:
            def __init__(self, stream: Any) -> None:
                self._stream = stream

            def __enter__(self) -> None:
                self._before = cuda.current
                cuda.current = self._stream.name

            def __exit__(self, *error: object) -> None:
                cuda.current = self._before

        class Graph:
            def __init__(self) -> None:
                self.count = [0]

            def capture_begin(self, capture_error_mode: str) -> None:
                assert cuda.current == "side" and cuda.captured is None
                cuda.captured = self.count

            def capture_end(self) -> None:
                cuda.captured = None

            def replay(self) -> None:
                cuda.now += self.count[0]

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = cuda.now

            def synchronize(self) -> None:
                """It is over already."""

            def elapsed_time(self, later: "Event") -> float:
                return later.at - self.at

        monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority=0: cuda.stream_of("side"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: cuda.stream_of(cuda.current))
        monkeypatch.setattr(torch.cuda, "stream", Entered)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)


def test_contestants_are_captured_and_replayed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = RecordedCuda()
    cuda.install(monkeypatch)

    def broken() -> None:
        raise RuntimeError("does not compile")

    def both() -> None:
        cuda.call("a")
        cuda.call("b")

    timer = GraphTimer(torch.device("cuda"), max_replays=7)
    timings = timer.time(
        {"one": [lambda: cuda.call("one")] * 3, "broken": [broken], "two": [both]},
        10.0,
    )
    assert timings["one"] == Timing(seconds=1e-3, spread=0.0, num_replays=7)
    assert timings["two"] == Timing(seconds=2e-3, spread=0.0, num_replays=7)
    assert isinstance(timings["broken"], RuntimeError) and list(timings) == ["one", "broken", "two"]
    assert cuda.log.count("one on side") == 6, "once to warm up, once captured, for each of three"
    assert timer.time({"one": [lambda: cuda.call("one")]}, 0.0)["one"] == Timing(
        seconds=1e-3, spread=0.0, num_replays=5
    )


def test_lanes_branch_off_and_join(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = RecordedCuda()
    cuda.install(monkeypatch)
    lanes: Any = SimpleNamespace(products=cuda.stream_of("products"), attention=cuda.stream_of("attention"))
    pair = Pair(
        name="pair", products=[lambda: cuda.call("product")], attention=lambda: cuda.call("attend"), lanes=lanes
    )
    forked(pair)()
    assert cuda.log[:2] == ["attention waits for default", "products waits for default"]
    assert cuda.log[2:8] == ["attend on attention"] * 3 + ["product on products"] * 3
    assert cuda.log[8:] == ["default waits for attention", "default waits for products"]


def test_the_fake_timer_keeps_the_protocol() -> None:
    timings = CallingTimer().time({"a": [lambda: None], "b": [lambda: 1 / 0]}, 1.0)
    assert timings["a"] == Timing(seconds=1e-3, spread=0.01, num_replays=5)
    assert isinstance(timings["b"], ZeroDivisionError)


@pytest.mark.slow
def test_the_kernels_of_the_benchmark_compile_for_sm_90() -> None:
    """Neither is launched without a GPU in full size, and one has no interpreter."""
    with sm90_compiler() as compiler:
        read = compiler.compiled(
            "gpu_parts.read_kernel:_read",
            {"source": "*i32", "sums": "*i32", "num_tiles": "i32"},
            {"TILE": 8192, "STAGES": 4},
            num_warps=16,
            num_stages=3,
        )
        noted = compiler.compiled("gpu_parts.sm_ids:_note", {"ids": "*i32"}, {}, num_warps=32, num_stages=3)
    assert read.spill_bytes == 0 and "cp.async.cg" in read.ptx
    assert 64 * 1024 <= read.shared_bytes <= 227 * 1024
    assert "%smid" in noted.ptx and noted.num_threads == 1024
