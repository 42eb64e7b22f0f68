"""A rank's meter: written there, read here, without a message; and the metrics made of it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cluster.rank_meter import RankMeter, RankReading
from cluster.rank_metrics import RankCollector
from engine import StepOutput, StepTimes


def output(seconds: float, times: StepTimes | None = None) -> StepOutput:
    return StepOutput(step=0, token_ids=np.empty(0, np.int32), device_seconds=seconds, times=times)


def test_what_one_process_writes_another_reads(tmp_path: Path) -> None:
    reader_first = RankMeter.create(tmp_path, 1)
    program = f"""
import numpy as np
from pathlib import Path
from cluster.rank_meter import RankMeter
from engine import StepOutput, StepTimes
meter = RankMeter.create(Path({str(tmp_path)!r}), 0)
for _ in range(3):
    meter.finished(StepOutput(step=0, token_ids=np.empty(0, np.int32), device_seconds=0.25,
                              times=StepTimes(exposed_network_seconds=0.125)))
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
    reading = RankMeter.open(tmp_path, 0).read()
    assert reading == RankReading(num_steps=3, num_timed_steps=3, device_seconds=0.75, exposed_network_seconds=0.375)
    assert reader_first.read().num_steps == 0


def test_a_meter_outlives_the_name_of_its_file(tmp_path: Path) -> None:
    writer, reader = RankMeter.create(tmp_path, 0), RankMeter.open(tmp_path, 0)
    (tmp_path / "meter-0").unlink()
    writer.finished(output(1.0))
    assert reader.read() == RankReading(num_steps=1, num_timed_steps=0, device_seconds=1.0, exposed_network_seconds=0.0)
    with pytest.raises(FileNotFoundError):
        RankMeter.open(tmp_path, 0)


def test_each_rank_is_told_apart(tmp_path: Path) -> None:
    meters = [RankMeter.create(tmp_path, rank) for rank in range(2)]
    meters[0].finished(output(0.5, StepTimes(exposed_network_seconds=0.1)))
    meters[1].finished(output(0.5))
    found = {
        (sample.name.removeprefix("nanoserve_"), sample.labels["rank"]): sample.value
        for family in RankCollector(meters, model="m", replica="r").collect()
        for sample in family.samples
    }
    assert found == {
        ("rank_steps_total", "0"): 1,
        ("rank_steps_total", "1"): 1,
        ("rank_device_seconds_total", "0"): 0.5,
        ("rank_device_seconds_total", "1"): 0.5,
        ("rank_exposed_network_seconds_total", "0"): 0.1,
    }, "what rank 1 waited is unknown, not zero"
