"""`nanoserve bench serve` as a user runs it, against the fake server."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from cluster.load_test.bench_serve import bench_serve
from engine import ConfigError
from engine.random_tokenizer import write_tokenizer
from tests.cluster.load_test.fake_openai_server import FakeServer, serving

app = typer.Typer()
app.command()(bench_serve)


@pytest.fixture(scope="module")
def running() -> Iterator[FakeServer]:
    with serving(FakeServer(prefill_seconds=0.02, chunk_seconds=0.005)) as server:
        yield server


@pytest.fixture
def server(running: FakeServer) -> FakeServer:
    running.bodies.clear()
    return running


def bench(server: FakeServer, arguments: str) -> Result:
    return CliRunner().invoke(app, ["--url", server.url, *shlex.split(arguments)])


def test_a_closed_loop_reports_everything_as_json(server: FakeServer) -> None:
    outcome = bench(server, "--concurrency 4 --num-requests 12 --input-len 6 --output-len 5 --vocab-size 50 --json -")
    assert outcome.exit_code == 0, outcome.output
    result = json.loads(outcome.stdout)
    assert (result["num_ok"], result["num_failed"]) == (12, 0)
    assert (result["num_prompt_tokens"], result["num_output_tokens"]) == (72, 60)
    assert result["model"] == "fake-model"
    assert result["ttft_ms"]["p50"] >= 20
    assert result["tpot_ms"]["p50"] >= 4  # gaps as they arrive vary around the server's 5 ms
    assert result["offered_requests_per_second"] is None
    assert len(server.bodies) == 13  # the probe is not measured


def test_an_open_loop_prints_a_table_and_goodput(server: FakeServer, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    options = "--request-rate 100 --num-requests 20 --output-len 2:4 --slo-ttft-ms 10 --slo-e2e-ms 60000"
    outcome = bench(server, f"{options} --json {file}")
    assert outcome.exit_code == 0, outcome.output
    for name in ("TTFT", "TPOT", "ITL", "E2E", "client's lag", "goodput", "tokens out per second"):
        assert name in outcome.output
    result = json.loads(file.read_text())
    assert result["goodput"]["num_requests"] == 0  # the server needs 20 ms for a first token
    assert result["offered_requests_per_second"] == pytest.approx(100, rel=0.8)


def test_word_prompts_are_calibrated_by_the_probe(server: FakeServer) -> None:
    outcome = bench(server, "--concurrency 1 --num-requests 3 --input-len 100 --output-len 1 --json -")
    assert json.loads(outcome.stdout)["num_prompt_tokens"] == 300  # two tokens a word there, so 50 words each
    assert len(server.bodies[-1]["prompt"].split()) == 50


def test_a_tokenizer_folder_gives_the_vocabulary(server: FakeServer, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 400, 2048)
    outcome = bench(server, f"--concurrency 2 --num-requests 2 --input-len 900 --output-len 1 --tokenizer {tmp_path}")
    assert outcome.exit_code == 0, outcome.output
    highest = max(max(body["prompt"]) for body in server.bodies)
    assert 256 < highest < 400


def test_a_named_workload_can_be_shrunk(server: FakeServer) -> None:
    outcome = bench(
        server, "--workload lmsys --length-divisor 50 --concurrency 8 --num-requests 20 --vocab-size 9 --json -"
    )
    result = json.loads(outcome.stdout)
    assert result["num_ok"] == 20
    assert "lmsys" in result["workload"]
    assert "divided by 50" in result["workload"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--request-rate or --concurrency"),
        ("--request-rate 1 --concurrency 1", "Choose one"),
        ("--request-rate -1", "must be positive"),
        ("--concurrency 1 --extra-body nonsense", "--extra-body"),
        ("--concurrency 1 --extra-body []", "--extra-body"),
        ("--concurrency 1 --input-len x", "--input-len"),
        ("--concurrency 1 --tokenizer .", "tokenizer.json"),
    ],
)
def test_mistakes_are_config_errors_before_any_load(server: FakeServer, arguments: str, message: str) -> None:
    outcome = bench(server, arguments)
    assert isinstance(outcome.exception, ConfigError)
    assert message in str(outcome.exception)
    assert server.bodies == []


def test_a_failing_probe_says_why(server: FakeServer) -> None:
    outcome = bench(server, """--concurrency 1 --extra-body '{"behave": "refuse"}'""")
    assert isinstance(outcome.exception, ConfigError)
    assert "HTTP 429" in str(outcome.exception)
    assert "too busy" in str(outcome.exception)
