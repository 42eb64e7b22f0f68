"""The model: its config.json, weights, tokenizer, and whether it fits this machine's memory, before anything starts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.config import ServingConfig
from cluster.doctor.finding import Finding, error, ok, warning
from cluster.tokenizer import Tokenizer
from engine import ConfigError, DeviceKind, check_checkpoint, check_cpu, check_host_memory

CHECK = "checkpoint"
_POINTER = b"version https://git-lfs"
_FETCHED_ANEW = "Copy or download that file again, and compare its size and checksum with the source's."


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFiles:
    """What is wrong with each part; empty where nothing is. `pointers` are files that Git LFS has not fetched yet."""

    path: Path
    config: str = ""
    weights: str = ""
    tokenizer: str = ""
    memory: str = ""
    pointers: tuple[str, ...] = ()
    has_chat_template: bool = True


def read_checkpoint(config: ServingConfig, device: DeviceKind, *, in_memory: bool = True) -> CheckpointFiles:
    """Headers alone are read of weights. With `in_memory`, a CPU's ranks are to fit the memory of this machine."""
    path = config.model
    pointers = tuple(sorted(file.name for file in path.glob("*.safetensors") if _is_pointer(file)))
    try:
        engine_config = config.engine_config(device)
        check_cpu(engine_config)
    except ConfigError as problem:
        return CheckpointFiles(path=path, config=str(problem), pointers=pointers)
    template: list[bool] = []
    tokenizer = _problem(lambda: template.append(Tokenizer.load(path).has_chat_template))
    return CheckpointFiles(
        path=path,
        weights=_problem(lambda: check_checkpoint(engine_config)),
        tokenizer=tokenizer,
        memory=_problem(lambda: check_host_memory(engine_config, config.replicas)) if in_memory else "",
        pointers=pointers,
        has_chat_template=all(template),
    )


def judge_checkpoint(files: CheckpointFiles) -> list[Finding]:
    """An error for each part that is wrong."""
    where = str(files.path)
    findings = []
    if files.pointers:
        found = f"{', '.join(files.pointers)}: a pointer of Git LFS, not the weights."
        findings.append(error(CHECK, found, where, f"Fetch them: `git -C {where} lfs pull`."))
    if files.config:
        remedy = "Correct the recipe or the options; config.json itself must be the one that came with the weights."
        findings.append(error(CHECK, files.config, where, remedy))
    if files.weights and not files.pointers:
        findings.append(error(CHECK, files.weights, where, _remedy_of_weights(files.weights)))
    if files.tokenizer:
        remedy = "Copy tokenizer.json and tokenizer_config.json of the same model beside config.json."
        findings.append(error(CHECK, files.tokenizer, where, remedy))
    if files.memory:
        remedy = "Free memory, or use fewer replicas, a smaller `cache:` or `max_model_len:`, or a smaller model."
        findings.append(error("memory", files.memory, where, remedy))
    if not files.has_chat_template:
        remedy = "Serve completions only, or put the model's chat_template.jinja beside config.json."
        findings.append(warning(CHECK, "There is no chat template: chat completions will be refused.", where, remedy))
    if not findings:
        findings.append(ok(CHECK, "config.json, weights and tokenizer belong together.", where))
    return findings


def _remedy_of_weights(problem: str) -> str:
    if "does not match its config.json" in problem:
        return "Take config.json and the .safetensors files from one and the same checkpoint."
    if "cannot be read" in problem or "holds neither" in problem or "is not a folder" in problem:
        return "Put all .safetensors files that the checkpoint has into this folder, readable for this user."
    return _FETCHED_ANEW


def _problem(check: Callable[[], object]) -> str:
    try:
        check()
    except ConfigError as problem:
        return str(problem)
    return ""


def _is_pointer(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(len(_POINTER)) == _POINTER
    except OSError:
        return False
