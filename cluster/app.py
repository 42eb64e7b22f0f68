"""The composition root: from a `ServingConfig` to a Ray Serve application (import path `cluster.app:build`).

One `Ingress` deployment behind HAProxy, one `Replica` deployment whose replicas each bring a placement group for
their ranks. Everything that can be checked is checked here, before any replica starts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from cluster import ingress_process, replica
from cluster.config import ServingConfig
from cluster.ingress_process import IngressProcess
from cluster.placement import STRATEGY, NodeResources, Placement, plan_placement
from cluster.process_log import serve_logging
from cluster.replica import Replica
from engine import ConfigError, DeviceKind, EngineConfig

APPLICATION = "nanoserve"
# Queueing is the engine's: Serve must neither refuse nor delay a call.
MAX_ONGOING_REQUESTS = 1_000_000
HEALTH_PERIOD_SECONDS = 2.0
HEALTH_TIMEOUT_SECONDS = 30.0
SHUTDOWN_SECONDS = 10.0


def build(args: Mapping[str, Any]) -> Application:
    """Serve's entry: `args` are the keys of a recipe, or `recipe: path` with keys that override it."""
    values = dict(args)
    recipe = values.pop("recipe", None)
    if recipe is not None:
        return compose(ServingConfig.load(Path(recipe), values))
    return compose(ServingConfig.parse(values, where="args of cluster.app:build"))


def compose(config: ServingConfig) -> Application:
    """The application on the cluster this process is connected to; raises `ConfigError`."""
    nodes = cluster_nodes()
    if not nodes:
        raise ConfigError("The Ray cluster has no running node.")
    device = config.resolve_device(sum(node.num_gpus for node in nodes))
    placement = plan_placement(
        nodes,
        device=device,
        tensor_parallel=config.tensor_parallel,
        num_replicas=config.replicas,
        num_ingress=config.ingress_replicas,
    )
    engine_config = config.engine_config(device, placement.threads_per_rank)
    return _bind(config, engine_config, device, placement)


def cluster_nodes() -> list[NodeResources]:
    """What the nodes of the connected cluster offer in total, free or not."""
    return [
        NodeResources(node["NodeManagerAddress"], node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]


def _bind(config: ServingConfig, engine_config: EngineConfig, device: DeviceKind, placement: Placement) -> Application:
    board = f"{config.names[0]} replicas"
    shared = {
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "health_check_period_s": HEALTH_PERIOD_SECONDS,
        "health_check_timeout_s": HEALTH_TIMEOUT_SECONDS,
        "graceful_shutdown_timeout_s": SHUTDOWN_SECONDS,
        "logging_config": serve_logging(config.logs),
    }
    replicas = _deployment(Replica, replica.DEPLOYMENT).options(
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": placement.replica_cpus},
        placement_group_bundles=placement.bundles,
        placement_group_strategy=STRATEGY,
        request_router_config=RequestRouterConfig(
            request_router_class="cluster.router:ReplicaRouter",  # type: ignore[arg-type]
            request_router_kwargs={"board": board},
        ),
        **shared,
    )
    ingress = _deployment(serve.ingress()(IngressProcess), ingress_process.DEPLOYMENT).options(
        num_replicas=config.ingress_replicas, ray_actor_options={"num_cpus": placement.ingress_cpus}, **shared
    )
    application: Application = ingress.bind(config, engine_config, board, replicas.bind(config, device, placement))
    return application


def _deployment(process: Any, name: str) -> Any:
    return serve.deployment(process, name=name)
