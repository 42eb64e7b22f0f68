"""`nanoserve ray check`: everything about a cluster file that can be known to fail, in seconds, before `ray up`.

The judgement is pure: `problems` takes what the machines are like. `check` looks at them.
"""

import contextlib
import io
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from cluster.config import ServingConfig
from cluster.fixed_port import PORTS_OF_EVERY_NODE, PORTS_OF_HEAD
from cluster.launch_file import LOCAL, LaunchFile
from cluster.machine_probe import Machine, ProbeError, probe
from cluster.placement import NodeResources, plan_placement
from engine import CapacityError, ConfigError, DeviceKind

ENVIRONMENT_BYTES = 10 << 30  # of Python packages with CUDA's libraries


def check(path: Path) -> tuple[list[Machine], list[str]]:
    """The machines that could be asked, and what is wrong; raises `ConfigError` where the file itself is."""
    launch = LaunchFile.load(path)
    check_schema(path)
    config = recipe(launch)
    here = local_problems(launch, path)
    if here or launch.provider != LOCAL:
        return [], here
    wanted = [] if config is None else [checkpoint_there(launch, config)]
    machines, found = [], []

    def ask(name: str) -> Machine | str:
        try:
            return probe(launch, name, [path for path in wanted if path])
        except ProbeError as error:
            return str(error)

    first = ask(launch.head_reached_at)
    answers = [first]
    if isinstance(first, Machine):  # else no worker can be reached either
        with ThreadPoolExecutor(16) as pool:
            answers += pool.map(ask, launch.worker_ips)
    for answer in answers:
        if isinstance(answer, Machine):
            machines.append(answer)
        else:
            found.append(answer)
    return machines, found + problems(launch, machines, config)


def problems(launch: LaunchFile, machines: Sequence[Machine], config: ServingConfig | None) -> list[str]:
    """What is wrong with machines that could be asked, one sentence each, with what would be right."""
    found = [problem for machine in machines for problem in _machine_problems(launch, machine, config)]
    if config is not None and len(machines) == len(launch.machines):
        nodes = [NodeResources(machine.name, machine.num_cores, machine.num_gpus) for machine in machines]
        try:
            plan_placement(
                nodes,
                device=config.resolve_device(sum(node.num_gpus for node in nodes)),
                tensor_parallel=config.tensor_parallel,
                num_replicas=config.replicas,
                num_ingress=config.ingress_replicas,
            )
        except CapacityError as error:
            driver = " (`nvidia-smi -L` shows what a machine has)" if config.device == DeviceKind.CUDA.value else ""
            found.append(f"{launch.recipe}: {error}{driver}")
    return found


def _machine_problems(launch: LaunchFile, machine: Machine, config: ServingConfig | None) -> list[str]:
    found = []
    if not machine.python:
        found.append(
            "has no Python 3.11 or later with its venv module. Debian, Ubuntu: apt-get install python3 python3-venv; "
            "or name an interpreter in its ~/.bashrc: export PYTHON=/path/to/python3"
        )
    if not machine.has_rsync:
        found.append("has no rsync, by which the code is copied there. Debian, Ubuntu: apt-get install rsync")
    if not machine.environment and not machine.is_node and machine.free_bytes < ENVIRONMENT_BYTES:
        found.append(
            f"has {machine.free_bytes / 2**30:.1f} GiB free in the home directory; the environment takes up to 10."
        )
    for path in machine.absent:
        found.append(f"does not have {path}, which {launch.recipe} names as the model: copy or mount it there.")
    if not machine.is_node:
        is_head = machine.name == launch.head_reached_at
        wanted = PORTS_OF_EVERY_NODE + (PORTS_OF_HEAD if is_head else ())
        ports = {port.number: port.purpose for port in wanted}
        if config is not None:
            ports[config.port] = "the API's"
        for port in sorted(machine.ports & ports.keys()):
            found.append(
                f"port {port} ({ports[port]}) is taken: stop what listens there "
                f"(`ss -ltnp 'sport = :{port}'` shows it; `ray stop` if it is an earlier Ray cluster)"
                + (f", or change `port` in {launch.recipe}." if ports[port] == "the API's" else ".")
            )
    return [f"{machine.name}: {problem}" for problem in found]


def local_problems(launch: LaunchFile, path: Path) -> list[str]:
    """What is wrong on the machine that `ray up` is to be run on."""
    found = [
        f"this machine has no {program}. Debian, Ubuntu: apt-get install openssh-client rsync"
        for program in ("ssh", "rsync")
        if shutil.which(program) is None
    ]
    for source in (yaml.safe_load(path.read_text()).get("file_mounts") or {}).values():
        if not Path(str(source)).expanduser().exists():
            found.append(
                f"file_mounts: {source} is not in {Path.cwd()}: run this, and `ray up`, at the project's root."
            )
    key = launch.ssh_key
    if launch.provider == LOCAL and key is not None:
        if not key.is_file():
            found.append(
                f"auth.ssh_private_key: {key} does not exist. Make one (ssh-keygen -t ed25519 -N '' -f {key}) and let "
                "it in on every machine (ssh-copy-id), or name another."
            )
        elif subprocess.run(["ssh-keygen", "-y", "-P", "", "-f", str(key)], capture_output=True).returncode:
            found.append(f"auth.ssh_private_key: {key} is no private key that ssh can use without a passphrase.")
    return found


def recipe(launch: LaunchFile) -> ServingConfig | None:
    """The recipe that will be deployed, from this machine's copy; None where the file deploys none."""
    if not launch.recipe:
        return None
    path = Path(launch.recipe)
    if path.is_absolute() or launch.recipe.startswith("~"):
        return ServingConfig.load(path.expanduser()) if path.expanduser().exists() else None
    return ServingConfig.load(path)


def checkpoint_there(launch: LaunchFile, config: ServingConfig) -> str:
    """The checkpoint's file that every machine must have, or "" for one that is copied with the code."""
    if config.model.resolve().is_relative_to(Path.cwd()):
        return ""
    return str(config.model / "config.json")


def check_schema(path: Path) -> None:
    """Raise `ConfigError` for what Ray itself would refuse, in one sentence."""
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    values: dict[str, Any] = yaml.safe_load(path.read_text())
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # its own remarks
            validate_config(prepare_config(values))
    except jsonschema.ValidationError as error:
        where = ".".join(map(str, error.absolute_path)) or "top level"
        raise ConfigError(f"{path}: {where}: {error.message}") from None
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise ConfigError(f"{path}: {error}") from None
