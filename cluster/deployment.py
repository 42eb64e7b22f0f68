"""`Deployment`: one application put onto the Ray cluster this process is connected to, and watched until it answers.

It neither makes the connection nor ends anything: `cluster.serving` keeps an application as long as its command runs,
`cluster.deploy` leaves it to the cluster.
"""

import contextlib
import logging
import time
from collections.abc import Collection, Iterator
from typing import Any

from ray import serve

from cluster import app, startup
from cluster.config import ServingConfig
from cluster.narrator import Narrator, StartError
from cluster.process_log import serve_logging
from cluster.replica_start import ReplicaStart

ANSWER_SECONDS = 60.0
SILENCE_SECONDS = 10.0  # how long replicas may wait for their place before we say why
_POLL_SECONDS = 0.1


class Deployment:
    """`start`, then `wait_until_ready`."""

    def __init__(self, config: ServingConfig, url: str, narrator: Narrator) -> None:
        """`url` is where this process reaches the API."""
        self._config = config
        self._url = url
        self._narrator = narrator

    def start(self, application: serve.Application) -> None:
        """Begin with what `cluster.app.compose` made, also in place of an earlier application."""
        config = self._config
        startup.clear_reports()
        self._narrator.say(f"Starting {config.replicas} x {config.names[0]}, tensor_parallel {config.tensor_parallel}.")
        with quiet_serve():
            serve.start(
                http_options={"host": config.host, "port": config.port}, logging_config=serve_logging(config.logs)
            )
            serve.run_many(
                [serve.RunTarget(application, name=app.APPLICATION, route_prefix="/")],
                wait_for_ingress_deployment_creation=False,
                wait_for_applications_running=False,
            )

    def wait_until_ready(self) -> None:
        """Return when every replica serves; raises what stopped one, or `StartError`."""
        ready_since = None
        silent_until = time.monotonic() + SILENCE_SECONDS
        obstacle = ""
        while True:
            by_replica = startup.read_reports().by_replica
            num_ready = self._tell(by_replica.values())
            if num_ready >= self._config.replicas:
                ready_since = ready_since or time.monotonic()
                if self.answers():
                    self._narrator.memory({replica: report.memory for replica, report in by_replica.items()})
                    return
                if time.monotonic() - ready_since > ANSWER_SECONDS:
                    raise StartError(
                        f"The replicas are ready, but nothing answers at {self._url}. Serve on a cluster that was "
                        "running before keeps the host and port it was first started with."
                    )
            application = serve.status().applications.get(app.APPLICATION)
            failure = _failure(application)
            if failure is not None:
                raise StartError(failure)
            if len(by_replica) < self._config.replicas and time.monotonic() > silent_until:
                last, obstacle = obstacle, _messages(application) or "Waiting for the cluster to place the replicas."
                if obstacle != last:
                    self._narrator.say(obstacle)
            time.sleep(_POLL_SECONDS)

    def _tell(self, reports: Collection[ReplicaStart]) -> int:
        """Say how far the replicas are; how many are ready. Raises what stopped one."""
        for report in reports:
            if report.error is not None:
                raise report.error
            if report.doing and report.ready_at is None:
                self._narrator.doing(report.doing)
        num_ready = sum(report.ready_at is not None and not report.is_lost for report in reports)
        done, total = sum(report.done for report in reports), sum(report.total for report in reports)
        self._narrator.loading(done, total, num_ready, self._config.replicas)
        return num_ready

    def answers(self) -> bool:
        """Whether the API can be used now."""
        import httpx

        try:
            return httpx.get(f"{self._url}/ready", timeout=2.0).status_code == 200
        except (httpx.HTTPError, httpx.InvalidURL):
            return False


def _failure(application: Any) -> str | None:
    if application is None or application.status.value not in {"DEPLOY_FAILED", "UNHEALTHY"}:
        return None
    return what_serve_says(application)


def what_serve_says(application: Any) -> str:
    """Of an application that is not well: what went wrong with its deployments, or with all of it."""
    return _messages(application) or application.message or f"The application is {application.status.value}."


def _messages(application: Any) -> str:
    """What Serve has to say about the deployments, if anything."""
    deployments = {} if application is None else application.deployments
    return "\n".join(deployment.message for deployment in deployments.values() if deployment.message)


@contextlib.contextmanager
def quiet_serve() -> Iterator[None]:
    """Serve's own lines would repeat ours in other words."""
    logger = logging.getLogger("ray.serve")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
