"""`IngressProcess`: the Serve deployment around one `Ingress`. Wires Ray's context to parts that know no Ray."""

import asyncio
import hashlib
import time
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.config import ServingConfig
from cluster.dispatcher import Dispatcher
from cluster.ingress import Ingress, build_app
from cluster.loopback import bind_replica_server_to_node, node_address
from cluster.metrics import IngressMetrics, MetricsEndpoint, RouterCollector
from cluster.process_log import log_with_serve
from cluster.replica import ServeTransport
from cluster.replica_board import ReplicaBoard
from cluster.routing_policy import RoutingPolicy
from cluster.served_model import ServedModel
from cluster.startup import read_reports
from cluster.status.cluster_watch import Deployment
from cluster.step_message import MetricsTarget
from cluster.tokenizer import Tokenizer
from cluster.tracing import Tracing
from engine import EngineConfig

DEPLOYMENT = "Ingress"


class IngressProcess:
    """One HTTP process. Every process of an application knows every replica and routes by itself."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: ServingConfig, engine_config: EngineConfig, board: str, replicas: DeploymentHandle[Any]
    ) -> None:
        bind_replica_server_to_node()
        log_with_serve()
        ingress_id = serve.get_replica_context().replica_id.unique_id
        name = config.names[0]
        registry = CollectorRegistry()
        self._endpoint = MetricsEndpoint(registry, node_address())
        metrics = IngressMetrics(registry, name, config.objectives)
        policy = RoutingPolicy(
            prefix_affinity=config.routing.prefix_affinity and config.prefix_caching,
            expected_output_tokens=config.routing.expected_output_tokens,
        )
        registry.register(RouterCollector(policy.loads, name))
        handle = replicas.options(stream=False)  # this makes Serve create the router, which fills the board
        self._dispatcher = Dispatcher(
            policy,
            lambda replica_id: ServeTransport(handle, replica_id),
            MetricsTarget("ingress", ingress_id, self._endpoint.address),
            metrics.routed,
            on_replica=metrics.replica_changed,
            on_gone=metrics.replica_gone,
        )
        ReplicaBoard.named(board).listen(self._dispatcher.set_replicas)
        model = ServedModel(
            names=config.names,
            tokenizer=Tokenizer.load(config.model),
            max_model_len=engine_config.max_model_len,
            vocab_size=engine_config.model.vocab_size,
            default_max_tokens=config.default_max_tokens,
            created=int(time.time()),
            fingerprint=_fingerprint(engine_config),
        )
        deployment = Deployment(models=config.names, num_replicas=config.replicas, read_starts=read_reports)
        models = {alias: model for alias in model.names}
        self._tracing = Tracing.open(config.tracing, "ingress", ingress_id)
        self._ingress = Ingress(
            models, self._dispatcher, metrics, config.max_body, deployment, config.logs, self._tracing.tracer
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application of this process."""
        return build_app(self._ingress, self._stop)

    async def _stop(self) -> None:
        await self._dispatcher.close()
        self._endpoint.close()
        await asyncio.to_thread(self._tracing.close)


def _fingerprint(config: EngineConfig) -> str:
    """OpenAI's `system_fingerprint`: equal where the same seed should draw the same tokens."""
    return (
        "fp_"
        + hashlib.blake2b(
            f"{config.model} {config.number_format} {config.cache_format}".encode(), digest_size=5
        ).hexdigest()
    )
