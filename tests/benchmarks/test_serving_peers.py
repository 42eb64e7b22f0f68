"""The parts of `benchmarks/serving_peers.py` that need no server: arithmetic, table, options, command lines, files."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engine.errors import NanoserveError
from engine.model_config import Architecture
from engine.random_checkpoint import sized_config, write_random_checkpoint

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def serving_peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import serving_peers

    return serving_peers


@dataclass(frozen=True, slots=True)
class Turn:
    """A round in which 1000 tokens were served: seconds, those of the client, idle ones, those of others."""

    seconds: float
    client: float = 0.0
    idle: float = 0.0
    foreign: float = 0.0


def result(name: str, *turns: Turn, problem: str | None = None) -> Any:
    from peer_engines.serving_result import ServedRound, ServingResult

    rounds = [
        ServedRound(
            num_output_tokens=1000,
            seconds=turn.seconds,
            ttft_p50=0.1 * turn.seconds,
            ttft_p99=0.2 * turn.seconds,
            tpot_p50=0.01 * turn.seconds,
            client_seconds=turn.client,
            idle_seconds=turn.idle,
            foreign_seconds=turn.foreign,
        )
        for turn in turns
    ]
    return ServingResult(engine=name, problem=problem, rounds=rounds)


@pytest.fixture
def setup(tmp_path: Path) -> Any:
    from peer_engines.peer_engine import EngineSetup

    checkpoint = tmp_path / "checkpoint"
    write_random_checkpoint(checkpoint, sized_config(Architecture.LLAMA, num_layers=2, num_kv_heads=2))
    return EngineSetup(
        checkpoint=checkpoint,
        converted=tmp_path,
        dtype="float32",
        num_threads=2,
        cache_tokens=1000,
        max_model_len=300,
        max_sequences=4,
        options={},
    )


def test_figures_are_medians_and_ratios_are_of_the_same_round() -> None:
    own = result("own", Turn(1.0), Turn(2.0), Turn(4.0))
    other = result("other", Turn(2.0, foreign=0.1), Turn(2.0, foreign=1.0), Turn(2.0))
    row = other.row(own, "1.2", [1000.0, 500.0, 250.0])
    assert (row["engine"], row["version"], row["status"], row["error"]) == ("other", "1.2", "ok", None)
    assert row["output_tokens_per_second"] == 500.0
    assert row["ratio"] == 1.0, "the median of 1/2, 1 and 2, whatever the medians' ratio"
    assert row["serving_efficiency"] == 1.0, "of 1/2, 1 and 2"
    assert row["offline_tokens_per_second"] == 500.0
    assert (row["ttft_p50_ms"], row["ttft_p99_ms"], row["tpot_p50_ms"]) == pytest.approx((200.0, 400.0, 20.0))
    assert row["foreign_cores"] == 0.5, "of the most disturbed round"


@pytest.mark.parametrize(
    ("turn", "rate"),
    [
        (Turn(4.0), 250.0),
        (Turn(4.0, client=2.0), 1000 / 3),  # on two cores
        (Turn(4.0, client=2.0, idle=1.0), 1000 / 3.5),
        (Turn(4.0, client=1.0, idle=3.0), 250.0),  # nobody waited for the client
    ],
)
def test_the_clients_time_is_handed_back_to_all_cores(turn: Turn, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3, 5})
    (served,) = result("own", turn).rounds
    assert served.rate == 250.0
    assert served.rate_without_client == pytest.approx(rate)


def test_a_failure_says_so_in_its_row_and_leaves_the_others() -> None:
    own, failed = result("own", Turn(1.0)), result("failed", problem="The server ended with status 1.")
    assert failed.row(own, None, []) == {
        "engine": "failed",
        "version": None,
        "status": "failed",
        "error": "The server ended with status 1.",
    }
    row = own.row(failed, None, [])
    assert row["output_tokens_per_second"] == 1000.0
    assert row["ratio"] is row["serving_efficiency"] is row["offline_tokens_per_second"] is None


def test_the_table_has_what_json_has() -> None:
    from peer_engines.serving_table import format_serving_table

    own, other = result("own", Turn(0.5, client=0.05)), result("other", Turn(1.0))
    failed = result("failed", problem="not installed: run with --install")
    rows = [own.row(own, "1", [4000.0]), other.row(own, None, []), failed.row(own, None, [])]
    summary = {"workload": "4x8/250", "dtype": "bfloat16", "num_threads": 2, "rounds": 1, "rows": rows}
    title, head, first, second, third = format_serving_table(json.loads(json.dumps(summary))).splitlines()
    assert "4x8/250" in title and "bfloat16" in title
    columns = "server version tokens/s ratio TTFT p50 p99 TPOT p50 offline served no client client idle others"
    assert head.split() == columns.split()
    assert first.split()[:8] == ["own", "1", "2,000", "1.00", "50", "100", "5.0", "4,000"]
    assert first.split()[8] == "50.0%"
    assert second.split()[:2] == ["other", "1,000"] and second.split()[6:9] == ["-", "-", "-"]
    assert third.split(maxsplit=1) == ["failed", "not installed: run with --install"]
    assert len(first) == len(second) == len(head) <= 130


def test_this_projects_server_is_always_one(serving_peers: ModuleType) -> None:
    def names(text: str | None) -> list[str]:
        return [server.name for server in serving_peers.choose(text)]

    assert names(None) == ["nanoserve", "vllm-compiled", "vllm-eager", "llama-cpp"]
    assert names("llama-cpp, vllm-eager") == ["nanoserve", "vllm-eager", "llama-cpp"]
    assert names("nanoserve") == ["nanoserve"]
    with pytest.raises(NanoserveError, match="no server of openvino; there are vllm-compiled"):
        names("openvino,llama-cpp")


@pytest.mark.parametrize("option", ["--rounds", "--threads"])
def test_less_than_one_is_refused(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from peers import parse_arguments

    monkeypatch.setattr(sys, "argv", ["serving_peers.py", option, "0"])
    with pytest.raises(SystemExit) as raised:
        parse_arguments("what it does")
    assert raised.value.code == 2


def arguments(serving_peers: ModuleType, name: str, setup: Any) -> dict[str, str]:
    """What the server is started with, flags without a value left out."""
    (server,) = (server for server in serving_peers.choose(None) if server.name == name)
    words = server.arguments(setup, 8123)
    return {word: value for word, value in zip(words, [*words[1:], "--"], strict=True) if word[:2] == "--" != value[:2]}


BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, their size, float32


def test_every_server_gets_the_offline_engines_limits(serving_peers: ModuleType, setup: Any) -> None:
    own = arguments(serving_peers, "nanoserve", setup)
    vllm = arguments(serving_peers, "vllm-eager", setup)
    llama = arguments(serving_peers, "llama-cpp", setup)
    assert own["--cache"] == str((1000 + 64 * 5) * BYTES_PER_TOKEN)
    assert vllm["--kv-cache-memory-bytes"] == str((1000 + 128 * 5) * BYTES_PER_TOKEN)
    assert llama["--ctx-size"] == str(4 * 512), "300 rounded up, for each sequence"
    assert (own["--max-sequences"], vllm["--max-num-seqs"], llama["--parallel"]) == ("4", "4", "4")
    assert (own["--max-batch-tokens"], vllm["--max-num-batched-tokens"], llama["--batch-size"]) == ("2048",) * 3
    assert own["--dtype"] == vllm["--dtype"] == "float32"
    assert llama["--cache-type-k"] == llama["--cache-type-v"] == "f32"
    assert {options["--port"] for options in (own, vllm, llama)} == {"8123"}
    assert vllm["--host"] == llama["--host"] == "127.0.0.1"
    assert own["--name"] == vllm["--served-model-name"] == llama["--alias"] == "model"
    halves = arguments(serving_peers, "llama-cpp", replace(setup, dtype="bfloat16"))
    assert "--cache-type-k" not in halves, "float16 is its own default"


def test_only_the_eager_server_is_told_to_be(serving_peers: ModuleType, setup: Any) -> None:
    eager = {server.name for server in serving_peers.choose(None) if "--enforce-eager" in server.arguments(setup, 8123)}
    assert eager == {"vllm-eager"}


def test_llama_server_is_a_program_of_its_own_and_of_the_packages_version(
    serving_peers: ModuleType, tmp_path: Path
) -> None:
    from peer_engines.peer_environment import PeerEnvironment

    own, *_, llama = serving_peers.choose("llama-cpp")
    environment = PeerEnvironment(tmp_path, llama.peer)
    (package,) = (text for text in llama.peer.requirements if text.startswith("llama-cpp-python=="))
    assert llama.program(environment) == tmp_path / "llama-cpp/bin" / f"llama-server-{package.partition('==')[2]}"
    assert not llama.is_installed(environment)
    environment.python.parent.mkdir(parents=True)
    (tmp_path / "llama-cpp/.installed").write_text("\n".join(llama.peer.requirements))
    assert environment.is_installed, "the offline engine can run"
    assert not llama.is_installed(environment), "and its server not yet"
    llama.program(environment).touch()
    assert llama.is_installed(environment)
    alone = PeerEnvironment(tmp_path, own.peer)
    assert own.program(alone) == Path(sys.executable)
    assert own.is_installed(alone)
