"""`probe`: what one machine of a cluster file is like, asked once over ssh, and why ssh fails where it does.

`ray up` itself asks again and again for a quarter of an hour, whatever the reason.
"""

import shlex
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.launch_file import LaunchFile

SSH_PORT = 22
CONNECT_SECONDS = 5.0
PROBE_SECONDS = 40.0
_SCRIPT = Path(__file__).with_name("machine_probe.sh")
_OPTIONS = ("BatchMode=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "IdentitiesOnly=yes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the probe found. `is_node`: Ray runs there already, started by `nanoserve ray start`."""

    name: str
    python: str = ""
    environment: str = ""
    has_rsync: bool = False
    num_cores: int = 0
    num_gpus: int = 0
    free_bytes: int = 0
    ports: frozenset[int] = frozenset()
    is_node: bool = False
    absent: tuple[str, ...] = ()


class ProbeError(Exception):
    """The machine could not be asked; the message says why and what would be right."""


def probe(launch: LaunchFile, name: str, paths: Sequence[str]) -> Machine:
    """Ask the machine `name` of the cluster file; raises `ProbeError`. Workers are reached through the head."""
    if name == launch.head_reached_at:
        _connect(name)
    try:
        done = subprocess.run(
            ssh_command(launch, name, f"bash -s -- {shlex.join(paths)}"),
            input=_SCRIPT.read_text(),
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise ProbeError(f"{name}: ssh did not answer within {PROBE_SECONDS:.0f} s.") from None
    if "probe python=" not in done.stdout:
        raise ProbeError(explain(launch, name, done.stderr))
    return parse(name, done.stdout)


def ssh_command(launch: LaunchFile, name: str, command: str) -> list[str]:
    """`command` on a machine, in the kind of shell that `ray up` uses there."""
    key = [] if launch.ssh_key is None else ["-i", str(launch.ssh_key)]
    options = [word for option in (*_OPTIONS, f"ConnectTimeout={CONNECT_SECONDS:.0f}") for word in ("-o", option)]
    ssh = ["ssh", "-T", *key, *options]
    if name != launch.head_reached_at:
        hop = shlex.join([*ssh, "-W", "%h:%p", f"{launch.ssh_user}@{launch.head_reached_at}"])
        ssh += ["-o", f"ProxyCommand={hop}"]
    shell = f"source ~/.bashrc; {command}"
    return [*ssh, f"{launch.ssh_user}@{name}", f"bash --login -i -c {shlex.quote(shell)}"]


def parse(name: str, output: str) -> Machine:
    """The lines that the script printed; a login shell may have printed others."""
    values: dict[str, list[str]] = {}
    for line in output.splitlines():
        if line.startswith("probe ") and "=" in line:
            key, _, value = line.strip().removeprefix("probe ").partition("=")
            values.setdefault(key, []).append(value)

    def number(key: str) -> int:
        text = values.get(key, ["0"])[0]
        return int(text) if text.isdigit() else 0

    return Machine(
        name=name,
        python=values["python"][0],
        environment=values.get("environment", [""])[0],
        has_rsync="rsync" in values,
        num_cores=number("cores"),
        num_gpus=number("gpus"),
        free_bytes=number("free_kilobytes") << 10,
        ports=frozenset(int(port, 16) for port in values.get("listening", ())),
        is_node="node" in values,
        absent=tuple(values.get("absent", ())),
    )


def explain(launch: LaunchFile, name: str, errors: str) -> str:
    """What ssh's complaint means and what would be right."""
    key, user = launch.ssh_key, launch.ssh_user
    said = errors.strip().splitlines()[-1] if errors.strip() else "no answer"
    if "UNPROTECTED PRIVATE KEY" in errors:
        return f"{name}: ssh refuses the key {key} since others may read it: chmod 600 {key}"
    if "Permission denied" in errors:
        which = f"the key {key}" if key is not None else "any key it has (auth.ssh_private_key names none)"
        return (
            f"{name}: ssh does not let {user} in with {which}. Put its public half into ~{user}/.ssh/authorized_keys "
            f"there (ssh-copy-id -i {key or 'KEY'} {user}@{name}), or correct auth.ssh_user and auth.ssh_private_key; "
            "a key with a passphrase does not do."
        )
    if name != launch.head_reached_at:
        return (
            f"{name}: cannot be reached by ssh from the head {launch.head_reached_at} ({said}). Is provider.worker_ips "
            "right, does sshd run there on port 22, and does a firewall let the head in?"
        )
    return f"{name}: ssh fails: {said}"


def _connect(name: str) -> None:
    """Raise `ProbeError` unless something listens on ssh's port."""
    try:
        socket.create_connection((name, SSH_PORT), timeout=CONNECT_SECONDS).close()
    except ConnectionRefusedError:
        raise ProbeError(
            f"{name}: is there, but nothing listens on port {SSH_PORT}. Install and start an sshd (Debian, Ubuntu: "
            "apt-get install openssh-server); the port must be 22."
        ) from None
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise ProbeError(
            f"{name}: cannot be reached on port {SSH_PORT} ({reason}). Is provider.head_ip right, is the machine on, "
            "and does a firewall let this one in?"
        ) from None
