"""`Checkup`: which checks apply to what was asked, in order. One that fails itself is a finding, and stops no other."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.config import ServingConfig
from cluster.doctor.checkpoint_files import judge_checkpoint, read_checkpoint
from cluster.doctor.compiler import judge_compiler, read_compiler
from cluster.doctor.disk_space import judge_disks, read_disks
from cluster.doctor.finding import Finding, Level, error, warning
from cluster.doctor.gpu_probe import driver_version, read_gpus
from cluster.doctor.gpu_system import judge_gpus
from cluster.doctor.leftovers import judge_leftovers, read_leftovers
from cluster.doctor.open_files import judge_open_file_limit, read_open_file_limit
from cluster.doctor.ports import RAY_PORTS, WantedPort, judge_ports, read_ports
from cluster.doctor.ray_cluster import (
    judge_authentication,
    judge_cluster,
    ray_to_join,
    read_authentication,
    read_cluster,
)
from cluster.doctor.server_health import judge_server, read_server
from cluster.doctor.shared_memory import DEFAULT_PATH, judge_shared_memory, read_shared_memory
from cluster.doctor.versions import judge_versions, read_versions
from cluster.ray_node import running_node
from cluster.state_directory import ray_directory, session_place
from engine import CompileMode, ConfigError, DeviceKind, cache_directory

EXIT_STATUS = {Level.OK: 0, Level.WARNING: 1, Level.ERROR: 2}

Check = Callable[[], Finding | Sequence[Finding]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkup:
    """`model` is a recipe or a checkpoint's directory, `address` a Ray cluster to join (else that of this
    machine, where `ray up` has started one), `url` a running server."""

    model: Path | None = None
    address: str | None = None
    url: str | None = None
    host: str | None = None
    port: int | None = None
    device: str | None = None
    shared_memory: Path = DEFAULT_PATH

    def findings(self) -> Iterator[Finding]:
        """As they come: some checks take seconds."""
        config: ServingConfig | None = None
        problem: Finding | None = None
        if self.model is not None:
            try:
                given = {"host": self.host, "port": self.port, "device": self.device}
                config = ServingConfig.load(self.model, given)
            except ConfigError as refusal:
                remedy = "Correct it; `deploy/models/demo.yaml` has the keys of a recipe."
                problem = error("recipe", str(refusal), str(self.model), remedy)
        for name, check in self._checks(config):
            found = run_check(name, check)
            yield from found
        if problem is not None:
            yield problem

    def _checks(self, config: ServingConfig | None) -> Iterator[tuple[str, Check]]:
        device = self._device(config)
        is_here = self.address is None  # else ranks run on other machines, whose memory and GPUs are others
        num_gpus = _num_gpus(config, device) if is_here else None
        address, variables = ray_to_join(self.address, running_node())
        places = [
            ("Sessions and logs of nanoserve serve", session_place()),
            ("Ray's other sessions and logs", ray_directory()),
            ("Plans and kernels", cache_directory()),
        ]
        yield "versions", lambda: judge_versions(read_versions())
        yield "gpu", lambda: judge_gpus(read_gpus(), num_wanted=num_gpus)
        yield "open files", lambda: judge_open_file_limit(read_open_file_limit())
        yield "shared memory", lambda: judge_shared_memory(read_shared_memory(self.shared_memory))
        yield "disk", lambda: judge_disks(read_disks(places))
        yield "compiler", lambda: judge_compiler(read_compiler(), is_wanted=_compiles(config, device))
        yield "ports", lambda: judge_ports(read_ports([self._wanted_port(config), *RAY_PORTS]))
        yield "leftovers", lambda: judge_leftovers(read_leftovers())
        yield "ray cluster", lambda: judge_authentication(read_authentication(variables))
        if config is not None:
            yield "checkpoint", lambda: judge_checkpoint(read_checkpoint(config, device, in_memory=is_here))
        if address is not None:
            is_on_gpus = config is not None and config.device == "cuda"
            wanted = config.replicas * config.tensor_parallel if config is not None and is_on_gpus else 0
            yield "ray cluster", lambda: judge_cluster(read_cluster(address, variables), wanted)
        if self.url is not None:
            url = self.url
            yield "server", lambda: judge_server(read_server(url))

    def _device(self, config: ServingConfig | None) -> DeviceKind:
        asked = self.device if config is None else config.device
        if asked in ("cpu", "cuda"):
            return DeviceKind(asked)
        return DeviceKind.CPU if driver_version() is None else DeviceKind.CUDA

    def _wanted_port(self, config: ServingConfig | None) -> WantedPort:
        host = self.host or (config.host if config is not None else "127.0.0.1")
        port = self.port or (config.port if config is not None else 8000)
        return WantedPort(port=port, host=host, purpose="the API", is_needed=True)


def run_check(name: str, check: Check) -> Sequence[Finding]:
    """Its findings; what it raises is one."""
    try:
        found = check()
    except Exception as problem:
        return [
            warning(
                name,
                f"It could not be checked: {type(problem).__name__}: {problem}",
                "nanoserve doctor",
                "Look at it by hand, and report this: the doctor should know.",
            )
        ]
    return [found] if isinstance(found, Finding) else found


def exit_status(findings: Sequence[Finding]) -> int:
    """0: nothing to do; 1: warnings; 2: errors."""
    return max((EXIT_STATUS[finding.level] for finding in findings), default=0)


def _num_gpus(config: ServingConfig | None, device: DeviceKind) -> int | None:
    if config is None:
        return None
    return 0 if device is DeviceKind.CPU else config.tensor_parallel


def _compiles(config: ServingConfig | None, device: DeviceKind) -> bool:
    return device is DeviceKind.CPU and (config is None or config.compile is not CompileMode.NEVER)
