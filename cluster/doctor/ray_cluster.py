"""The Ray cluster that a server would join: whether it can be reached, what token it wants, and what it consists of."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster.auth_token import has_token, token_file
from cluster.doctor.clock import ClockOffset, judge_clocks, offset_of
from cluster.doctor.finding import Finding, error, ok, warning
from cluster.marked_processes import MarkedProcess
from cluster.ray_node import cluster_variables, head_address
from cluster.serving import check_cluster
from engine import ConfigError

CHECK = "ray cluster"
PROBE_SECONDS = 60.0
_LOOK_SECONDS = 0.5
_REFUSAL = "InvalidAuthToken"
_MODE = "RAY_AUTH_MODE"
_SEND = "Give every node and client the same: RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN (or the same ~/.ray/auth_token)."


@dataclass(frozen=True, slots=True, kw_only=True)
class RayAuthentication:
    """What an environment says of Ray's token: RAY_AUTH_MODE, whether there is one to show, and where its file is."""

    mode: str | None
    has_token: bool
    file: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class RayNode:
    """One living node."""

    address: str
    num_cpus: float
    num_gpus: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RayCluster:
    """What joining it showed, or the `problem`; `is_refused`: it wants another token."""

    address: str
    problem: str = ""
    is_refused: bool = False
    nodes: tuple[RayNode, ...] = ()
    num_dead: int = 0
    clocks: tuple[ClockOffset, ...] = ()


def ray_to_join(
    address: str | None, raylet: MarkedProcess | None, environment: Mapping[str, str] = os.environ
) -> tuple[str | None, Mapping[str, str]]:
    """The cluster to look at and the variables to join it with: `raylet` is what `nanoserve ray start` runs here.

    As for `nanoserve deploy`, its cluster is the one that is meant where none is named, and is joined as it was
    started, whatever this shell says.
    """
    if raylet is None or address not in (None, head_address(raylet)):
        return address, environment
    return head_address(raylet), dict(environment) | cluster_variables(raylet)


def read_authentication(environment: Mapping[str, str] = os.environ) -> RayAuthentication:
    """Of processes with these variables."""
    return RayAuthentication(
        mode=environment.get(_MODE) or None, has_token=has_token(environment), file=token_file(environment)
    )


def judge_authentication(authentication: RayAuthentication) -> list[Finding]:
    """The trap: with a token and without the mode, `ray start` asks for one that other nodes do not know."""
    where = f"${_MODE}, {authentication.file}"
    if authentication.mode == "token" and not authentication.has_token:
        remedy = f"Make one (`RAY_AUTH_MODE=token ray get-auth-token --generate`). {_SEND}"
        return [error(CHECK, "RAY_AUTH_MODE is token, but there is no token.", where, remedy)]
    if authentication.mode is None and authentication.has_token:
        found = "RAY_AUTH_MODE is not set, but there is a token: `ray start` turns authentication on by itself."
        remedy = "Say which on every node: RAY_AUTH_MODE=token with the same token, or RAY_AUTH_MODE=disabled."
        return [warning(CHECK, found, where, remedy)]
    return []


def read_cluster(address: str, environment: Mapping[str, str] = os.environ) -> RayCluster:
    """Join it for a moment, in a process of its own."""
    try:
        check_cluster(address)
    except ConfigError as problem:
        return RayCluster(address=address, problem=str(problem).partition(". ")[0] + ".")
    # Unset, `nanoserve serve` joins without a token: what it would meet is what is looked for.
    variables = {_MODE: "disabled"} | dict(environment) | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
    command = [sys.executable, "-m", "cluster.doctor.ray_probe", address]
    outcome = _run(command, variables)
    try:
        seen = json.loads(outcome.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        is_refused = _REFUSAL in outcome.stderr or "AuthenticationError" in outcome.stderr
        lines = outcome.stderr.strip().splitlines() or ["no reason given"]
        return RayCluster(address=address, problem=lines[-1], is_refused=is_refused)
    nodes = seen["nodes"]
    return RayCluster(
        address=address,
        nodes=tuple(RayNode(address=each["address"], num_cpus=each["cpus"], num_gpus=each["gpus"]) for each in nodes),
        num_dead=seen["num_dead"],
        clocks=tuple(offset_of(each["address"], *each["clock"]) for each in nodes if each["clock"]),
    )


def judge_cluster(cluster: RayCluster, num_gpus_wanted: int = 0) -> list[Finding]:
    """Reachable, let in, with nodes, and with clocks that agree."""
    if cluster.is_refused:
        return [error(CHECK, "It does not accept this token, or wants one and was shown none.", cluster.address, _SEND)]
    if cluster.problem:
        remedy = (
            "Start one (`ray start --head`, `ray up`), correct --address or RAY_ADDRESS, or open the port on the way."
        )
        if "version" in cluster.problem.lower():
            remedy = f"Use one version of Ray and Python on all nodes; here it is Ray {version('ray')}."
        return [error(CHECK, cluster.problem, cluster.address, remedy)]
    num_gpus = sum(node.num_gpus for node in cluster.nodes)
    if num_gpus < num_gpus_wanted:
        found = f"It has {num_gpus:g} GPUs, and the recipe's replicas take {num_gpus_wanted}."
        remedy = "Add nodes with GPUs, or lower `replicas:` or `tensor_parallel:`."
        return [error(CHECK, found, cluster.address, remedy)]
    cpus = sum(node.num_cpus for node in cluster.nodes)
    found = f"{len(cluster.nodes)} nodes with {cpus:g} CPUs and {num_gpus:g} GPUs."
    findings = [ok(CHECK, found.replace("1 nodes", "1 node") if len(cluster.nodes) == 1 else found, cluster.address)]
    if cluster.num_dead:
        remedy = "If they should be there, look at /tmp/ray/session_latest/logs/raylet.out on them."
        findings.append(warning(CHECK, f"{cluster.num_dead} nodes have died.", cluster.address, remedy))
    return [*findings, *judge_clocks(cluster.clocks)]


def _run(command: list[str], variables: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        command, env=variables, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    deadline = time.monotonic() + PROBE_SECONDS
    while True:
        try:
            output, errors = process.communicate(timeout=_LOOK_SECONDS)
            return subprocess.CompletedProcess(command, process.returncode, output, errors)
        except subprocess.TimeoutExpired as silence:
            so_far: Any = silence.stderr or b""  # bytes, whatever the process was opened with
            is_late = time.monotonic() > deadline
            if is_late or _REFUSAL.encode() in so_far:  # Ray would ask again and again with the same token
                process.kill()
                output, errors = process.communicate()
                late = f"\nRay did not answer within {PROBE_SECONDS:.0f} s." if is_late else ""
                return subprocess.CompletedProcess(command, process.returncode, output, errors + late)
