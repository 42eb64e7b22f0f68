"""`GpuSystem`: what is known of this machine's NVIDIA GPUs, and what to think of it; `gpu_probe` reads it."""

from collections.abc import Iterator
from dataclasses import dataclass

from cluster.doctor.finding import Finding, error, ok, warning

CHECK = "gpu"
# The oldest driver of Linux for each major version of CUDA (CUDA's release notes, table of toolkit drivers).
_OLDEST_DRIVER = {"11": (450, 80), "12": (525, 60), "13": (580, 65)}
_OLDEST_CAPABILITY = (8, 0)  # bfloat16 in tensor cores
_FULL_SHARE = 0.10  # with less than this free no model fits
_TAKEN_SHARE = 0.90  # the KV cache takes nine tenths of what is free


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuHolder:
    """A process with memory on a GPU; `num_bytes` is None where the driver does not tell, as in containers."""

    process_id: int
    command: str
    num_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One device. Links are NVLinks; what is None is unknown, for want of NVML."""

    index: int
    name: str
    capability: tuple[int, int]
    total: int
    free: int
    holders: tuple[GpuHolder, ...] = ()
    num_links_up: int | None = None
    num_links_down: int | None = None
    num_memory_errors: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSystem:
    """All devices that torch sees, of `num_present`.

    `driver` None: there is none; `torch_cuda` None: torch is a build for CPUs. `separated` are pairs of devices that
    cannot read each other's memory.
    """

    driver: str | None = None
    torch_cuda: str | None = None
    nccl: str | None = None
    problem: str = ""
    num_present: int | None = None
    gpus: tuple[Gpu, ...] = ()
    separated: tuple[tuple[int, int], ...] = ()


def judge_gpus(system: GpuSystem, *, num_wanted: int | None) -> list[Finding]:
    """`num_wanted`: GPUs that a replica takes; 0 where it shall run on a CPU, None where nobody said."""
    if num_wanted == 0:
        return [ok(CHECK, "Not needed: the model runs on a CPU.", "device: cpu")]
    if system.driver is None:
        if not num_wanted:
            return [ok(CHECK, "There is no NVIDIA driver: models run on the CPU.", "/proc/driver/nvidia")]
        remedy = "Install NVIDIA's driver (in a container: `docker run --gpus all`), or serve with --device cpu."
        return [error(CHECK, "GPUs are wanted, but there is no NVIDIA driver.", "/proc/driver/nvidia", remedy)]
    findings = [*_software(system, num_wanted or 1)]
    for gpu in system.gpus:
        findings += _device(gpu)
    findings += _connections(system)
    if findings:
        return findings
    names = ", ".join(f"{gpu.name} ({gpu.free / 2**30:.0f} GiB free)" for gpu in system.gpus)
    return [
        ok(CHECK, f"{names}; driver {system.driver}, CUDA {system.torch_cuda}, NCCL {system.nccl}.", "this machine")
    ]


def _software(system: GpuSystem, num_wanted: int) -> Iterator[Finding]:
    where = f"driver {system.driver}"
    if system.torch_cuda is None:
        remedy = (
            "Remove .venv and run `make install` again: where nvidia-smi answers, it installs the CUDA build of torch."
        )
        yield error(CHECK, "There is a GPU, but torch is a build for CPUs.", "torch.version.cuda", remedy)
        return
    oldest = _OLDEST_DRIVER.get(system.torch_cuda.partition(".")[0])
    if oldest is not None and _numbers(system.driver or "") < oldest:
        found = f"The driver is too old for torch's CUDA {system.torch_cuda}."
        needed = ".".join(map(str, oldest))
        yield error(CHECK, found, where, f"Install driver {needed} or later, or a torch built for an older CUDA.")
    elif system.problem:
        remedy = (
            "See what `nvidia-smi` says; after an update of the driver restart the machine (or reload its modules)."
        )
        yield error(CHECK, f"CUDA cannot be used: {system.problem}", where, remedy)
    if len(system.gpus) < num_wanted:
        hidden = "" if system.num_present is None else f" of {system.num_present}"
        found = f"A replica takes {num_wanted} GPUs; this process sees {len(system.gpus)}{hidden}."
        yield error(CHECK, found, "CUDA_VISIBLE_DEVICES", "Show it more of them, or lower `tensor_parallel:`.")
    if system.nccl is None and num_wanted > 1:
        remedy = "Install a torch for Linux from its own index, which brings NCCL."
        yield error("nccl", "torch has no NCCL, which ranks on GPUs talk by.", "torch.cuda.nccl", remedy)


def _device(gpu: Gpu) -> Iterator[Finding]:
    where = f"GPU {gpu.index}, {gpu.name}"
    if gpu.capability < _OLDEST_CAPABILITY:
        found = f"Its compute capability is {gpu.capability[0]}.{gpu.capability[1]}; bfloat16 needs 8.0."
        yield warning(CHECK, found, where, "Serve with --dtype float16, or on a newer GPU.")
    share = gpu.free / gpu.total
    if share < _TAKEN_SHARE:
        free = f"Only {gpu.free / 2**30:.1f} of {gpu.total / 2**30:.1f} GiB are free"
        holders = ", ".join(map(_holder, gpu.holders)) or "processes that cannot be seen from here"
        ids = " ".join(str(holder.process_id) for holder in gpu.holders)
        remedy = (f"Stop them (`kill {ids}`)" if ids else "Look from the host (`nvidia-smi`)") + (
            ", or choose other GPUs with CUDA_VISIBLE_DEVICES."
        )
        level = error if share < _FULL_SHARE else warning
        yield level(CHECK, f"{free}: {holders} hold the rest.", where, remedy)
    if gpu.num_memory_errors:
        remedy = "Move work elsewhere and reset the GPU when it is idle; have it replaced if errors come again."
        yield warning(CHECK, f"{gpu.num_memory_errors} memory errors that could not be corrected.", where, remedy)
    if gpu.num_links_down and gpu.num_links_up is not None:
        found = f"{gpu.num_links_down} of its {gpu.num_links_up + gpu.num_links_down} NVLinks are down."
        remedy = "Restart nvidia-fabricmanager (machines with NVSwitch); see `nvidia-smi nvlink --status`."
        yield warning("nvlink", found, where, remedy)


def _connections(system: GpuSystem) -> Iterator[Finding]:
    if system.separated:
        pairs = ", ".join(f"{one}-{other}" for one, other in system.separated[:8])
        remedy = (
            "Turn off ACS and the IOMMU (or set it to pass-through), see `nvidia-smi topo -p2p r`; "
            "until then collectives go through host memory: check /dev/shm."
        )
        yield warning("nvlink", f"GPUs cannot read each other's memory: {pairs}.", "peer to peer", remedy)


def _holder(holder: GpuHolder) -> str:
    size = "" if holder.num_bytes is None else f", {holder.num_bytes / 2**30:.1f} GiB"
    return f"process {holder.process_id} ({holder.command[:60]}{size})"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
