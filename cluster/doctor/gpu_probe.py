"""Reads a `GpuSystem`: in a process of its own, as a driver that hangs shall not hang anybody else.

By NVML where its Python package (nvidia-ml-py) is there, which alone knows who holds memory and how links are; torch
knows the rest. Only this module's process imports them, and only where there is a driver.
"""

import importlib
import json
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.doctor.gpu_system import Gpu, GpuHolder, GpuSystem
from cluster.doctor.socket_table import command_of

PROBE_SECONDS = 60.0
_DRIVER = Path("/proc/driver/nvidia/version")


def read_gpus() -> GpuSystem:
    """Of this machine."""
    driver = driver_version()
    if driver is None:
        return GpuSystem()
    command = [sys.executable, "-m", "cluster.doctor.gpu_probe"]
    root = Path(__file__).resolve().parents[2]
    try:
        outcome = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
        return parse_gpus(json.loads(outcome.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return GpuSystem(driver=driver, torch_cuda="unknown", problem=f"no answer in {PROBE_SECONDS:.0f} s.")
    except (ValueError, IndexError, OSError):
        lines = outcome.stderr.strip().splitlines() or ["no reason given"]
        return GpuSystem(driver=driver, torch_cuda="unknown", problem=lines[-1])


def driver_version(file: Path = _DRIVER) -> str | None:
    """Of the kernel module, else of what nvidia-smi says; None where there is neither."""
    with suppress(OSError):
        found = re.search(r"Kernel Module\D*(?:for x86_64|for aarch64)?\s+(\d+[\d.]+)", file.read_text())
        return found[1] if found else "unknown"
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.TimeoutExpired):
        outcome = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
        if outcome.returncode == 0 and outcome.stdout.strip():
            return outcome.stdout.split()[0]
    return None


def parse_gpus(value: dict[str, Any]) -> GpuSystem:
    """From what the other process printed."""
    gpus = tuple(
        Gpu(
            **each
            | {
                "capability": tuple(each["capability"]),
                "holders": tuple(GpuHolder(**holder) for holder in each["holders"]),
            }
        )
        for each in value["gpus"]
    )
    return GpuSystem(**value | {"gpus": gpus, "separated": tuple(map(tuple, value["separated"]))})


def probe() -> GpuSystem:
    """By torch, and NVML where it is there."""
    import torch

    driver, cuda = driver_version(), torch.version.cuda
    if cuda is None:
        return GpuSystem(driver=driver)
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        gpus = tuple(_gpu(index) for index in range(torch.cuda.device_count()))
    except RuntimeError as error:
        return GpuSystem(driver=driver, torch_cuda=cuda, problem=str(error).splitlines()[0])
    separated = [
        (one, other)
        for one in range(len(gpus))
        for other in range(one + 1, len(gpus))
        if not torch.cuda.can_device_access_peer(one, other)
    ]
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None  # type: ignore[no-untyped-call]
    return GpuSystem(
        driver=driver,
        torch_cuda=cuda,
        nccl=nccl,
        num_present=_num_present(),
        gpus=gpus,
        separated=tuple(separated),
    )


def _gpu(index: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    known: dict[str, Any] = {}
    with suppress(Exception):  # without NVML, or with one that does not know this
        known = _nvml_facts(str(properties.uuid))
    return Gpu(
        index=index,
        name=properties.name,
        capability=(properties.major, properties.minor),
        total=total,
        free=free,
        **known,
    )


def _nvml_facts(uuid: str) -> dict[str, Any]:
    """What only NVML knows of the device; its numbers go by the bus, not by CUDA_VISIBLE_DEVICES."""
    nvml = _nvml()
    handle = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    holders = [
        GpuHolder(process_id=each.pid, command=command_of(each.pid), num_bytes=each.usedGpuMemory)
        for each in nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    ]
    states = []
    with suppress(nvml.NVMLError):
        for link in range(nvml.NVML_NVLINK_MAX_LINKS):
            states.append(nvml.nvmlDeviceGetNvLinkState(handle, link))
    errors = None
    with suppress(nvml.NVMLError):
        errors = nvml.nvmlDeviceGetTotalEccErrors(
            handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        )
    return {
        "holders": tuple(holders),
        "num_links_up": sum(map(bool, states)),
        "num_links_down": len(states) - sum(map(bool, states)),
        "num_memory_errors": errors,
    }


def _num_present() -> int | None:
    with suppress(Exception):
        return int(_nvml().nvmlDeviceGetCount())
    return None


def _nvml() -> Any:
    nvml = importlib.import_module("pynvml")
    nvml.nvmlInit()
    return nvml


if __name__ == "__main__":
    print(json.dumps(asdict(probe())))
