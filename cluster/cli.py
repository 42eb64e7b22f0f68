"""The `nanoserve` command. Commands parse options, call one object, and print; the rest is elsewhere."""

import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.config import ServingConfig, ray_address
from cluster.deploy import deploy
from cluster.doctor.doctor_command import doctor
from cluster.generate import generate
from cluster.load_test.bench_serve import bench_serve
from cluster.ray_commands import app as ray_app
from cluster.start_display import StartDisplay
from cluster.status.status_command import status
from cluster.tokenizer import Tokenizer
from cluster.tracing import check_tracing
from engine import ConfigError, DeviceKind, NanoserveError, check_checkpoint, check_cpu, check_host_memory
from engine.cli import app as engine_app
from engine.cli import bench

if TYPE_CHECKING:
    from cluster.serving import Server

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Serve large language models on Ray.",
)

bench.command("serve")(bench_serve)
app.add_typer(engine_app)
app.command("generate")(generate)
app.command("deploy")(deploy)
app.add_typer(ray_app, name="ray")
app.command("status")(status)
app.command("doctor")(doctor)

EXIT_FAILED = 1
EXIT_CONFIG = 2
# Options whose keys in a recipe lie in a section.
_KEYS = {"log_format": "logs.format", "otlp_traces_endpoint": "tracing.endpoint"}


@app.callback()
def nanoserve() -> None:
    """Serve large language models on Ray."""


class _Interrupted(BaseException):
    """SIGINT or SIGTERM arrived; raised in the main thread, wherever it is."""


class _Interruption:
    """Remembers the first signal. An exception that a handler raises may come out of a library as another one."""

    def __init__(self) -> None:
        self.number: int | None = None

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        raise _Interrupted


@app.command()
def serve(
    model: Annotated[Path, typer.Argument(help="A checkpoint's directory, or a recipe (.yaml).")],
    name: Annotated[str | None, typer.Option(help="What clients call the model.")] = None,
    tensor_parallel: Annotated[int | None, typer.Option(help="Ranks (GPUs) of one replica.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Copies of the model.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on (default: 127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on (default: 8000).")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, float16, float32 or fp8.")] = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(help="Of keys and values: auto (as dtype), fp8, ...")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt plus answer, in tokens.")] = None,
    max_batch_tokens: Annotated[int | None, typer.Option(help="Tokens computed per step.")] = None,
    max_sequences: Annotated[int | None, typer.Option(help="Requests running at once, per replica.")] = None,
    cache: Annotated[str | None, typer.Option(help="KV cache of one rank, for example 2GiB.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of one rank.")] = None,
    pipeline: Annotated[str | None, typer.Option(help="overlap (default), nanobatch or sequential.")] = None,
    plan_seconds: Annotated[
        float | None,
        typer.Option(help="Plan for so long at a start without stored plans (default: 45; 0: use stored plans only)."),
    ] = None,
    compile: Annotated[
        str | None, typer.Option(help="Compile kernels for a CPU at the first start: auto (default), always or never.")
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="Of the cluster's processes: text (default) or json.")] = None,
    otlp_traces_endpoint: Annotated[
        str | None, typer.Option(help="Send traces to this OpenTelemetry collector, for example http://127.0.0.1:4318.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster to join (default: RAY_ADDRESS, else start one).")
    ] = None,
) -> None:
    """Serve a model over OpenAI's API until interrupted."""
    overrides = {_KEYS.get(key, key): value for key, value in locals().items() if key not in {"model", "address"}}
    display = StartDisplay()
    try:
        config = ServingConfig.load(model, overrides)
        _check(config, ray_address(address))
    except ConfigError as error:
        display.fail(error)
        raise typer.Exit(EXIT_CONFIG) from None
    raise typer.Exit(_serve(config, ray_address(address), display))


def _check(config: ServingConfig, address: str | None) -> None:
    """Refuse what cannot work before anything is started. Memory is checked where the ranks will surely be here."""
    engine_config = config.engine_config(DeviceKind.CUDA if config.device == "cuda" else DeviceKind.CPU)
    check_checkpoint(engine_config)
    check_tracing(config.tracing)
    Tokenizer.load(config.model)
    has_gpu = config.device == "auto" and shutil.which("nvidia-smi") is not None
    if config.device == "cpu" or (address is None and not has_gpu):
        check_cpu(engine_config)
    if address is None and not has_gpu:
        check_host_memory(engine_config, config.replicas)


def _serve(config: ServingConfig, address: str | None, display: StartDisplay) -> int:
    """Run to the end; the exit status."""
    from cluster.serving import Server

    interruption = _Interruption()
    interruption.listen()
    server = Server(config, address, display)
    try:
        return _run(server, config, display, interruption)
    finally:
        display.stop()
        interruption.listen()
        try:
            server.close()
        except _Interrupted:
            server.close()


def _run(server: "Server", config: ServingConfig, display: StartDisplay, interruption: _Interruption) -> int:
    is_ready = False
    try:
        server.start()
        is_ready = True
        display.ready(config, server.url)
        while True:
            signal.pause()
    except BaseException as error:
        display.stop()
        if isinstance(error, SystemExit):  # Ray's own handler of SIGTERM, while it starts
            interruption.number = signal.SIGTERM
        if interruption.number is not None:
            display.say("Stopping (once more to stop at once).")
            return 0 if is_ready else 128 + interruption.number
        if not isinstance(error, NanoserveError):
            raise
        display.fail(error)
        return EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED


def main() -> Any:
    """The console script; what the project raises on purpose becomes one line on standard error."""
    try:
        sys.exit(app())
    except NanoserveError as error:
        StartDisplay().fail(error)
        sys.exit(EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED)


if __name__ == "__main__":
    main()
