"""Keeps the servers that Ray Serve opens in each replica process to the node's own address.

Serve 2.60 binds the gRPC server to every interface, and the HTTP server of an ingress, which the HAProxy of any node
may call, to the host of the API: on 127.0.0.1 no other node reaches it. There is no setting for either. A test looks at
every listening socket of a running server, and another at a cluster of two machines, so a Ray that changes here cannot
go unnoticed. `cluster.haproxy` does the same for HAProxy's pages.
"""

from typing import Any

import ray
from ray.serve._private import replica

_ANY = "[::]:0"
_serve_replica: Any = replica


def node_address() -> str:
    """The address of this node that the cluster uses; loopback where `nanoserve serve` made the cluster."""
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


def bind_replica_server_to_node() -> None:
    """In a replica's constructor, before Serve opens its servers: bind them to the node's address."""
    original = _serve_replica.add_port_to_grpc_server
    if getattr(original, "is_bound_to_node", False):
        return
    start_http_server = _serve_replica.start_asgi_http_server

    def bound_http(app: Any, options: Any, **others: Any) -> Any:
        return start_http_server(app, options.model_copy(update={"host": node_address()}), **others)

    def bound(server: object, address: str) -> int:
        if address == _ANY:
            address = f"{node_address()}:0"
        port: int = original(server, address)
        return port

    bound.is_bound_to_node = True  # type: ignore[attr-defined]
    _serve_replica.add_port_to_grpc_server = bound
    _serve_replica.start_asgi_http_server = bound_http
