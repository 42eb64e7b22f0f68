"""`nanoserve deploy`: put a recipe onto a running Ray cluster, return when it answers, and leave it there.

Repeating it with the same recipe and code changes nothing; with others the replicas are replaced by Serve's rolling
update. `ray_cluster.yaml` runs it on the head; it waits for the workers that the cluster is meant to have.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.autoscaler_log import autoscaler_log, complaints, current_part, has_given_up
from cluster.config import ServingConfig
from cluster.launch_file import LaunchFile
from cluster.monitoring import point_prometheus_at
from cluster.narrator import Narrator, StartError
from cluster.ray_environment import serving_environment
from cluster.ray_node import ROOT, cluster_variables, head_address, running_node
from cluster.serving import check_cluster, check_port, local_url
from cluster.start_display import StartDisplay
from cluster.state_directory import state_directory
from cluster.tokenizer import Tokenizer
from cluster.tracing import check_tracing
from engine import ConfigError, DeviceKind, check_checkpoint

UPDATE_SECONDS = 600.0
_POLL_SECONDS = 0.5


def deploy(
    recipe: Annotated[Path, typer.Argument(help="A recipe (.yaml), or a checkpoint's directory.")],
    address: Annotated[
        str | None, typer.Option(help="The Ray cluster's head, host:port (default: the cluster of this machine).")
    ] = None,
    cluster_file: Annotated[
        Path | None, typer.Option(help="Of `ray up`: wait for the machines it wants (~/ray_bootstrap_config.yaml).")
    ] = None,
    wait_seconds: Annotated[float, typer.Option(help="How long to wait for machines.")] = 600.0,
) -> None:
    """Serve a model on a running Ray cluster for as long as that runs."""
    display = StartDisplay()
    config = ServingConfig.load(recipe)
    check_checkpoint(config.engine_config(DeviceKind.CUDA if config.device == "cuda" else DeviceKind.CPU))
    check_tracing(config.tracing)
    Tokenizer.load(config.model)
    num_nodes = 1 if cluster_file is None else 1 + LaunchFile.load(cluster_file).min_workers
    is_here = _connect(address)
    try:
        if _deploy(config, num_nodes, wait_seconds, display):
            display.ready(config, local_url(config.host, config.port))
        else:
            display.say(f"{config.names[0]} is served already, with this recipe and this code: nothing to do.")
        if is_here:
            point_prometheus_at(local_url(config.host, config.port), state_directory(), ROOT)
    finally:
        display.stop()
        _disconnect()


def _connect(address: str | None) -> bool:
    """Join the cluster; whether it is the one that `nanoserve ray start` started here."""
    node = running_node() if address is None else None
    if address is not None:
        environment = serving_environment()
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # unset, Ray decides by what files there are
    elif node is not None:
        address = head_address(node)
        environment = cluster_variables(node)
    else:
        raise ConfigError(
            "No Ray of ours runs on this machine: start it (`nanoserve ray start --head`, or `ray up ray_cluster.yaml` "
            "for all machines), or name another cluster with --address."
        )
    check_cluster(address)
    os.environ.update(environment)
    import ray

    try:
        ray.init(address=address, namespace="nanoserve", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"The Ray cluster at {address} cannot be joined: {error}") from None
    return node is not None


def _disconnect() -> None:
    import ray

    ray.shutdown()


def _deploy(config: ServingConfig, num_nodes: int, wait_seconds: float, narrator: Narrator) -> bool:
    """Whether there was anything to do."""
    from ray import serve

    from cluster import app
    from cluster.deployed_state import DeployedState, read_deployed_state
    from cluster.deployment import Deployment

    new, old = DeployedState.of(config, ROOT), read_deployed_state()
    running = serve.status().applications.get(app.APPLICATION)
    deployment = Deployment(config, local_url(config.host, config.port), narrator)
    if running is not None and old is None:
        raise ConfigError("The Ray cluster serves for a `nanoserve serve --address` elsewhere: stop that first.")
    is_same = old is not None and old.is_ready and old.fingerprint == new.fingerprint
    if is_same and running is not None and running.status.value == "RUNNING" and deployment.answers():
        return False
    if old is None:
        check_port(config.host, config.port, "`port` in the recipe")
    elif (old.host, old.port) != (new.host, new.port):
        raise ConfigError(
            f"This Ray cluster's API listens on {old.host}:{old.port} as long as the cluster lives; the recipe wants "
            f"{new.host}:{new.port}. End the cluster first (`ray down`), or leave host and port as they are."
        )
    _wait_for_nodes(app.cluster_nodes, num_nodes, wait_seconds, narrator)
    application = app.compose(config)
    new.write()
    deployment.start(application)
    deployment.wait_until_ready()
    if running is not None:
        _wait_for_update(lambda: serve.status().applications.get(app.APPLICATION))
    replace(new, is_ready=True).write()
    return True


def _wait_for_nodes(nodes: Any, wanted: int, wait_seconds: float, narrator: Narrator) -> None:
    """Return when `wanted` machines take part, or after a while with those that do; what cannot fit is told later."""
    deadline = time.monotonic() + wait_seconds
    num_told = 0
    reasons: list[str] = []
    while len(present := nodes()) < wanted:
        log = current_part(autoscaler_log())
        for reason in complaints(log):
            if reason not in reasons:
                reasons.append(reason)
                narrator.say(f"A machine does not join: {reason}")
        if has_given_up(log):
            raise StartError(
                f"{len(present)} of {wanted} machines take part, and another could not be started (see above; all of "
                f"it is in {autoscaler_log()}). Mend it and repeat `ray up`, or take it out of worker_ips."
            )
        if time.monotonic() > deadline:
            narrator.say(f"Going on with {len(present)} of {wanted} machines; see {autoscaler_log()} for the others.")
            return
        if len(present) != num_told:
            num_told = len(present)
            narrator.say(f"{num_told} of {wanted} machines take part; waiting for the others.")
        time.sleep(_POLL_SECONDS)


def _wait_for_update(find: Callable[[], Any]) -> None:
    """Return when no replica of the earlier deployment serves any more; `find` asks Serve for the application."""
    from cluster.deployment import what_serve_says

    deadline = time.monotonic() + UPDATE_SECONDS
    while True:
        application = find()
        if application is None:
            raise StartError("The application was taken from the cluster while its replicas were replaced.")
        status = application.status.value
        if status == "RUNNING":
            return
        if status == "DEPLOY_FAILED":  # Serve has given up, and will not try again
            raise StartError(f"The earlier replicas could not all be replaced: {what_serve_says(application)}")
        if time.monotonic() > deadline:
            raise StartError(f"The new replicas serve, but after {UPDATE_SECONDS:.0f} s the application is {status}.")
        time.sleep(_POLL_SECONDS)
