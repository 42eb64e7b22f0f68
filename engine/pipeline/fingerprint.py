"""The fingerprint: everything that a measured cost or a measured plan depends on, as a mapping of short texts.

Equal fingerprints mean that a profile or a plan may be used again; what differs is said in words (`differences`).
All ranks of a group work with one fingerprint, in which a fact that differs between ranks lists every value.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from engine.config import DeviceKind, EngineConfig
from engine.model_config import ModelConfig
from engine.tensor_parallel import TensorParallel

Fingerprint = Mapping[str, str]

_SIOCGIFADDR = 0x8915
# To be raised whenever costs are measured, or the engine computes, in another way that changes how long things take.
_MEASURING = 2


def fingerprint_of(config: EngineConfig, layer: str, tensor_parallel: TensorParallel) -> Fingerprint:
    """Of the layer with graph signature `layer` in this group; all ranks must call it together and get the same."""
    facts = {
        **_device_facts(config),
        "nanoserve": f"{_version('nanoserve', 'source')}, measuring {_MEASURING}",
        "torch": torch.__version__,
        "dtype": _number_text(config),
        "model": _model_text(config.model),
        "layer": layer,
        "tensor parallel": str(config.tensor_parallel),
        "network": _network_text(config),
        "dense batch": str(config.max_batch_tokens),
        "most sequences": str(config.max_sequences),
        "longest sequence": str(config.max_model_len),
        "block size": str(config.block_size),
    }
    if tensor_parallel.size == 1:
        return facts
    of_ranks: list[dict[str, str]] = [{} for _ in range(tensor_parallel.size)]
    dist.all_gather_object(of_ranks, facts, group=tensor_parallel.group)
    return {key: " | ".join(sorted({of_rank.get(key, "none") for of_rank in of_ranks})) for key in facts}


def fingerprint_hash(fingerprint: Fingerprint) -> str:
    """Twelve hexadecimal digits; the order of the facts does not matter."""
    return hashlib.sha256(json.dumps(dict(fingerprint), sort_keys=True).encode()).hexdigest()[:12]


def differences(old: Fingerprint, new: Fingerprint) -> tuple[str, ...]:
    """What changed, for people: "torch 2.12.0 -> 2.13.0"."""
    return tuple(
        f"{key} {old.get(key, 'unknown')} -> {new.get(key, 'unknown')}"
        for key in dict.fromkeys((*old, *new))
        if old.get(key) != new.get(key)
    )


def _device_facts(config: EngineConfig) -> dict[str, str]:
    if config.device is DeviceKind.CUDA:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "device": f"{properties.name}, {properties.multi_processor_count} SMs",
            "driver": _nvidia_driver(Path("/proc/driver/nvidia/version")),
            "cuda": torch.version.cuda or "none",
            "triton": _version("triton"),
        }
    return {
        "device": f"{_cpu_model(Path('/proc/cpuinfo'))}, {os.cpu_count()} CPUs",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(config.threads_per_rank),
        "compile": config.compile.value,
    }


def _number_text(config: EngineConfig) -> str:
    """The format of the products; that of the cache only where it is another."""
    products, cache = config.number_format, config.cache_format
    return products.value if cache is products else f"{products.value}, KV cache {cache.value}"


def _cpu_model(cpuinfo: Path) -> str:
    """The processor's name as its maker gives it; the architecture's where /proc does not say."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine() or "unknown"


def _nvidia_driver(version: Path) -> str:
    """The kernel module's version from its first line, "NVRM version: NVIDIA ... Kernel Module  570.86.15  ..."."""
    try:
        words = version.read_text(encoding="utf-8", errors="replace").splitlines()[0].split()
    except (OSError, IndexError):
        return "unknown"
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")


def _version(package: str, otherwise: str = "none") -> str:
    """The version installed; `otherwise` where the package is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return otherwise


def _model_text(model: ModelConfig) -> str:
    """The sizes that decide what a layer costs and how much of a step the layers are."""
    parts = [
        f"{model.num_layers} layers of {model.hidden_size}",
        f"heads {model.num_heads}/{model.num_kv_heads} of {model.head_dim}",
        f"feed-forward {model.intermediate_size}",
        f"vocabulary {model.vocab_size}",
    ]
    if model.num_experts:
        parts.append(f"experts {model.num_experts_per_token}/{model.num_experts} of {model.moe_intermediate_size}")
    windows = sorted({str(window) for window in model.sliding_windows})
    if windows:
        parts.append(f"windows {' '.join(windows)}")
    return f"{model.architecture}, {', '.join(parts)}"


def _network_text(config: EngineConfig) -> str:
    if config.tensor_parallel == 1:
        return "none"
    if config.device is DeviceKind.CUDA:
        version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        symmetric = "as measured" if config.symmetric_bytes is None else f"{config.symmetric_bytes} bytes"
        return f"nccl {version}, {config.network_ctas} units beside others, symmetric memory {symmetric}"
    interface = os.environ.get("GLOO_SOCKET_IFNAME") or _own_interface()
    speed = _link_speed(Path("/sys/class/net") / interface / "speed")
    return ", ".join(part for part in (f"gloo over {interface}", speed, _shaping(interface)) if part)


def _own_interface() -> str:
    """The interface that has the address of this host's name, which is what gloo listens on unless told otherwise."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "127.0.0.1"
    is_loopback = address.startswith("127.")  # any address of that block, which is one interface's
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # an interface without an address
            found = socket.inet_ntoa(answer[20:24])
            if found == address or (is_loopback and found.startswith("127.")):
                return name
    return "unknown"


def _link_speed(file: Path) -> str:
    """The rate that the interface reports; nothing for one that has none, such as loopback."""
    try:
        speed = int(file.read_text())
    except (OSError, ValueError):
        return ""
    return f"{speed} Mbit/s" if speed > 0 else ""


def _shaping(interface: str) -> str:
    """A rate limit put on the interface (tc's tbf, htb and the like), which its link speed does not show."""
    tc = shutil.which("tc")
    if tc is None:
        return ""
    try:
        shown = subprocess.run(
            [tc, "qdisc", "show", "dev", interface], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    words = shown.stdout.split()
    # "qdisc tbf 8001: root refcnt 2 rate 1Gbit burst 256Kb lat 50ms": the handle is the kernel's and may change.
    return f"limited by {words[1]} to {words[words.index('rate') + 1]}" if "rate" in words[:-1] else ""
