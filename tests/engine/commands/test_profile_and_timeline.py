"""`profile` and `timeline` with real ranks, through the command line as a user runs it."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from engine import ConfigError, EngineConfig, PipelineMode
from engine.cli import app
from engine.model_config import Architecture
from engine.pipeline.profile import Profile
from engine.pipeline.schedule import ScheduleError
from engine.random_checkpoint import sized_config, write_random_checkpoint

SCHEDULE = """nano-batches: 16+0 0+16
compute: qkv_proj[0:16] decode_attention[0:16] o_proj[0:16] qkv_proj[16:32] prefill_attention[16:32] o_proj[16:32] \
gate_up_proj[0:16] down_proj[0:16] gate_up_proj[16:32] down_proj[16:32] add_1[0:16] add_1[16:32]
network: attention_all_reduce[0:16] attention_all_reduce[16:32] feed_forward_all_reduce[0:16] \
feed_forward_all_reduce[16:32]
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    write_random_checkpoint(path, sized_config(Architecture.LLAMA))
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOSERVE_CACHE_DIR", str(tmp_path / "cache"))


def run(*arguments: str) -> str:
    outcome = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return outcome.stdout


def recorded(*arguments: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(run("timeline", *arguments, "--repetitions", "3", "--json", "-"))
    return result


@pytest.mark.slow
def test_a_profile_is_measured_and_planned_from(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    common = (str(checkpoint), "--tensor-parallel", "2", "--tokens", "64", "--threads", "1", "--out", str(file))
    text = run("profile", *common, "--seconds", "1")
    profile = Profile.read(file)
    assert {"qkv_proj", "attention_all_reduce"} <= set(profile.nodes)
    for part in ("milliseconds for tokens:", "qkv_proj", "decode_attention, context", "beside", str(file)):
        assert part in text
    plan = json.loads(
        run("plan", str(checkpoint), "--devices", "2", "--tokens", "64", "--threads", "1", "--profile", str(file),
            "--seconds", "0.2", "--json", "-")
    )  # fmt: skip
    assert "measured on" in plan["costs"] and plan["planned_seconds"] <= plan["sequential_seconds"]
    written = file.read_text()
    run("profile", *common, "--seconds", "1")
    assert file.read_text() == written  # all of it was there already
    with pytest.raises(ConfigError, match="is of another layer than that of tiny on 1 devices"):
        run("plan", str(checkpoint), "--devices", "1", "--tokens", "64", "--profile", str(file), "--seconds", "0.1")


@pytest.mark.parametrize(
    ("device", "num_ranks", "mode"), [("cuda", 2, "overlap"), ("cuda", 1, "sequential"), ("cpu", 2, "sequential")]
)
def test_ranks_that_are_profiled_exchange_as_plans_will(
    device: str, num_ranks: int, mode: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside other work on GPUs: by the communicator that ranks have which overlap. They make no plans for that."""

    class NotNowError(Exception):
        pass

    def refused(config: EngineConfig) -> None:
        assert (config.pipeline.value, config.plan_seconds) == (mode, 0)
        raise NotNowError

    monkeypatch.setattr("engine.local_group.LocalGroup", refused)
    with pytest.raises(NotNowError):
        run("profile", str(checkpoint), "--device", device, "--tensor-parallel", str(num_ranks), "--tokens", "64")


@pytest.mark.slow
def test_a_step_of_two_ranks_is_recorded_and_drawn(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "a.schedule").write_text(SCHEDULE)
    common = (str(checkpoint), "--tensor-parallel", "2", "--tokens", "32", "--context", "20", "--threads", "1")
    text = run(
        "timeline", *common, "--repetitions", "3", "--schedule", str(tmp_path / "a.schedule"),
        "--perfetto", str(tmp_path / "a.json"), "--png", str(tmp_path / "a.png"),
    )  # fmt: skip
    for part in (
        "rank 0 compute",
        "rank 1 network",
        "recorded: ",
        "times as fast as sequential",
        SCHEDULE.splitlines()[1],
    ):
        assert part in text
    entries = json.loads((tmp_path / "a.json").read_text())["traceEvents"]
    complete = [entry for entry in entries if entry["ph"] == "X"]
    num_layers = sized_config(Architecture.LLAMA).num_layers
    # On both ranks every step of the schedule, and the embedding's all-reduce of each nano-batch.
    assert len(complete) == 2 * (num_layers * 16 + 2)
    assert {entry["args"]["nano_batch"] for entry in complete} == {0, 1}
    for entry in complete:
        tokens = entry["args"]["tokens"]
        assert (entry["args"]["nano_batch"], tokens) in ((0, "0:16"), (1, "16:32"))
    # Ranks share a clock: a collective ends on neither before it began on both.
    spans: dict[tuple[str, int, str], list[tuple[float, float]]] = {}
    for entry in complete:
        if entry["cat"] == "network":
            key = (entry["name"], entry["args"].get("layer"), entry["args"]["tokens"])
            spans.setdefault(key, []).append((entry["ts"], entry["ts"] + entry["dur"]))
    assert len(spans) == 4 * num_layers + 2
    for (first_start, first_end), (second_start, second_end) in spans.values():
        assert max(first_start, second_start) < min(first_end, second_end)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_modes_and_the_engines_own_choice(checkpoint: Path) -> None:
    common = (str(checkpoint), "--tokens", "16", "--context", "20", "--threads", "1")
    sequential = recorded(*common, "--mode", "sequential")
    assert (sequential["plan"], sequential["mode"]) == ("sequential", "sequential")
    # One rank has no network to overlap with: the engine runs it sequentially in every mode.
    alone = recorded(*common, "--decode-share", "0")
    assert (alone["plan"], alone["why_sequential"]) == ("sequential", "nothing of this layer can overlap here")
    assert sequential["why_sequential"] is None, "it was asked for"
    assert set(sequential["busy_seconds"][0]) == {"compute"}
    assert 0 < sequential["busy_seconds"][0]["compute"] <= sequential["seconds"]


@pytest.mark.slow
def test_without_a_stored_plan_it_says_so_and_stores_none(checkpoint: Path, tmp_path: Path) -> None:
    outcome = CliRunner().invoke(
        app,
        ["timeline", str(checkpoint), "--tensor-parallel", "2", "--tokens", "300", "--decode-share", "1.0",
         "--context", "20", "--threads", "1", "--repetitions", "1"],
        catch_exceptions=False,
    )  # fmt: skip
    assert outcome.stderr.startswith("starting 2 ranks ...\n")
    assert "sequential: no plan is stored for this setup; plan one with" in outcome.stdout
    assert list((tmp_path / "cache").rglob("*plan*")) == []


@pytest.mark.slow
def test_schedules_that_do_not_fit_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.schedule"
    file.write_text("nano-batches: 16+0\ncompute: qkv_proj[0:16]\n")
    with pytest.raises(ScheduleError):
        run("timeline", str(checkpoint), "--tokens", "16", "--schedule", str(file))
    file.write_text(SCHEDULE.replace("16+0 0+16", "16+0 16+0"))
    with pytest.raises(ConfigError):
        run("timeline", str(checkpoint), "--tensor-parallel", "2", "--tokens", "16", "--schedule", str(file))


def test_files_and_lengths_are_checked_before_anything_starts(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.schedule"
    file.write_text("nano-batches: many\n")
    with pytest.raises(ScheduleError, match=r"a\.schedule: line 1: "):
        run("timeline", str(checkpoint), "--schedule", str(file))
    with pytest.raises(ConfigError, match="--context 100000 is too long"):
        run("timeline", str(checkpoint), "--context", "100000")
    with pytest.raises(ConfigError, match="does not divide the model's"):
        run("timeline", str(checkpoint), "--tensor-parallel", "3")


@pytest.mark.parametrize(
    ("arguments", "has_narrow"),
    [
        (("--tensor-parallel", "2"), True),
        (("--tensor-parallel", "2", "--mode", "nanobatch"), False),
        ((), False),
        (("--tensor-parallel", "2", "--device", "cpu"), False),
    ],
)
def test_a_given_schedule_has_the_collectives_that_it_wants_between_gpus(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], has_narrow: bool
) -> None:
    """Ranks on GPUs that overlap have a second communicator, on few units."""

    class StartedError(Exception):
        pass

    configs: list[EngineConfig] = []

    def group(config: EngineConfig) -> None:
        configs.append(config)
        raise StartedError

    monkeypatch.setattr("engine.local_group.LocalGroup", group)
    file = tmp_path / "a.schedule"
    file.write_text(SCHEDULE)
    with pytest.raises(StartedError):
        run("timeline", str(checkpoint), "--schedule", str(file), "--device", "cuda", *arguments)
    assert (configs[0].pipeline is PipelineMode.OVERLAP) is has_narrow
