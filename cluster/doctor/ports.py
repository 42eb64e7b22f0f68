"""The ports that a server wants to listen on, and who has them."""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.doctor.finding import Finding, error, ok, warning
from cluster.doctor.socket_table import Process, SocketTable
from cluster.fixed_port import PORTS_OF_EVERY_NODE, PORTS_OF_HEAD
from cluster.serving import check_port, local_url
from cluster.status.cluster_client import ClusterClient, NoAnswerError
from engine import ConfigError

CHECK = "ports"
_TAKEN = os.strerror(errno.EADDRINUSE)


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedPort:
    """`is_needed`: a server cannot do without it. `expected` is part of the command line of who may well have it."""

    port: int
    purpose: str
    host: str = "127.0.0.1"
    is_needed: bool = False
    expected: str = ""


RAY_PORTS = tuple(
    WantedPort(port=port.number, purpose=f"{port.purpose} (`ray up`)", expected=port.program)
    for port in PORTS_OF_HEAD + PORTS_OF_EVERY_NODE
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PortUse:
    """What is known of a wanted port: why nobody could listen there now, and who does; if nanoserve, what it serves."""

    wanted: WantedPort
    problem: str = ""
    holder: Process | None = None
    served_models: tuple[str, ...] = ()


def read_ports(wanted: Sequence[WantedPort]) -> list[PortUse]:
    """Try each of them."""
    table = SocketTable.read()
    return [_read(each, table) for each in wanted]


def judge_ports(uses: Sequence[PortUse]) -> list[Finding]:
    """One finding each."""
    return [_judge(use) for use in uses]


def _judge(use: PortUse) -> Finding:
    wanted = use.wanted
    where = f"{wanted.host}:{wanted.port}"
    if not use.problem:
        return ok(CHECK, f"Free for {wanted.purpose}.", where)
    holder = str(use.holder) if use.holder else "a process that this user cannot see"
    if use.served_models:
        return ok(CHECK, f"nanoserve serves {', '.join(use.served_models)} there: {holder}.", where)
    if use.holder is not None and wanted.expected and wanted.expected in use.holder.command:
        return ok(CHECK, f"{wanted.purpose} runs there: {holder}.", where)
    stop = f"Stop {holder}" if use.holder else f"Find who has it (`sudo ss -ltnp 'sport = :{wanted.port}'`)"
    if wanted.is_needed:
        if use.holder is None and _TAKEN not in use.problem:
            own = "Ports below 1024 are root's: choose" if wanted.port < 1024 else "Choose"
            remedy = (
                f"{own} an address of this machine (--host, `host:` in the recipe) and a port that is yours (--port)."
            )
            return error(CHECK, f"Wanted for {wanted.purpose}: {use.problem}.", where, remedy)
        found = f"Taken, but wanted for {wanted.purpose}: {use.problem}; {holder} has it."
        return error(CHECK, found, where, f"{stop}, or choose another with --port (or `port:` in the recipe).")
    return warning(CHECK, f"Taken by {holder}; {wanted.purpose} wants it.", where, f"{stop}, if Ray shall run here.")


def _read(wanted: WantedPort, table: SocketTable) -> PortUse:
    try:
        check_port(wanted.host, wanted.port)
    except ConfigError as refusal:
        models: tuple[str, ...] = ()
        if wanted.is_needed:
            models = _served_models(wanted)
        problem = str(refusal).partition(". ")[0]
        return PortUse(wanted=wanted, problem=problem, holder=table.holder(wanted.port), served_models=models)
    return PortUse(wanted=wanted)


def _served_models(wanted: WantedPort) -> tuple[str, ...]:
    with ClusterClient(local_url(wanted.host, wanted.port)) as client:
        try:
            return client.view().models
        except NoAnswerError:
            return ()
