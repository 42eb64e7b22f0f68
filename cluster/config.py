"""`ServingConfig`: one recipe (YAML) or one model directory, plus command-line flags, parsed once and frozen.

Every mistake becomes a `ConfigError` that names the file, the key and what would be right. Settings that come from
the environment are read here. It starts nothing and imports neither Ray nor torch.
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from engine import CompileMode, ConfigError, DeviceKind, EngineConfig, ModelConfig, NumberFormat, PipelineMode

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

RAY_ADDRESS_VARIABLE = "RAY_ADDRESS"

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def parse_bytes(value: object) -> object:
    """Turn "2GiB", "500 MB" or a number into bytes; raises `ValueError` for other text."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{value!r} is not a size; write a number of bytes or for example 2GiB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


ByteSize = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class RoutingConfig(BaseModel):
    """How requests are spread over replicas; see `cluster.routing_policy`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prefix_affinity: bool = True
    expected_output_tokens: Count = 128  # until enough requests have finished to know better


class ObjectivesConfig(BaseModel):
    """What an answer has to keep to count as good, in seconds; by default MLPerf's limits for a Llama 2 70B server."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    time_to_first_token: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    time_per_output_token: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.2


class LogFormat(StrEnum):
    """How processes write a line of their log."""

    TEXT = "text"
    JSON = "json"


class LogsConfig(BaseModel):
    """What ingress, replicas and ranks log, and how. Prompts are logged only where they are asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: LogFormat = LogFormat.TEXT
    prompts: bool = False


def parse_endpoint(value: object) -> object:
    """The URL of a collector of OpenTelemetry, with OTLP's own path unless it has one; raises `ValueError`."""
    if not isinstance(value, str):
        return value
    url = urlsplit(value)
    if url.scheme not in {"http", "https"} or not url.hostname or " " in value or url.port == 0:  # `port` raises, too
        raise ValueError("it must be the URL of a collector, for example http://127.0.0.1:4318")
    return value if url.path.strip("/") else f"{value.rstrip('/')}/v1/traces"


class TracingConfig(BaseModel):
    """Where spans are sent, as OTLP over HTTP, and of how many calls; a caller that traces has decided for its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    endpoint: Annotated[str, BeforeValidator(parse_endpoint)] | None = None
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0


class ServingConfig(BaseModel):
    """A served model. A recipe has exactly these keys; relative model paths start at the recipe's directory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Path
    name: Annotated[str, Field(min_length=1)] | None = None  # what clients call it; the directory's name unless given
    aliases: tuple[str, ...] = ()

    replicas: Count = 1
    ingress_replicas: Count = 1
    tensor_parallel: Count = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: NumberFormat | Literal["auto"] = "auto"  # that of the checkpoint unless given; docs/fp8.md has what fp8 is
    kv_cache_dtype: NumberFormat | Literal["auto"] = "auto"  # fp8 for dtype fp8, else as the activations
    threads: Count | None = None  # CPU threads of one rank; the machine's cores shared out unless given

    max_model_len: Count | None = None  # the model's own limit unless given
    max_batch_tokens: Count = 2048
    max_sequences: Count = 256
    block_size: Count = 64  # tokens of a block of the KV cache
    cache: ByteSize | None = None  # bytes of KV cache per rank; most of a GPU's free memory, 1 GiB on a CPU
    cache_fraction: Annotated[float, Field(gt=0, le=1)] = 0.9  # without `cache`: of the memory that is free for it
    prefix_caching: bool = True
    pipeline: PipelineMode = PipelineMode.OVERLAP  # how a step runs through the layers; see docs/pipeline.md
    plan_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 45.0  # to plan at the first start; 0: never
    compile: CompileMode = CompileMode.AUTO  # the kernels of a CPU, at the first start
    # Between GPUs: execution units of a collective beside other work, and bytes of the largest sum that goes through
    # symmetric memory; measured unless given, 0 for none.
    network_ctas: Count = 8
    symmetric_bytes: Annotated[int, Field(ge=0)] | None = None

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    default_max_tokens: Count = 1024
    max_body: ByteSize = 10_000_000
    routing: RoutingConfig = RoutingConfig()
    objectives: ObjectivesConfig = ObjectivesConfig()  # for metrics and alerts: goodput, answers within objectives
    logs: LogsConfig = LogsConfig()
    tracing: TracingConfig = TracingConfig()

    @classmethod
    def load(cls, source: Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """Read a recipe or take a model directory; `overrides` that are not None win. Raises `ConfigError`.

        An override `logs.format` is the key `format` of the section `logs`.
        """
        given = {key: value for key, value in (overrides or {}).items() if value is not None}
        if source.is_dir():
            return cls.parse(_merged({"model": source.resolve()}, given), where=str(source))
        if source.suffix not in {".yaml", ".yml"}:
            raise ConfigError(f"{source} is neither a model directory nor a recipe (a .yaml file).")
        try:
            recipe = yaml.safe_load(source.read_text())
        except FileNotFoundError:
            raise ConfigError(f"{source} does not exist.") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{source} is not valid YAML: {error}") from None
        if not isinstance(recipe, dict):
            raise ConfigError(f"{source} must be a mapping of keys such as `model: path/to/model`.")
        if isinstance(recipe.get("model"), str):
            recipe["model"] = (source.resolve().parent / Path(recipe["model"]).expanduser()).resolve()
        return cls.parse(_merged(recipe, given), where=str(source))

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> Self:
        """Check `values`; `where` is named in the `ConfigError` of the first thing wrong."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise ConfigError(f"{where}: {_first_problem(error)}") from None

    @property
    def names(self) -> tuple[str, ...]:
        """Every name clients may use, the canonical one first."""
        return (self.name or self.model.name, *self.aliases)

    def resolve_device(self, num_gpus: float) -> DeviceKind:
        """The device the ranks will use on a cluster with `num_gpus` GPUs."""
        if self.device == "auto":
            return DeviceKind.CUDA if num_gpus >= 1 else DeviceKind.CPU
        return DeviceKind(self.device)

    def engine_config(self, device: DeviceKind, num_threads: int | None = None) -> EngineConfig:
        """What one replica runs. Reads the checkpoint's config.json; raises `ConfigError`."""
        if not self.model.is_dir():
            raise ConfigError(f"model: {self.model} is not a directory with a checkpoint.")
        model = ModelConfig.from_checkpoint(self.model)
        return EngineConfig(
            model=model,
            checkpoint=self.model,
            dtype=model.dtype if self.dtype == "auto" else self.dtype.dtype,
            product_format=None if self.dtype == "auto" else self.dtype,
            kv_cache_format=None if self.kv_cache_dtype == "auto" else self.kv_cache_dtype,
            device=device,
            tensor_parallel=self.tensor_parallel,
            max_model_len=self.max_model_len or model.max_position_embeddings,
            max_batch_tokens=self.max_batch_tokens,
            max_sequences=self.max_sequences,
            block_size=self.block_size,
            cache_bytes=self.cache,
            cache_fraction=self.cache_fraction,
            prefix_caching=self.prefix_caching,
            num_threads=self.threads or num_threads,
            pipeline=self.pipeline,
            plan_seconds=self.plan_seconds,
            compile=self.compile,
            network_ctas=self.network_ctas,
            symmetric_bytes=self.symmetric_bytes,
        )


_SECTIONS: dict[str, type[BaseModel]] = {
    "routing": RoutingConfig,
    "objectives": ObjectivesConfig,
    "logs": LogsConfig,
    "tracing": TracingConfig,
}


def ray_address(flag: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The running cluster to join: the flag, else RAY_ADDRESS; None, also for "local", means one of our own."""
    address = flag or environment.get(RAY_ADDRESS_VARIABLE) or None
    return None if address == "local" else address


def _merged(recipe: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(recipe)
    for name, value in overrides.items():
        section, _, key = name.rpartition(".")
        if not section:
            merged[name] = value
        elif isinstance(merged.setdefault(section, {}), dict):  # else it is refused for what it is
            merged[section] = merged[section] | {key: value}
    return merged


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    problem, key = problems[0], _key(problems[0])
    if problem["type"] == "extra_forbidden":
        section = _SECTIONS.get(key.split(".")[0], ServingConfig) if "." in key else ServingConfig
        known = list(section.model_fields)
        close = difflib.get_close_matches(key.rsplit(".")[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(known)}."
        return f"unknown key {key!r}; {hint}"
    if problem["type"] == "missing":
        return f"the key {key!r} is missing."
    message = problem["msg"].removeprefix("Value error, ")
    of_key = [other for other in problems if _key(other) == key]
    if len(of_key) > 1:  # a value of one of several kinds, each of which says what it takes
        message = f"input should be {_choices([other['ctx']['expected'] for other in of_key])}"
    return f"{key}: {message[0].lower()}{message[1:]}, but it is {problem['input']!r}."


def _key(problem: "ErrorDetails") -> str:
    """The recipe's key, without the kinds and functions that pydantic names on the way to what it checked."""
    sections: tuple[type[BaseModel], ...] = (ServingConfig, *_SECTIONS.values())
    is_unknown = problem["type"] == "extra_forbidden"
    parts = (
        part
        for part in problem["loc"]
        if is_unknown or isinstance(part, int) or any(part in section.model_fields for section in sections)
    )
    return ".".join(map(str, parts))


def _choices(expected: Sequence[str]) -> str:
    """Of "'a' or 'b'" and "'c'": 'a', 'b' or 'c'."""
    *others, last = (name for names in expected for name in names.replace(" or ", ", ").split(", "))
    return f"{', '.join(others)} or {last}"
