"""`nanoserve bench serve` as a user runs it, against the fake server."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner, Result

from cluster.load_test.bench_serve import bench_serve
from cluster.metrics import EngineCollector, MetricsEndpoint
from engine import ConfigError, EngineStats, Loss
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


def test_the_servers_losses_are_read_before_and_after(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two replicas: the second is twice as fast and loses nothing; the third begins to be known in between."""
    reads = {"slow": 0, "fast": 0, "new": 0}

    def stats(name: str) -> EngineStats:
        reads[name] += 1
        now = 100.0 * reads[name]
        loss = 0.75 * now if name == "slow" else 0.0
        return EngineStats(
            accounted_seconds=now,
            ideal_seconds=now - loss,
            loss_seconds=dict.fromkeys(Loss, 0.0) | {Loss.EXPOSED_NETWORK: loss},
            optimal_tokens_per_second=(
                None if name == "new" and reads[name] == 1 else {"slow": 100.0, "fast": 200.0, "new": 1.0}[name]
            ),
        )

    endpoints = []
    for name in reads:
        registry = CollectorRegistry()
        registry.register(EngineCollector(lambda name=name: (stats(name), 1.0), model="m", replica=name))  # type: ignore[misc]
        endpoints.append(MetricsEndpoint(registry, "127.0.0.1"))
    monkeypatch.setattr(server, "replica_metrics", [endpoint.address for endpoint in endpoints])
    outcome = bench(server, "--concurrency 1 --num-requests 1 --input-len 6 --output-len 2 --json -")
    table = bench(server, "--concurrency 1 --num-requests 1 --input-len 6 --output-len 2")
    for endpoint in endpoints:
        endpoint.close()
    losses = json.loads(outcome.stdout)["loss_waterfall"]
    assert losses["optimal_tokens_per_second"] == 300
    assert losses["percent_of_optimal"] == pytest.approx(100 * (25 + 200) / 300)
    assert losses["loss_percent"]["exposed_network"] == pytest.approx(25)
    assert "exposed network" in table.output


def test_a_server_without_loss_counters_is_measured_all_the_same(server: FakeServer) -> None:
    outcome = bench(server, "--concurrency 1 --num-requests 1 --input-len 6 --output-len 2 --json -")
    assert json.loads(outcome.stdout)["loss_waterfall"] is None
