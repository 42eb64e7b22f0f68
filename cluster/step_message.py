"""What a replica tells an ingress over their one stream: first a `Hello`, then a `StepMessage` per engine step.

Outputs travel in columns, one per field of `TokenOutput`: 256 cost the engine's loop 0.04 ms to pack and pickle, as
objects they would cost 0.2 ms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.routing_policy import LoadSnapshot
from engine import FinishReason, RequestError, RequestId, TokenOutput

OutputColumns = tuple[tuple[Any, ...], ...]  # a column per field of `TokenOutput`, in order; none for no outputs
RequestProblem = tuple[str, str | None, str | None]  # message, parameter, code of a RequestError
Abort = tuple[RequestId, FinishReason]  # a request to end, and why
PROTOCOL_PICKLE = {"request_serialization": "pickle", "response_serialization": "pickle"}


@dataclass(frozen=True, slots=True)
class MetricsTarget:
    """A process's /metrics: what it is ("ingress", "replica"), its id and host:port."""

    kind: str
    process_id: str
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """A replica is ready for the requests of an ingress."""

    replica_id: str
    capacity_tokens: int
    block_size: int
    metrics: MetricsTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMessage:
    """What one step (or several, if the ingress was slow) produced for one ingress; empty as a heartbeat.

    `ingresses` are the metrics addresses of every ingress this replica serves: how they learn of each other.
    `death` is set on the last message of an engine that died.
    """

    outputs: OutputColumns
    load: LoadSnapshot
    ingresses: tuple[MetricsTarget, ...] | None = None
    death: str | None = None


def pack(outputs: Sequence[TokenOutput]) -> OutputColumns:
    """`TokenOutput`s as columns."""
    return tuple(zip(*outputs, strict=True))


def unpack(columns: OutputColumns) -> list[TokenOutput]:
    """The `TokenOutput`s back."""
    return [TokenOutput(*row) for row in zip(*columns, strict=True)]


def pack_problem(error: RequestError) -> RequestProblem:
    """A `RequestError` as a value: one bad request must not fail the call that carried a hundred good ones."""
    return (error.message, error.parameter, error.code)


def unpack_problem(problem: RequestProblem) -> RequestError:
    """The `RequestError` back."""
    return RequestError(*problem)
