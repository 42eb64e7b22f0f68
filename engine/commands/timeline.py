"""`nanoserve timeline`: one step of a model, recorded on all ranks of a group on this machine, and drawn."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.commands.output_file import JsonFile, PictureFile, check_output_file, write_result
from engine.config import DeviceKind, EngineConfig, PipelineMode
from engine.errors import ConfigError
from engine.model_config import ModelConfig
from engine.number_format import NumberFormat
from engine.pipeline.schedule import Schedule, ScheduleError

if TYPE_CHECKING:
    from engine.batch_shape import BatchShape
    from engine.step_recording import StepRecording

BLOCK_SIZE = 64


def timeline(
    model: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A checkpoint folder.")],
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Ranks, each a process of this machine.")] = 1,
    mode: Annotated[PipelineMode, typer.Option(help="How the step runs.")] = PipelineMode.OVERLAP,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the step.")] = 512,
    decode_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Part of them that are decodes.")] = 0.5,
    context: Annotated[int, typer.Option(min=1, help="Tokens that each of them attends to, on average.")] = 128,
    schedule: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A schedule file (default: the plan stored for this setup)."),
    ] = None,
    max_batch_tokens: Annotated[
        int, typer.Option(min=1, help="Of the engine whose choice it is: the largest batch.")
    ] = 2048,
    repetitions: Annotated[int, typer.Option(min=1, help="Of which the one of median length is shown.")] = 9,
    dtype: Annotated[NumberFormat | None, typer.Option(help="Number format (default: the checkpoint's).")] = None,
    device: Annotated[DeviceKind, typer.Option()] = DeviceKind.CPU,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of a rank (default: its share).")] = None,
    perfetto: Annotated[
        Path | None,
        typer.Option(metavar="FILE", callback=check_output_file, help="Write a trace for https://ui.perfetto.dev."),
    ] = None,
    png: PictureFile = None,
    json_file: JsonFile = None,
) -> None:
    """Record one step of a model on this machine: what ran when, on which lane of which rank.

    The step is made up, of random keys, values and lengths; all that it computes and sends is real.
    """
    from engine.batch_shape import BatchShape
    from engine.commands.terminal import show_progress
    from engine.local_group import LocalGroup
    from engine.pipeline.drawing.perfetto import write_trace
    from engine.pipeline.drawing.picture import check_matplotlib, write_picture
    from engine.step_recording import StepRecording

    if png is not None:
        check_matplotlib()
    given = None if schedule is None else _read(schedule)
    num_decodes = round(tokens * decode_share)
    shape = BatchShape(
        num_decodes=num_decodes,
        num_prefills=tokens - num_decodes,
        decode_context=context,
        prefill_context=context,
    )
    model_config, max_model_len = _model(model, context)
    of_engine = given is None and mode is not PipelineMode.SEQUENTIAL
    # Ranks on GPUs that overlap have a way to exchange something beside other work, and a given schedule wants it.
    overlaps_gpus = device is DeviceKind.CUDA and tensor_parallel > 1 and mode is PipelineMode.OVERLAP
    config = EngineConfig(
        model=model_config,
        checkpoint=model,
        dtype=model_config.dtype if dtype is None else dtype.dtype,
        product_format=dtype,
        device=device,
        tensor_parallel=tensor_parallel,
        max_batch_tokens=max(tokens, max_batch_tokens) if of_engine else tokens,
        max_model_len=max_model_len,
        max_sequences=max(1, num_decodes),
        block_size=BLOCK_SIZE,
        num_blocks=-(-max_model_len // BLOCK_SIZE),  # for one sequence: the step brings a cache of its own
        num_threads=threads,
        pipeline=PipelineMode.OVERLAP if of_engine or overlaps_gpus else PipelineMode.SEQUENTIAL,
        plan_seconds=0,  # a plan stored from here would be a server's
    )
    show_progress(f"starting {tensor_parallel} {'ranks' if tensor_parallel > 1 else 'rank'} ...")
    with LocalGroup(config) as group:
        show_progress(f"recording {repetitions} steps ...")
        recording = StepRecording.of(group, shape, given, mode, repetitions)
    ranks = f"{tensor_parallel} ranks on {device}" if tensor_parallel > 1 else f"1 rank on {device}"
    title = f"{model.resolve().name}, {ranks}, {tokens:,} tokens ({num_decodes:,} decodes), {mode}"
    recording = recording.titled(title)
    if perfetto is not None:
        write_trace(recording.timeline, perfetto)
    if png is not None:
        write_picture(recording.timeline, png, recording.heading)
    write_result(_json(recording, shape, config, mode), "" if json_file == "-" else _summary(recording), json_file)


def _model(checkpoint: Path, context: int) -> tuple[ModelConfig, int]:
    """The model, and the longest sequence to allow for."""
    model = ModelConfig.from_checkpoint(checkpoint)
    max_model_len = min(model.max_position_embeddings, max(2048, 2 * context))
    if context > max_model_len / 2:
        raise ConfigError(f"--context {context} is too long: at most half of the model's {max_model_len} positions.")
    return model, max_model_len


def _read(path: Path) -> Schedule:
    try:
        return Schedule.parse(path.read_text(encoding="utf-8"))
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error


def _json(recording: "StepRecording", shape: "BatchShape", config: EngineConfig, mode: PipelineMode) -> dict[str, Any]:
    """The figures; the events are in the trace for Perfetto."""
    timeline = recording.timeline
    return {
        "model": config.checkpoint.resolve().name,
        "device": config.device.value,
        "tensor_parallel": config.tensor_parallel,
        "num_threads": config.threads_per_rank,
        "dtype": config.number_format.value,
        "num_decodes": int(shape.num_decodes),
        "num_prefills": int(shape.num_prefills),
        "mode": mode.value,
        "plan": recording.plan_name,
        "why_sequential": recording.why_sequential or None,
        "schedule": str(recording.schedule),
        "seconds": timeline.seconds,
        "sequential_seconds": recording.sequential_seconds,
        "speedup": recording.speedup,
        "num_events": len(timeline.events),
        "busy_seconds": [
            {lane.value: timeline.busy_seconds(lane, rank) for lane in timeline.lanes}
            for rank in range(config.tensor_parallel)
        ],
    }


def _summary(recording: "StepRecording") -> str:
    from engine.commands.terminal import in_terminal

    timeline = recording.timeline
    ranks = sorted({event.rank for event in timeline.events})
    busy = [
        f"{f'rank {rank} busy':<20}"
        + ", ".join(
            f"{lane} {100 * timeline.busy_seconds(lane, rank) / timeline.seconds:.0f} %" for lane in timeline.lanes
        )
        for rank in ranks
    ]
    why = f": {recording.why_sequential}" if recording.why_sequential else ""
    lines = (
        f"{'recorded':<20}{timeline.title}",
        f"{'schedule':<20}{recording.plan_name}{why}",
        str(recording.schedule),
        in_terminal(timeline),
        "",
        recording.heading,
        *busy,
    )
    return "\n".join(lines)
