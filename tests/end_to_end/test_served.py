"""A served model through the official SDK, a real trace, and more clients than it has room for."""

import asyncio
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.load_test.serve_benchmark import PROBE_OUTPUT_TOKENS, PROBE_PROMPT_TOKENS
from engine.model_config import Architecture
from engine.random_checkpoint import sized_config, write_random_checkpoint
from tests.cluster.serve_command import Command, until

TRACES = Path(os.environ.get("NANOSERVE_TEST_DATA", Path(__file__).parents[3] / "shared")) / "traces"
pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("models") / "tiny"
    write_random_checkpoint(path, sized_config(Architecture.LLAMA, max_position_embeddings=2048))
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Command]:
    options = "--tensor-parallel 2 --replicas 2 --threads 1 --cache 8MiB --name tiny --device cpu --plan-seconds 0"
    command = Command(tmp_path_factory.mktemp("server"), checkpoint, *options.split())
    try:
        command.wait_ready()
        yield command
    finally:
        command.close()


@pytest.fixture
def client(server: Command) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        yield client


MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Café or tea? 東京 🙂"}]
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.9, "top_p": 0.8, "seed": 7},
    {"temperature": 1.3, "seed": -3, "frequency_penalty": 0.5, "presence_penalty": 0.2},
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_chat_says_the_same_streamed_and_whole(client: openai.OpenAI, sampling: dict[str, Any]) -> None:
    call: dict[str, Any] = dict(model="tiny", messages=MESSAGES, max_tokens=40, n=3, **sampling)
    whole = client.chat.completions.create(**call)
    chunks = list(client.chat.completions.create(**call, stream=True, stream_options={"include_usage": True}))
    texts = ["", "", ""]
    reasons: list[str | None] = [None] * 3
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert len(set(texts)) == (1 if sampling["temperature"] == 0 else 3), "each of n has a seed of its own"
    assert whole.usage is not None and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.parametrize("prompt", ["Once upon a time", ["One", "two"], [5, 6, 7, 8], [[5, 6], [7, 8, 9]]])
def test_completions_say_the_same_streamed_and_whole(client: openai.OpenAI, prompt: Any) -> None:
    call: dict[str, Any] = dict(model="tiny", prompt=prompt, max_tokens=24, temperature=0.7, seed=5)
    whole = client.completions.create(**call)
    texts = [""] * len(whole.choices)
    for chunk in client.completions.create(**call, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert whole.usage is not None and whole.usage.completion_tokens <= 24 * len(texts)


def test_the_seed_decides(client: openai.OpenAI) -> None:
    def text(seed: int | None) -> str:
        call: dict[str, Any] = dict(model="tiny", prompt="Hello", max_tokens=32, temperature=1.0, seed=seed)
        return str(client.completions.create(**call).choices[0].text)

    assert text(1) == text(1) != text(2)
    assert text(None) != text(None)


def test_a_stop_string_ends_the_text_before_itself(client: openai.OpenAI) -> None:
    call: dict[str, Any] = dict(model="tiny", prompt="Hello", max_tokens=60, temperature=0)
    free = client.completions.create(**call).choices[0].text
    stop = free[len(free) // 2 : len(free) // 2 + 3]
    whole = client.completions.create(**call, stop=[stop, "never there"])
    chunks = client.completions.create(**call, stop=[stop, "never there"], stream=True)
    for choices in (whole.choices, [choice for chunk in chunks for choice in chunk.choices]):
        assert "".join(choice.text for choice in choices) == free[: free.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_max_tokens_is_kept(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_completion_tokens=7, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7
    assert answer.choices[0].finish_reason == "length"


BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown model": (dict(model="other"), 404, "model"),
    "empty messages": (dict(messages=[]), 400, "messages"),
    "negative max_tokens": (dict(max_tokens=-1), 400, "max_tokens"),
    "zero n": (dict(n=0), 400, "n"),
    "hot temperature": (dict(temperature=2.5), 400, "temperature"),
    "top_p beyond one": (dict(top_p=1.5), 400, "top_p"),
    "text for a number": (dict(temperature="warm"), 400, "temperature"),
    "a number for text": (dict(messages=[{"role": "user", "content": 5}]), 400, "messages[0].content"),
    "unknown role": (dict(messages=[{"role": "king", "content": "x"}]), 400, "messages[0].role"),
    "messages of the wrong kind": (dict(messages="hello"), 400, "messages"),
    "a stop that is no text": (dict(stop=[1]), 400, "stop"),
    "a prompt beyond the context": (dict(messages=[{"role": "user", "content": "x " * 3000}]), 400, "messages"),
    "more than the context": (dict(max_tokens=5000), 400, "max_tokens"),
    "tools": (dict(tools=[{"type": "function", "function": {"name": "f"}}]), 400, "tools"),
    "a schema": (dict(response_format={"type": "json_object"}), 400, "response_format"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_name_the_field(server: Command, client: openai.OpenAI, name: str) -> None:
    changes, status, param = BAD[name]
    call: dict[str, Any] = dict(model="tiny", messages=MESSAGES) | changes
    response = server.client.post("/v1/chat/completions", json=call)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"] or "").startswith(param), error
    if name == "a prompt beyond the context":
        assert error["code"] == "context_length_exceeded"
        assert "maximum context length is 2048 tokens" in error["message"]
    with pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.create(**call)
    assert raised.value.status_code == status


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{not json", 400), (b"[1, 2]", 400), (b"", 400), (b'{"messages": "' + b"x" * 10_000_000, 413)],
)
def test_bodies_that_are_no_request(server: Command, body: bytes, status: int) -> None:
    response = server.client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_three_hundred_at_once_all_finish(server: Command) -> None:
    async def post(client: httpx.AsyncClient, index: int) -> int:
        body = {"model": "tiny", "prompt": [1 + index % 500] * 100, "max_tokens": 30, "ignore_eos": True}
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        tokens: int = response.json()["usage"]["completion_tokens"]
        return tokens

    async def run() -> list[int]:
        limits = httpx.Limits(max_connections=400)
        async with httpx.AsyncClient(base_url=server.client.base_url, timeout=240, limits=limits) as client:
            return await asyncio.gather(*(post(client, index) for index in range(300)))

    assert asyncio.run(run()) == [30] * 300
    until(lambda: server.is_idle, 5, "all blocks to be free again")


@pytest.mark.skipif(not TRACES.is_dir(), reason=f"no request traces in {TRACES} (see NANOSERVE_TEST_DATA)")
def test_a_real_trace_loses_nothing_and_is_counted_exactly(server: Command, checkpoint: Path, tmp_path: Path) -> None:
    """500 requests of a recorded hour at their recorded times, lengths divided by 8, and not one token unaccounted."""
    with gzip.open(TRACES / "azure_conv_30min.csv.gz", "rt") as lines:
        rows = [line.strip().split(",") for _, line in zip(range(501), lines, strict=False)][1:]

    def counted() -> tuple[float, float]:
        prompt = server.samples("nanoserve_prompt_tokens_total")
        return sum(prompt.values()), sum(server.samples("nanoserve_generation_tokens_total").values())

    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "cluster.cli", "bench", "serve", "--url", f"http://127.0.0.1:{server.port}"]
    command += ["--trace", str(TRACES / "azure_conv_30min.csv.gz"), "--length-divisor", "8", "--num-requests", "500"]
    before = counted()
    subprocess.run([*command, "--tokenizer", str(checkpoint), "--json", str(report)], check=True, timeout=280)
    after = counted()
    result = json.loads(report.read_text())
    assert (result["num_ok"], result["num_failed"]) == (500, 0), json.dumps(result, indent=1)
    assert result["num_prompt_tokens"] == sum(-(-int(row[1]) // 8) for row in rows)
    assert result["num_output_tokens"] == sum(-(-int(row[2]) // 8) for row in rows)
    assert after[0] - before[0] == result["num_prompt_tokens"] + PROBE_PROMPT_TOKENS
    assert after[1] - before[1] == result["num_output_tokens"] + PROBE_OUTPUT_TOKENS
