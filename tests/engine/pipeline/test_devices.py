"""The table of devices, and this machine's CPU."""

import subprocess
import sys

import pytest

from engine.config import DeviceKind
from engine.errors import ConfigError
from engine.model_config import DType
from engine.pipeline import measured_cpu
from engine.pipeline.devices import CPU, DATA_SHEETS, data_sheet
from engine.pipeline.unit_sharing import PAPER_SHARING, REPOSITORY_SHARING, UnitSharing

# Table 1 of the paper: GB, GB/s, GB/s of both directions of the network, TFLOP/s. It counts MI300's link to the host
# as well and a B200's spare memory, and has no L40S.
TABLE_1 = {
    "a100-40gb": (40, 1555, 600, 312),
    "a100-80gb": (80, 2000, 600, 312),
    "h100": (80, 3352, 900, 989),
    "h200": (141, 4800, 900, 989),
    "b200": (180, 8000, 1800, 2250),
    "mi300x": (192, 5300, 896, 1307),
}


@pytest.mark.parametrize("name", TABLE_1)
def test_data_sheets_are_those_of_the_paper(name: str) -> None:
    spec = data_sheet(name)
    gigabytes, bandwidth, network, teraflops = TABLE_1[name]
    assert spec.name == name
    assert spec.memory_seconds(bandwidth * 1e9) == pytest.approx(1)
    assert spec.network_seconds(network * 1e9) == pytest.approx(2)  # one way takes twice as long
    assert spec.compute_seconds(teraflops * 1e12, 2) == pytest.approx(1)
    assert spec.memory_bytes == pytest.approx(gigabytes * 1e9)


def test_wider_numbers_are_never_faster_and_every_device_shares_units() -> None:
    for spec in DATA_SHEETS.values():
        rates = [spec.flops_per_second[width] for width in (1, 2, 4, 8) if width > 1 or spec.has_fp8]
        assert rates == sorted(rates, reverse=True)
        assert spec.sharing is PAPER_SHARING
        assert spec.num_units > 64


def test_products_in_fp8_take_their_time_at_their_own_rate() -> None:
    h200 = data_sheet("h200")
    assert h200.has_fp8 and not data_sheet("a100-80gb").has_fp8
    assert h200.compute_seconds(989e12 + 1979e12, 2, 1979e12) == pytest.approx(2)


def test_an_unknown_device_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'a100'; there are a100-40gb, a100-80gb, .*l40s, cpu"):
        data_sheet("a100")


def test_an_unknown_width_is_refused() -> None:
    with pytest.raises(ConfigError, match="a100-80gb: no rate is known for 8-bit numbers, only for 16, 32, 64"):
        data_sheet("a100-80gb").compute_seconds(1.0, 1)


@pytest.mark.parametrize("table", [PAPER_SHARING, REPOSITORY_SHARING])
def test_more_units_are_never_slower_and_all_of_them_are_full_speed(table: UnitSharing) -> None:
    for resource in ("compute", "memory", "network"):
        speeds = table.speeds(resource)
        assert list(speeds) == sorted(speeds)
        assert speeds[-1] == 1
        assert all(speed >= share / 10 for share, speed in enumerate(speeds, 1))


def test_the_paper_prints_the_ends_of_its_table() -> None:
    ends = [0, 1, 7, 8, 9]
    assert [PAPER_SHARING.memory[index] for index in ends] == [0.2, 0.3, 0.85, 0.95, 1.0]
    assert [PAPER_SHARING.network[index] for index in ends] == [0.3, 0.5, 0.9, 1.0, 1.0]


def test_this_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured_cpu, "SQUARES", {DeviceKind.CPU: (256,)})
    spec = measured_cpu.measure_cpu(DType.FLOAT32, num_threads=1)
    assert spec.name == CPU
    assert "1 threads" in spec.source
    assert 1e8 < spec.flops_per_second[4] < 1e13
    assert 1e8 < spec.memory_bandwidth < 1e12
    assert spec.memory_bytes > 2**30
    assert spec.sharing is None
    assert spec.network_seconds(0) == 0
    with pytest.raises(ConfigError, match="cpu: nothing is known of the network between devices"):
        spec.network_seconds(1)
    with pytest.raises(ConfigError, match="cpu: no rate is known for 16-bit numbers, only for 32"):
        spec.compute_seconds(1, 2)


def test_devices_and_estimates_need_no_torch() -> None:
    code = (
        "import sys, engine.pipeline.devices, engine.pipeline.serving_estimate, engine.model_shapes;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
