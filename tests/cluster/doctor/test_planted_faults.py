"""Faults planted for real, one at a time: the doctor finds each, says what to do, and finds no other error.

Where a fault needs the whole machine (a full disk, a tiny /dev/shm) it is planted in a mount namespace of its own.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.serve_command import ROOT, free_port
from tests.cluster.status.views import replica, view

pytestmark = pytest.mark.slow
DEMO = ROOT / "deploy" / "demo_model" / "model"
DOCTOR = [sys.executable, "-m", "cluster.cli", "doctor", "--json"]
TOKEN, OTHER_TOKEN = "a" * 64, "b" * 64


def has_mount_namespaces() -> bool:
    return shutil.which("unshare") is not None and not subprocess.run(["unshare", "-m", "true"], check=False).returncode


in_a_namespace = pytest.mark.skipif(not has_mount_namespaces(), reason="no right to make a mount namespace")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint to spoil: the demo model's."""
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def doctor(
    *options: object, variables: Mapping[str, str] | None = None, before: str = "", namespace: bool = False
) -> tuple[int, list[dict[str, str]]]:
    """Exit status and what is not ok; `before` is a shell command that plants the fault."""
    command = [*DOCTOR, *map(str, options)]
    if not any(option == "--port" for option in options):
        command += ["--port", str(free_port())]
    if before:
        command = ["sh", "-c", f'{before} && exec "$@"', "sh", *command]
    if namespace:
        command = ["unshare", "-m", *command]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    outcome = subprocess.run(
        command,
        cwd=ROOT,
        env=environment | dict(variables or {}),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert outcome.stdout, outcome.stderr
    told = json.loads(outcome.stdout)
    assert told["status"] == outcome.returncode
    return outcome.returncode, [finding for finding in told["findings"] if finding["level"] != "ok"]


def the_error(answer: tuple[int, list[dict[str, str]]]) -> dict[str, str]:
    status, findings = answer
    errors = [finding for finding in findings if finding["level"] == "error"]
    assert status == 2 and len(errors) == 1, findings
    return errors[0]


def test_a_healthy_machine_has_no_error(model: Path) -> None:
    status, findings = doctor(model, "--device", "cpu")
    assert status <= 1, findings
    assert [finding for finding in findings if finding["check"] == "checkpoint"] == []


def _cut_short(model: Path) -> None:
    (file,) = model.glob("*.safetensors")
    os.truncate(file, file.stat().st_size - 1000)


def _lose_a_shard(model: Path) -> None:
    (file,) = model.glob("*.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()


def _lose_the_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


def _take_another_config(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 1000}))


def _leave_a_pointer(model: Path) -> None:
    (file,) = model.glob("*.safetensors")
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


@pytest.mark.parametrize(
    ("plant", "found", "remedy"),
    [
        (_cut_short, "model.safetensors is cut short", "Copy or download that file again"),
        (_lose_a_shard, "model-00001-of-00002.safetensors cannot be read", "Put all .safetensors files"),
        (_lose_the_tokenizer, "tokenizer", "Copy tokenizer.json"),
        (_take_another_config, "instead of [1000, 256]", "one and the same checkpoint"),
        (_leave_a_pointer, "a pointer of Git LFS", "lfs pull"),
    ],
)
def test_a_spoiled_checkpoint(model: Path, plant: Callable[[Path], None], found: str, remedy: str) -> None:
    plant(model)
    error = the_error(doctor(model, "--device", "cpu"))
    assert found in error["found"] and remedy in error["remedy"]
    assert error["where"] == str(model)


def test_more_memory_than_there_is(model: Path) -> None:
    recipe = model.parent / "recipe.yaml"
    recipe.write_text("model: model\ndevice: cpu\ncache: 100TiB\n")
    error = the_error(doctor(recipe))
    assert error["check"] == "memory" and "cache_bytes asks for" in error["found"] and "`cache:`" in error["remedy"]


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = the_error(doctor("--port", port))
    assert error["where"] == f"127.0.0.1:{port}"
    assert f"process {os.getpid()} (" in error["found"]
    assert f"Stop process {os.getpid()}" in error["remedy"] and "--port" in error["remedy"]


@in_a_namespace
def test_a_tiny_shared_memory() -> None:
    error = the_error(doctor(before="mount -t tmpfs -o size=64m tmpfs /dev/shm", namespace=True))
    assert (error["check"], error["where"]) == ("shared memory", "/dev/shm")
    assert "Only 64 of 64 MiB are free" in error["found"] and "--shm-size" in error["remedy"]


@in_a_namespace
def test_an_address_that_this_machine_does_not_have() -> None:
    error = the_error(doctor("--host", "192.0.2.1"))  # of RFC 5737: nobody's
    assert error["check"] == "ports" and "Cannot assign requested address" in error["found"]
    assert "has it" not in error["found"] and "--host" in error["remedy"]


@pytest.mark.parametrize(("variable", "place"), [("TMPDIR", "/mnt"), ("RAY_TMPDIR", None)])
def test_a_full_disk(tmp_path: Path, variable: str, place: str | None) -> None:
    place = place or str(tmp_path)
    mount = f"mount -t tmpfs -o size=8m tmpfs {place}"
    error = the_error(doctor(before=mount, namespace=True, variables={variable: place}))
    assert (error["check"], error["where"]) == ("disk", place)
    assert "only 0.01 of 0.0 GiB are free" in error["found"] and variable in error["remedy"]


def test_few_open_files() -> None:
    error = the_error(doctor(before="ulimit -S -n 256"))
    assert error["check"] == "open files" and "256 files" in error["found"] and "ulimit -n" in error["remedy"]


def test_a_version_that_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "httpx-0.1.dist-info").mkdir()
    (tmp_path / "httpx-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: httpx\nVersion: 0.1\n")
    error = the_error(doctor(variables={"PYTHONPATH": str(tmp_path)}))
    assert error["found"] == "httpx 0.1 does not fit >=0.27." and "pip install 'httpx>=0.27'" in error["remedy"]


def test_no_compiler() -> None:
    status, findings = doctor("--device", "cpu", variables={"CXX": "/nowhere/g++"})
    (finding,) = [finding for finding in findings if finding["check"] == "compiler"]
    assert (
        status >= 1 and "/nowhere/g++ is not there" in finding["found"] and "apt-get install g++" in finding["remedy"]
    )


def test_no_ray_cluster_at_the_address() -> None:
    port = free_port()
    error = the_error(doctor("--address", f"127.0.0.1:{port}"))
    assert (error["check"], error["where"]) == ("ray cluster", f"127.0.0.1:{port}")
    assert "Connection refused" in error["found"] and "ray start --head" in error["remedy"]


def test_rays_token_traps(tmp_path: Path) -> None:
    error = the_error(doctor(variables={"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}))
    assert "there is no token" in error["found"] and "get-auth-token" in error["remedy"]
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    _, findings = doctor(variables={"HOME": str(tmp_path)})
    (finding,) = [finding for finding in findings if finding["check"] == "ray cluster"]
    assert "turns authentication on by itself" in finding["found"] and "RAY_AUTH_MODE=disabled" in finding["remedy"]


@pytest.fixture
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a cluster that wants `TOKEN`."""
    directory = tmp_path_factory.mktemp("r")
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("ray")),
        *f"start --head --block --port {port} --temp-dir {directory} --include-dashboard=false".split(),
        *["--num-cpus", "1", "--object-store-memory", "80000000", "--disable-usage-stats", "--min-worker-port", "0"],
        *["--max-worker-port", "0"],
    ]
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.Popen(
        command,
        env=os.environ | variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not _listens(port):
            assert process.poll() is None and time.monotonic() < deadline, "Ray's head does not start"
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        finally:
            _end_users_of(directory)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _end_users_of(directory: Path) -> None:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if str(directory).encode() in (entry / "cmdline").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)
            except (OSError, ProcessLookupError):
                continue


@pytest.mark.ray
def test_a_ray_cluster_that_wants_another_token(ray_head: str) -> None:
    def asked(token: str) -> tuple[int, list[dict[str, str]]]:
        return doctor("--address", ray_head, variables={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token})

    status, findings = asked(TOKEN)
    assert status <= 1 and "ray cluster" not in {finding["check"] for finding in findings}
    error = the_error(asked(OTHER_TOKEN))
    assert error["where"] == ray_head
    assert "does not accept this token" in error["found"] and "RAY_AUTH_TOKEN" in error["remedy"]


@pytest.fixture
def server_of_tomorrow() -> Iterator[str]:
    """A server whose clock is a day ahead."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = view(replica("a"), replica("b"), time=time.time() + 86400).model_dump_json().encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_clock_that_is_wrong(server_of_tomorrow: str) -> None:
    error = the_error(doctor("--url", server_of_tomorrow))
    assert (error["check"], error["where"]) == ("clock", server_of_tomorrow)
    assert "ahead" in error["found"] and "timedatectl" in error["remedy"]


def test_a_server_that_is_not_there() -> None:
    error = the_error(doctor("--url", f"http://127.0.0.1:{free_port()}"))
    assert error["check"] == "server" and "Nothing answers" in error["found"] and "nanoserve serve" in error["remedy"]


def test_what_a_killed_server_leaves(tmp_path: Path) -> None:
    directory = tmp_path / "nanoserve-killed"
    (directory / "ray" / "session_1").mkdir(parents=True)
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", f"--temp-dir={directory}"])
    try:
        _, findings = doctor(variables={"TMPDIR": str(tmp_path)})
    finally:
        left.kill()
        left.wait()
    (finding,) = [finding for finding in findings if finding["where"] == str(directory)]
    assert finding["check"] == "leftovers" and f"kill {left.pid}" in finding["remedy"]
