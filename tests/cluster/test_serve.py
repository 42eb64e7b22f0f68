"""`nanoserve serve` as a user runs it: 2 replicas of 2 ranks on a CPU, real HTTP, real kills, nothing left behind."""

import asyncio
import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.process_tree import descendants
from cluster.serving import local_url
from engine.model_config import Architecture
from engine.random_checkpoint import sized_config, write_random_checkpoint
from tests.cluster.serve_command import Command, free_port, until

SECONDS = 60.0  # patience with a busy machine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_random_checkpoint(path, sized_config(Architecture.LLAMA))
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


async def all_running(server: Command, num_requests: int) -> None:
    """Return once the engines compute tokens of so many requests."""
    async with asyncio.timeout(SECONDS):
        while sum(server.samples("nanoserve_num_requests_running").values()) != num_requests:
            await asyncio.sleep(0.05)


def num_aborted(server: Command, replicas: list[str] | None = None) -> float:
    """Requests that engines ended before their ends."""
    name = 'nanoserve_engine_requests_finished_total{[^}]*finished_reason="abort"[^}]*}'
    return sum(server.samples(name, replicas).values())


def completion(**changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 8, "ignore_eos": True} | changes


@pytest.mark.ray
def test_the_ready_line_can_be_pasted(server: Command) -> None:
    first, curl, *rest = server.output.read_text().splitlines()
    assert first == f"nanoserve is ready: tiny at http://127.0.0.1:{server.port}/v1; try:"
    assert not rest
    answer = subprocess.run([*shlex.split(curl), "-sf"], capture_output=True, text=True, check=True)
    assert '"chat.completion"' in answer.stdout


@pytest.mark.ray
def test_the_official_client_works(server: Command) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none")
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=6,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6
    with pytest.raises(openai.NotFoundError) as raised:
        client.completions.create(model="other", prompt="x")
    assert raised.value.code == "model_not_found"
    client.close()


@pytest.mark.ray
def test_an_answer_has_one_request_id(server: Command) -> None:
    response = server.client.post("/v1/completions", json=completion(), headers={"X-Request-Id": "mine"})
    assert response.headers.get_list("x-request-id") == ["mine"]
    assert len(server.client.get("/nowhere").headers.get_list("x-request-id")) == 1


@pytest.mark.ray
def test_many_calls_use_every_replica_and_are_counted_exactly(server: Command) -> None:
    def tokens() -> tuple[float, float]:
        prompt = server.samples("nanoserve_prompt_tokens_total")
        return sum(prompt.values()), sum(server.samples("nanoserve_generation_tokens_total").values())

    async def post_all() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=server.client.base_url, timeout=120, limits=limits) as client:
            bodies = [completion(prompt=[i % 200, i // 7], max_tokens=1 + i % 9) for i in range(60)]
            return await asyncio.gather(*[client.post("/v1/completions", json=body) for body in bodies])

    steps = server.samples("nanoserve_engine_steps_total")
    before = tokens()
    responses = asyncio.run(post_all())
    assert {response.status_code for response in responses} == {200}
    usages = [response.json()["usage"] for response in responses]
    after = tokens()
    assert after[0] - before[0] == sum(usage["prompt_tokens"] for usage in usages)
    assert after[1] - before[1] == sum(usage["completion_tokens"] for usage in usages)
    now = server.samples("nanoserve_engine_steps_total")
    assert len(now) == 2
    assert all(now[address] > steps[address] for address in now)
    until(lambda: server.is_idle, SECONDS, "all loads to return to zero")


@pytest.mark.ray
@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_leave_free_their_blocks(server: Command, stream: bool) -> None:
    async def leave() -> None:
        async with httpx.AsyncClient(base_url=server.client.base_url, timeout=60) as client:
            body = completion(max_tokens=2000, stream=stream)
            calls = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(6)]
            await all_running(server, 6)
            assert not any(call.done() for call in calls)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    for _ in range(2):
        before = num_aborted(server)
        asyncio.run(leave())
        until(lambda: server.is_idle, SECONDS, "the requests to end")
        assert num_aborted(server) == before + 6


@pytest.mark.ray
def test_nothing_listens_beyond_loopback(server: Command) -> None:
    addresses = [address for pid in server.processes() for address in listening(pid)]
    assert len(addresses) > 5
    assert {address for address in addresses if not is_loopback(address)} == set()


@pytest.mark.ray
def test_nobody_else_gets_at_its_files(server: Command) -> None:
    assert server.state_directory is not None
    assert server.state_directory.stat().st_mode & 0o077 == 0, "HAProxy's program and control socket lie there"


@pytest.mark.ray
def test_a_second_server_on_the_cluster_is_refused_and_harms_nobody(
    tmp_path: Path, checkpoint: Path, server: Command
) -> None:
    lines, ranks = server.processes(), server.ranks()
    raylet = next(pid for pid, line in lines.items() if "/raylet/raylet " in line)
    told = re.search(r"--gcs-address=(\S+)", lines[raylet])
    assert told is not None
    entries = Path(f"/proc/{raylet}/environ").read_text().rstrip("\0").split("\0")
    variables = {name: value for name, _, value in (entry.partition("=") for entry in entries) if name[:4] == "RAY_"}
    command = Command(tmp_path, checkpoint, "--address", told[1], "--device", "cpu", variables=variables)
    try:
        assert command.process.wait(2 * SECONDS) == 2
        assert "already runs an application 'nanoserve'" in command.errors.read_text()
        assert server.client.post("/v1/completions", json=completion()).status_code == 200
        assert server.ranks() == ranks
    finally:
        command.close()


@pytest.mark.ray
def test_a_killed_ingress_ends_its_requests_and_comes_back(server: Command) -> None:
    until(lambda: server.is_idle, SECONDS, "earlier requests to end")
    replicas = server.targets("replica")
    before = num_aborted(server, replicas)

    async def kill_while_streaming() -> None:
        async with httpx.AsyncClient(base_url=server.client.base_url, timeout=60) as client:
            body = completion(max_tokens=2000, stream=True)
            sending = asyncio.create_task(client.post("/v1/completions", json=body))
            await all_running(server, 1)
            os.kill(server.named("ServeReplica:nanoserve:Ingress")[0], signal.SIGKILL)
            with pytest.raises(httpx.RemoteProtocolError):
                await sending

    asyncio.run(kill_while_streaming())
    until(lambda: num_aborted(server, replicas) == before + 1, SECONDS, "the replicas to abort what nobody reads")
    answer = server.client.post("/v1/completions", json=completion())
    assert answer.status_code == 200 or answer.json()["error"]["code"] == "service_unavailable"
    until(lambda: len(server.targets()) == 4 and server.is_idle, 2 * SECONDS, "a new ingress")


@pytest.mark.ray
def test_a_killed_rank_is_an_error_and_then_a_new_replica(server: Command) -> None:
    until(lambda: server.is_idle, SECONDS, "earlier requests to end")

    async def kill_while_streaming() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.client.base_url, timeout=60) as client:
            body = completion(max_tokens=2000, stream=True)
            calls = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(4)]
            await all_running(server, 4)
            os.kill(server.ranks()[0], signal.SIGKILL)
            return await asyncio.gather(*calls)

    responses = asyncio.run(kill_while_streaming())
    failed = [response for response in responses if "service_unavailable" in response.text]
    assert len(failed) == 2, "two of four calls ran on the replica that lost a rank"
    assert all(response.text.rstrip().endswith("[DONE]") for response in responses if response not in failed)
    assert server.client.post("/v1/completions", json=completion()).status_code == 200, "the other one goes on"
    until(lambda: len(server.samples("nanoserve_num_requests_running")) == 2, 2 * SECONDS, "the new replica")
    until(lambda: server.is_idle, SECONDS, "all loads to return to zero")


@pytest.mark.ray
def test_interrupting_answers_what_runs_and_leaves_nothing_behind(server: Command) -> None:
    until(lambda: len(server.ranks()) == 4, SECONDS, "the ranks of both replicas")
    assert len(server.processes()) > 10
    with server.client.stream("POST", "/v1/completions", json=completion(max_tokens=500, stream=True)) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        assert server.signal(signal.SIGINT) == 0
        *_, last = filter(None, lines)
    assert last == "data: [DONE]"
    assert "ServeController" not in server.errors.read_text(), "Ray has nothing to say about a stop"
    assert server.processes() == {}
    with socket.create_server(("127.0.0.1", server.port)):
        pass
    assert server.state_directory is not None
    assert not server.state_directory.exists()


@pytest.mark.ray
@pytest.mark.parametrize("part", ["/raylet/raylet ", "ray::Rank"])
def test_interrupting_the_start_leaves_nothing_behind(tmp_path: Path, checkpoint: Path, part: str) -> None:
    """While Ray starts, and while the model does: as soon as there is a process of it."""
    options = "--tensor-parallel 2 --threads 1 --device cpu --plan-seconds 0"
    command = Command(tmp_path, checkpoint, *options.split())
    try:
        until(lambda: any(part in line for line in command.processes().values()), 2 * SECONDS, part)
        assert descendants(command.process.pid)
        assert command.signal(signal.SIGTERM) == 128 + signal.SIGTERM
        assert command.processes() == {}
        assert command.state_directory is not None
        assert not command.state_directory.exists()
    finally:
        command.close()


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("::1", "http://[::1]:80"),
        ("localhost", "http://localhost:80"),
    ],
)
def test_the_url_of_a_host_is_one_that_clients_take(host: str, url: str) -> None:
    assert local_url(host, 80) == url
    assert httpx.URL(url).scheme == "http"


def test_a_port_in_use_is_said_before_anything_starts(tmp_path: Path, checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = Command(tmp_path, checkpoint, "--port", port)
        assert command.process.wait(SECONDS) == 2
    message = command.errors.read_text()
    assert f"Cannot listen on 127.0.0.1:{port}" in message
    assert "--port" in message
    assert "Starting" not in message
    command.close()


def test_a_broken_checkpoint_is_said_before_anything_starts(tmp_path: Path, checkpoint: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    command = Command(tmp_path, broken)
    assert command.process.wait(SECONDS) == 2
    message = command.errors.read_text()
    assert message.startswith("nanoserve: ")
    assert str(broken) in message
    assert "Traceback" not in message
    command.close()


def test_a_cluster_that_is_not_there_is_said_at_once(tmp_path: Path, checkpoint: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    command = Command(tmp_path, checkpoint, "--address", address)
    assert command.process.wait(SECONDS) == 2
    assert f"There is no Ray cluster at {address}" in command.errors.read_text()
    command.close()


def test_a_misspelt_recipe_is_said(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: x\nreplicsa: 2\n")
    command = Command(tmp_path, recipe)
    assert command.process.wait(SECONDS) == 2
    assert "unknown key 'replicsa'; did you mean 'replicas'?" in command.errors.read_text()
    command.close()


def listening(pid: int) -> list[str]:
    """Local addresses, in hexadecimal as the kernel writes them, on which a process listens."""
    inodes = set()
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
    found = []
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            columns = row.split()
            if columns[3] == "0A" and columns[9] in inodes:
                found.append(columns[1].split(":")[0])
    return found


def is_loopback(address: str) -> bool:
    """127.0.0.1, ::1, or 127.0.0.1 in IPv6's clothes."""
    return address in {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
