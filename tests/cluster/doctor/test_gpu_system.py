"""GPUs, by readings made up here: every fault is found with what to do, a whole machine gives one line."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.doctor import gpu_probe
from cluster.doctor.finding import Finding, Level
from cluster.doctor.gpu_probe import driver_version, parse_gpus, read_gpus
from cluster.doctor.gpu_system import Gpu, GpuHolder, GpuSystem, judge_gpus

GIB = 1 << 30
H200 = Gpu(
    index=0,
    name="NVIDIA H200",
    capability=(9, 0),
    total=140 * GIB,
    free=139 * GIB,
    num_links_up=18,
    num_links_down=0,
    num_memory_errors=0,
)
WHOLE = GpuSystem(
    driver="580.95.05",
    torch_cuda="13.0",
    nccl="2.27.7",
    num_present=2,
    gpus=(H200, replace(H200, index=1)),
)
HOLDER = GpuHolder(process_id=4711, command="python train.py", num_bytes=100 * GIB)


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_a_whole_machine_is_one_line() -> None:
    finding = only(judge_gpus(WHOLE, num_wanted=2))
    assert finding.level is Level.OK
    assert "NVIDIA H200 (139 GiB free), NVIDIA H200 (139 GiB free); driver 580.95.05" in finding.found


@pytest.mark.parametrize("num_wanted", [None, 0])
def test_a_machine_without_a_gpu_is_whole_unless_one_is_wanted(num_wanted: int | None) -> None:
    assert only(judge_gpus(GpuSystem(), num_wanted=num_wanted)).level is Level.OK
    finding = only(judge_gpus(GpuSystem(), num_wanted=1))
    assert finding.level is Level.ERROR and "--gpus all" in finding.remedy


@pytest.mark.parametrize(
    ("system", "level", "found", "remedy"),
    [
        (GpuSystem(driver="580.95.05"), Level.ERROR, "torch is a build for CPUs", "make install"),
        (replace(WHOLE, driver="550.54.14"), Level.ERROR, "too old for torch's CUDA 13.0", "580.65 or later"),
        (replace(WHOLE, problem="CUDA error 803"), Level.ERROR, "CUDA error 803", "restart the machine"),
        (replace(WHOLE, gpus=(H200,)), Level.ERROR, "takes 2 GPUs; this process sees 1 of 2", "tensor_parallel"),
        (replace(WHOLE, nccl=None), Level.ERROR, "no NCCL", "brings NCCL"),
        (replace(WHOLE, separated=((0, 1),)), Level.WARNING, "each other's memory: 0-1", "IOMMU"),
        (
            replace(WHOLE, gpus=(H200, replace(H200, free=39 * GIB, holders=(HOLDER,)))),
            Level.WARNING,
            "Only 39.0 of 140.0 GiB are free: process 4711 (python train.py, 100.0 GiB)",
            "kill 4711",
        ),
        (
            replace(WHOLE, gpus=(H200, replace(H200, free=GIB))),
            Level.ERROR,
            "cannot be seen from here hold the rest",
            "from the host",
        ),
        (
            replace(WHOLE, gpus=(H200, replace(H200, num_links_up=16, num_links_down=2))),
            Level.WARNING,
            "2 of its 18 NVLinks are down",
            "nvidia-fabricmanager",
        ),
        (replace(WHOLE, gpus=(H200, replace(H200, num_memory_errors=3))), Level.WARNING, "3 memory errors", "replaced"),
        (replace(WHOLE, gpus=(H200, replace(H200, capability=(7, 0)))), Level.WARNING, "is 7.0", "float16"),
    ],
)
def test_a_fault_is_found_with_what_to_do(system: GpuSystem, level: Level, found: str, remedy: str) -> None:
    finding = only(judge_gpus(system, num_wanted=2))
    assert finding.level is level
    assert found in finding.found
    assert remedy in finding.remedy


def test_what_the_probe_prints_is_read_back() -> None:
    held = replace(WHOLE, gpus=(replace(H200, holders=(HOLDER,)),), separated=((0, 1),))
    assert parse_gpus(json.loads(json.dumps(asdict(held)))) == held


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\n", "550.54.14"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC version: 12\n",
            "580.95.05",
        ),
    ],
)
def test_the_drivers_version(tmp_path: Path, text: str, version: str) -> None:
    (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version") == version


def test_a_probe_that_fails_or_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_probe, "driver_version", lambda: "580.95.05")

    def fail(*_: Any, **__: Any) -> Any:
        return subprocess.CompletedProcess([], 1, "", "Traceback\nImportError: libcudart.so.13")

    monkeypatch.setattr(subprocess, "run", fail)
    assert read_gpus().problem == "ImportError: libcudart.so.13"

    def hang(*_: Any, **__: Any) -> Any:
        raise subprocess.TimeoutExpired("probe", 60)

    monkeypatch.setattr(subprocess, "run", hang)
    found = [finding.found for finding in judge_gpus(read_gpus(), num_wanted=1)]
    assert "CUDA cannot be used: no answer in 60 s." in found


def test_nvml_is_asked_by_the_devices_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class NVMLError(Exception):
        pass

    def state(handle: str, link: int) -> int:
        if link >= 4:
            raise NVMLError
        return link < 3

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_NVLINK_MAX_LINKS=18,
        NVML_MEMORY_ERROR_TYPE_UNCORRECTED=1,
        NVML_VOLATILE_ECC=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 8,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid),
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [SimpleNamespace(pid=1, usedGpuMemory=None)],
        nvmlDeviceGetNvLinkState=state,
        nvmlDeviceGetTotalEccErrors=lambda handle, kind, counter: 2,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    facts = gpu_probe._nvml_facts("0a1b")
    assert asked == ["GPU-0a1b"]
    assert (facts["num_links_up"], facts["num_links_down"], facts["num_memory_errors"]) == (3, 1, 2)
    assert [holder.process_id for holder in facts["holders"]] == [1]
    assert gpu_probe._num_present() == 8
