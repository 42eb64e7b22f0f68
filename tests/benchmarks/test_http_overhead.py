"""The parts of `benchmarks/http_overhead.py`: its arithmetic on made-up marks, and all of it on a real, tiny server."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from cluster.load_test.request_outcome import RequestOutcome
from cluster.tokenizer import Tokenizer
from engine.model_config import Architecture
from engine.random_checkpoint import sized_config, write_random_checkpoint

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def stage_times(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from http_path import stage_times

    return stage_times


def outcome(index: int, sent_at: float, arrivals: list[float]) -> RequestOutcome:
    return RequestOutcome(
        index=index,
        scheduled_at=sent_at,
        sent_at=sent_at,
        ended_at=arrivals[-1],
        first_output_at=arrivals[0],
        last_output_at=arrivals[-1],
        num_output_tokens=len(arrivals),
        gaps=np.diff(arrivals),
    )


def load_result(outcomes: list[RequestOutcome], origin: float, seconds: float) -> object:
    from http_path.http_load import LoadResult
    from http_path.processor_seconds import ProcessorSeconds

    used = ProcessorSeconds(by_role={"ranks": 6.0, "ingress": 1.0}, busy=9.0, idle=0.5)
    return LoadResult(outcomes=outcomes, origin=origin, seconds=seconds, client=1.5, used=used)


def test_a_first_token_is_split_at_the_points_it_passed(stage_times: ModuleType, tmp_path: Path) -> None:
    points = list(stage_times.FIRST_TOKEN)[:-1]
    lines = [f"{100 + second + 0.001 * (i + 1):.6f} {point}" for second in (0, 1) for i, point in enumerate(points)]
    (tmp_path / "1.marks").write_text("\n".join(lines[::2]) + "\n100.5 hea")
    (tmp_path / "2.marks").write_text("\n".join(lines[1::2]) + "\n")
    marks = stage_times.read_marks(tmp_path)
    assert sum(map(len, marks.values())) == len(lines)
    result = load_result([outcome(0, 0.0, [0.02, 0.5]), outcome(1, 1.0, [1.02])], 100.0, 2.0)
    passes = stage_times.request_passes(marks, result)
    assert len(passes) == 2
    *parts, whole = stage_times.first_token_stages(passes)
    assert [part.name for part in parts] == list(stage_times.FIRST_TOKEN.values())
    assert [round(part.p50, 6) for part in parts] == [1.0] * len(points) + [20.0 - len(points)]
    assert whole.p50 == pytest.approx(20.0)
    own, beyond = stage_times.overhead(passes)
    assert own.p50 == pytest.approx(points.index("put") - points.index("submitted"))
    assert own.p50 + beyond.p50 == pytest.approx(20.0)


def test_a_request_whose_marks_are_missing_is_left_out(stage_times: ModuleType) -> None:
    result = load_result([outcome(0, 0.0, [0.02])], 100.0, 1.0)
    assert stage_times.request_passes({"called": np.array([100.001])}, result) == []


def test_a_stall_is_what_the_engine_does_not_explain(stage_times: ModuleType) -> None:
    marks = {"put": np.array([10.0, 10.1, 10.4, 10.5, 10.6])}
    explained = outcome(0, 0.0, [0.01, 0.11, 0.41, 0.51])
    assert stage_times.longest_stall(marks, load_result([explained], 10.0, 1.0)) == pytest.approx((0.3, 0.3, 0.0))
    skipped = outcome(1, 0.0, [0.01, 0.11, 0.61])
    longest, own, stall = stage_times.longest_stall(marks, load_result([explained, skipped], 10.0, 1.0))
    assert (longest, own) == pytest.approx((0.5, 0.3))
    assert stall == pytest.approx(0.2)


def test_the_clients_time_is_handed_back_where_no_core_was_idle(stage_times: ModuleType) -> None:
    from http_path import saturation

    run = saturation.SaturatedRun.of(load_result([outcome(0, 0.0, [0.1] * 100)], 0.0, 5.0))  # type: ignore[arg-type]
    assert run.rate == pytest.approx(20.0)
    assert run.corrected_rate == pytest.approx(100 / (5.0 - 1.0 / saturation.num_cores()))
    assert run.others == pytest.approx(0.5)


def test_processor_seconds_are_those_of_the_process(stage_times: ModuleType) -> None:
    from http_path.processor_seconds import read_processor_seconds

    roles = {os.getpid(): "self", 2**22 + 1: "gone"}
    earlier, end = read_processor_seconds(roles), time.process_time() + 0.3
    while time.process_time() < end:
        pass
    used = read_processor_seconds(roles).since(earlier)
    assert used.by_role["self"] == pytest.approx(0.3, abs=0.05)
    assert used.by_role["gone"] == 0.0
    assert used.busy >= 0.2


def test_every_token_of_an_audible_checkpoint_has_text(stage_times: ModuleType, tmp_path: Path) -> None:
    from http_path.audible_checkpoint import audible_checkpoint

    checkpoint, folder = tmp_path / "tiny", tmp_path / "audible"
    folder.mkdir()
    config = sized_config(Architecture.LLAMA)
    write_random_checkpoint(checkpoint, config)
    assert audible_checkpoint(folder, checkpoint) == folder
    assert {file.name for file in folder.iterdir()} == {file.name for file in checkpoint.iterdir()}
    for directory, has_silent in ((checkpoint, True), (folder, False)):
        tokenizer = Tokenizer.load(directory)
        texts = [tokenizer.detokenizer(skip_special_tokens=False).push(i) for i in range(config.vocab_size)]
        assert ("" in texts) is has_silent


@pytest.mark.slow
@pytest.mark.ray
def test_the_real_path_of_a_tiny_server(tmp_path: Path) -> None:
    checkpoint = tmp_path / "tiny"
    write_random_checkpoint(checkpoint, sized_config(Architecture.LLAMA))
    command = [sys.executable, str(BENCHMARKS / "http_overhead.py"), "--model", str(checkpoint), "--json"]
    command += ["--parts", "idle,streams", "--threads", "1", "--cache", "8MiB"]
    command += ["--streams", "8", "--idle-requests", "4", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert [row["way"] for row in summary["idle"]] == ["HAProxy", "ingress"]
    for row in summary["idle"]:
        assert row["num_requests"] == 4, "every request passed every point"
        *parts, whole = row["stages"]
        assert all(part["p50_ms"] > 0 for part in parts)
        assert row["engine"]["p50_ms"] + row["beyond_engine"]["p50_ms"] == pytest.approx(whole["p50_ms"], rel=0.5)
    assert summary["idle"][0]["processor_milliseconds_per_request"].keys() > {"ranks", "ingress", "replica", "HAProxy"}
    streams = summary["streams"]
    assert 0 < streams["longest_stall_ms"][0] <= streams["longest_gap_ms"][0]
    assert [stage["p50_ms"] > 0 for stage in streams["stages"]] == [True] * 4
