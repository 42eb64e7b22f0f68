"""Rows, the file of a part, budgets and shares of `make gpu`."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from gpu_parts.budget import Budget
from gpu_parts.compile_log import compiled_in
from gpu_parts.ledger import Ledger, Row, figure, rows_of
from gpu_parts.part import SECONDS_TO_BEGIN, WEIGHTS, Part, shares
from gpu_parts.power_log import PowerLog, described, summary

from tests.benchmarks.gpu_fakes import quiet_ledger


def test_a_row_is_one_aligned_line() -> None:
    rows = [
        Row(group="read", name="132 CTAs", value=4312.7, unit="GB/s", ceiling=4400.0),
        Row(group="correct", name="gemm", value=1.5e-3, unit="norm", is_right=False, note="beyond"),
        Row(group="read", name="green", note="refused"),
    ]
    lines = [row.line() for row in rows]
    assert lines[0].split()[-4:] == ["4,313", "GB/s", "98.0", "%"]
    assert "1.50e-03 norm" in lines[1] and "WRONG beyond" in lines[1]
    assert lines[2].split() == ["read", "green", "-", "refused"]
    assert lines[0].index("GB/s") == lines[1].index("norm")
    assert all("\n" not in line for line in lines)


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.0, "0"), (25_123.4, "25,123"), (0.93, "0.93"), (1e-5, "1.00e-05")]
)
def test_figures_have_some_digits(value: float | None, text: str) -> None:
    assert figure(value) == text


def test_the_file_is_whole_after_rows_and_begun_anew(tmp_path: Path) -> None:
    ledger = quiet_ledger(tmp_path)
    assert rows_of(tmp_path / "part.json") == ([], False)
    ledger.add(Row(group="a", name="b", value=2.0, ceiling=4.0, is_right=True, details={"c": 1}))
    ledger.add(Row(group="a", name="wrong", is_right=False))
    ledger.save(is_complete=True)
    content = json.loads((tmp_path / "part.json").read_text())
    assert content["device"] == "a fake" and content["rows"][0]["percent"] == 50.0
    rows, is_complete = rows_of(tmp_path / "part.json")
    assert rows == ledger.rows and is_complete and not ledger.is_right
    assert [path.name for path in tmp_path.iterdir()] == ["part.json"]
    quiet_ledger(tmp_path)
    assert rows_of(tmp_path / "part.json") == ([], False)
    assert rows_of(tmp_path / "absent.json") == ([], False)


def test_rows_that_are_not_shown_are_in_the_file_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger("part", tmp_path, {})
    ledger.add(Row(group="a", name="hidden", is_shown=False))
    ledger.skip("a", "seen", "because")
    printed = capsys.readouterr().out
    assert "seen" in printed and "hidden" not in printed
    ledger.save()
    assert [row.name for row in rows_of(tmp_path / "part.json")[0]] == ["hidden", "seen"]


def test_a_budget_runs_out() -> None:
    now = [100.0]
    budget = Budget(10.0, lambda: now[0])
    assert budget.has(10.0) and not budget.has(10.1)
    now[0] = 108.0
    assert budget.left == pytest.approx(2.0) and budget.part(0.5).seconds == pytest.approx(2.0)
    now[0] = 120.0
    assert budget.left < 0 and budget.part(0.5).seconds == 0.0


def test_shares_add_up_to_the_seconds() -> None:
    assert set(WEIGHTS) == set(Part)
    every = shares(list(Part), 570.0)
    assert sum(every.values()) + SECONDS_TO_BEGIN * len(Part) == pytest.approx(570.0)
    assert min(every.values()) > 15
    assert shares([Part.CO_RUN], 100.0) == {Part.CO_RUN: pytest.approx(100 - SECONDS_TO_BEGIN)}
    assert shares([Part.CO_RUN, Part.PEERS], 1.0)[Part.PEERS] == 0.0


class FakeManagement:
    """pynvml with a card of 650 W."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    def nvmlInit(self) -> None:  # noqa: N802
        """There is a driver."""

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        return 650_000

    def nvmlDeviceGetClockInfo(self, handle: int, clock: int) -> int:  # noqa: N802
        return 1000 * clock


def test_clocks_and_power_are_sampled_or_their_absence_is_said() -> None:
    with PowerLog(0, FakeManagement()).sampled() as readings:
        pass
    assert readings == {"watts": 650.0, "sm_mhz": 1000.0, "memory_mhz": 2000.0}
    assert described(readings) == "650 W, 1000 MHz"
    with PowerLog(0, FakeManagement()).recorded() as entries:
        pass
    assert entries[0]["watts"] == 650.0 and entries[0]["seconds"] >= 0
    assert summary(entries) == "650 W, 1000 MHz (1000 to 1000)" and summary([]) == ""
    broken = PowerLog(0, object())
    assert broken.problem is not None and "no clocks and power" in broken.problem
    with broken.sampled() as readings:
        pass
    assert readings == {} and described(readings) == ""


def test_what_is_compiled_is_counted(tmp_path: Path) -> None:
    """By Triton's own listener, as it calls it; whoever listened before does so again."""
    from triton import knobs

    ledger = quiet_ledger(tmp_path, "ceilings")
    before = knobs.compilation.listener
    with pytest.raises(RuntimeError), compiled_in(ledger, "ceilings") as log:
        for name, cache_hit in (("gemm", False), ("gemm", False), ("norm", True)):
            knobs.compilation.listener(
                src=SimpleNamespace(name=name), metadata={}, metadata_group={}, times=SimpleNamespace(total=2_000_000),
                cache_hit=cache_hit,
            )  # fmt: skip
        raise RuntimeError("the part ends early")
    assert knobs.compilation.listener is before
    assert (log.num_compiled, log.num_found, log.seconds) == (2, 1, 4.0)
    (row,) = ledger.rows
    assert row.value == 4.0 and "2 specialisations of 1 kernels compiled, 1 found" in row.note
    assert row.details == {"gemm": 2}
