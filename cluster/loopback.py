"""Keeps the gRPC server that Ray Serve opens in each replica process to the node's own address.

Serve 2.60 binds it to every interface and has no setting for it. A test looks at every listening socket of a running
server, so a Ray that changes here cannot go unnoticed. `cluster.haproxy` does the same for HAProxy's pages.
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
    """In a replica's constructor, before Serve opens its gRPC server: bind that to the node's address."""
    original = _serve_replica.add_port_to_grpc_server
    if getattr(original, "is_bound_to_node", False):
        return

    def bound(server: object, address: str) -> int:
        if address == _ANY:
            address = f"{node_address()}:0"
        port: int = original(server, address)
        return port

    bound.is_bound_to_node = True  # type: ignore[attr-defined]
    _serve_replica.add_port_to_grpc_server = bound
