"""`nanoserve plan`: the pipeline of a layer, searched for a device that need not be here, or from a profile."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm import tqdm

from engine.commands.output_file import JsonFile, PictureFile, check_output_file, write_result, write_text
from engine.errors import ConfigError
from engine.host_cpus import num_usable_cpus
from engine.model_config import ModelConfig
from engine.model_shapes import MODEL_SHAPES, model_shape
from engine.number_format import NumberFormat
from engine.pipeline.devices import CPU, DATA_SHEETS, DeviceSpec, data_sheet
from engine.pipeline.schedule import Mechanism
from engine.pipeline.unit_sharing import SharingName

if TYPE_CHECKING:
    from engine.pipeline.plan import SearchState
    from engine.pipeline.plan_report import PlanReport
    from engine.pipeline.profile import Profile

DEFAULT_DEVICE = "a100-80gb"


def plan(
    checkpoint: Annotated[
        Path | None, typer.Argument(exists=True, file_okay=False, help="A checkpoint folder; only its config is read.")
    ] = None,
    model_config: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"Instead of a checkpoint: {', '.join(MODEL_SHAPES)}.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"{', '.join(DATA_SHEETS)}, or {CPU}: this machine's, measured "
            f"(default: {CPU} for a checkpoint, else {DEFAULT_DEVICE}).",
        ),
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="Devices that share the model (tensor parallel).")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens computed per step.")] = 2048,
    workload: Annotated[
        str, typer.Option(metavar="PROMPT:OUTPUT", help="Tokens of a request, on average.")
    ] = "512:512",
    profile: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Measured costs, as `profile` writes them.")
    ] = None,
    sharing: Annotated[
        SharingName | None,
        typer.Option(help="Speeds with a part of the execution units (default: the profile's, or the paper's)."),
    ] = None,
    gather: Annotated[
        bool,
        typer.Option(
            "--gather", help="Consider gathering before attention's projection, too; the engine reduces after it."
        ),
    ] = False,
    overlap: Annotated[
        Mechanism, typer.Option(help="What lanes overlap by; streams excepted, the profile must have measured it.")
    ] = Mechanism.STREAMS,
    dtype: Annotated[
        NumberFormat | None, typer.Option(help="Number format (default: the profile's, or else the model's).")
    ] = None,
    network: Annotated[
        float | None, typer.Option(min=0.001, help="Gigabytes per second that a device sends (default: what is known).")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to search, at most.")] = 25.0,
    threads: Annotated[int | None, typer.Option(min=1, help=f"CPU threads of a device, for {CPU}.")] = None,
    png: PictureFile = None,
    json_file: JsonFile = None,
    schedule_out: Annotated[
        Path | None, typer.Option(metavar="FILE", callback=check_output_file, help="Write the schedule.")
    ] = None,
) -> None:
    """Search the fastest pipeline of a model, and draw it. Nothing runs: all times are predictions."""
    from engine.pipeline.drawing.picture import check_matplotlib, write_picture
    from engine.pipeline.plan_report import PlanReport
    from engine.pipeline.plan_request import PlanRequest
    from engine.pipeline.profile import Profile

    if png is not None:
        check_matplotlib()
    name, model = _model(checkpoint, model_config)
    measured = None if profile is None else Profile.read(profile)
    device = device or (DEFAULT_DEVICE if checkpoint is None else CPU)
    number_format = dtype or _number_format(model, device, measured)
    num_prompt_tokens, num_output_tokens = _workload(workload)
    model.check_tensor_parallel(devices)
    request = PlanRequest(
        name=name,
        model=model,
        device=_device(device, number_format, devices, threads, network),
        num_devices=devices,
        num_tokens=tokens,
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_output_tokens,
        number_format=number_format,
        profile=measured,
        sharing=sharing,
        considers_gather=gather,
        mechanism=overlap,
    )
    with _SearchBar(seconds) as bar:
        report = PlanReport(request, request.answer(seconds, bar.show))
    if png is not None:
        write_picture(report.timeline, png, report.heading)
    if schedule_out is not None:
        write_text(schedule_out, f"# {report.title}\n# {report.heading}\n{report.plan.schedule}")
    write_result(report.to_json(), "" if json_file == "-" else _summary(report), json_file)


def _model(checkpoint: Path | None, shape: str | None) -> tuple[str, ModelConfig]:
    """The model and what to call it."""
    if checkpoint is not None and shape is None:
        return checkpoint.resolve().name, ModelConfig.from_checkpoint(checkpoint)
    if checkpoint is None and shape is not None:
        return shape, model_shape(shape)
    raise ConfigError(
        f"Give either a checkpoint folder or --model-config with the name of a model shape: {', '.join(MODEL_SHAPES)}."
    )


def _workload(text: str) -> tuple[int, int]:
    """Prompt and output tokens of a request."""
    prompt, _, output = text.partition(":")
    if not (prompt.isdecimal() and output.isdecimal()) or int(prompt) + int(output) == 0:
        raise ConfigError(f"--workload is PROMPT:OUTPUT, tokens of a request such as 512:512, not {text!r}.")
    return int(prompt), int(output)


def _number_format(model: ModelConfig, device: str, profile: "Profile | None") -> NumberFormat:
    """What is planned in unless the user says: as it was profiled, else as it would be served on this device."""
    if profile is not None:
        return profile.number_format
    serves_fp8 = model.fp8 is not None and device != CPU and data_sheet(device).has_fp8
    return NumberFormat.FP8 if serves_fp8 else NumberFormat(model.dtype.value)


def _device(
    name: str, number_format: NumberFormat, count: int, threads: int | None, network: float | None
) -> DeviceSpec:
    """The device with what the user knows of its network; raises `ConfigError` for one without this format."""
    from dataclasses import replace

    bandwidth = None if network is None else network * 1e9
    if number_format is NumberFormat.FP8 and (name == CPU or not data_sheet(name).has_fp8):
        able = ", ".join(sheet.name for sheet in DATA_SHEETS.values() if sheet.has_fp8)
        raise ConfigError(f"device {name} has no FP8 matrix products: use dtype bfloat16, or a device of {able}.")
    if name == CPU:
        from engine.pipeline.measured_cpu import measure_cpu

        return measure_cpu(number_format.dtype, threads or max(1, num_usable_cpus() // count), bandwidth)
    sheet = data_sheet(name)
    return sheet if bandwidth is None else replace(sheet, network_bandwidth=bandwidth)


def _summary(report: "PlanReport") -> str:
    from engine.commands.terminal import in_terminal
    from engine.pipeline.plan_summary import answer_text, operations_text, question_text

    parts = (
        question_text(report),
        operations_text(report),
        str(report.plan.schedule).rstrip(),
        in_terminal(report.timeline),
        answer_text(report),
    )
    return "\n\n".join(parts)


class _SearchBar:
    """How far the search is, on standard error of a terminal."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._bar = tqdm(total=round(seconds, 1), desc="planning", disable=None, bar_format="{desc} |{bar}| {postfix}")

    def __enter__(self) -> "_SearchBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, state: "SearchState") -> None:
        """The best period so far, and how much shorter it could be at most."""
        self._bar.n = round(min(self._seconds, state.elapsed_seconds), 1)
        gap = 1 - state.lower_bound_seconds / state.period_seconds
        self._bar.set_postfix_str(f"{1e3 * state.period_seconds:.4g} ms a layer, gap {100 * gap:.1f} %")
