"""`nanoserve bench serve`: load on any OpenAI-compatible endpoint, and what its users would have seen.

The command only: it reads the options, has a `ServeBenchmark` run, and prints its report.
"""

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.load_test.latency_report import ServiceLevel
from cluster.load_test.load_prompts import vocabulary_size
from cluster.load_test.load_target import Endpoint, LoadTarget, api_url, find_model
from cluster.load_test.serve_benchmark import ServeBenchmark
from engine import ConfigError, LengthRange, WorkloadSource
from engine.cli import (
    InputLength,
    JsonFile,
    LengthDivisor,
    Named,
    NumRequests,
    OutputLength,
    Seed,
    TraceFile,
    write_result,
)


def bench_serve(
    url: Annotated[str, typer.Option(help="Of an OpenAI-compatible server.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Default: the first that the server lists.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True)] = None,
    endpoint: Annotated[Endpoint, typer.Option(help="Completions can have prompts of exact length.")] = (
        Endpoint.COMPLETIONS
    ),
    request_rate: Annotated[
        float | None, typer.Option(help="Open loop: requests per second on average, Poisson arrivals.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Closed loop: this many users, each waiting for its answer.")
    ] = None,
    input_len: InputLength = "512",
    output_len: OutputLength = "128",
    workload: Named = None,
    trace: TraceFile = None,
    time_scale: Annotated[float, typer.Option(help="Multiply a trace's times: 2 is half as fast.")] = 1.0,
    length_divisor: LengthDivisor = 1,
    num_requests: NumRequests = None,
    seed: Seed = 0,
    tokenizer: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Send token ids, of the vocabulary of this model folder."),
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Send token ids below this.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    exact_lengths: Annotated[bool, typer.Option(help="Send ignore_eos and min_tokens.")] = True,
    extra_body: Annotated[str | None, typer.Option(help="More fields for every request: '{\"top_p\": 0.9}'.")] = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds until a request is given up.")] = 600.0,
    slo_ttft_ms: Annotated[float | None, typer.Option(help="Goodput: longest time to the first token.")] = None,
    slo_tpot_ms: Annotated[float | None, typer.Option(help="Goodput: longest mean time per output token.")] = None,
    slo_e2e_ms: Annotated[float | None, typer.Option(help="Goodput: longest time to the end.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Load an OpenAI-compatible endpoint and report throughput, latencies and goodput."""
    if request_rate is not None and concurrency is not None:
        raise ConfigError("Choose one of --request-rate (open loop) and --concurrency (closed loop).")
    planned = WorkloadSource(
        prompt=LengthRange.parse(input_len, "--input-len"),
        output=LengthRange.parse(output_len, "--output-len"),
        name=workload,
        trace=trace,
        num_requests=num_requests,
        length_divisor=length_divisor,
        time_scale=time_scale,
        request_rate=request_rate,
        seed=seed,
    ).load()
    if concurrency is None and not planned.has_arrivals:
        raise ConfigError("Nothing says when requests come: give --request-rate or --concurrency.")
    base = api_url(url)
    target = LoadTarget(
        url=base,
        model=model or asyncio.run(find_model(base, api_key)),
        endpoint=endpoint,
        api_key=api_key,
        temperature=temperature,
        exact_lengths=exact_lengths,
        extra=_json_object(extra_body),
    )
    benchmark = ServeBenchmark(
        target=target,
        workload=planned,
        vocab_size=vocab_size or (vocabulary_size(tokenizer) if tokenizer else None),
        seed=seed,
        concurrency=concurrency,
        timeout=timeout,
        service_level=ServiceLevel(ttft_ms=slo_ttft_ms, tpot_ms=slo_tpot_ms, e2e_ms=slo_e2e_ms),
    )
    report, losses = benchmark.run()
    loop = f"closed loop of {concurrency}" if concurrency else "open loop"
    heading = f"{target.model} at {target.request_url}\n{planned.description}; {loop}\n"
    result = {
        "url": target.request_url,
        "model": target.model,
        "workload": planned.description,
        "loop": loop,
        "seed": seed,
        "loss_waterfall": None if losses is None else losses.to_json(),
    }
    tables = [heading, report.table(), "" if losses is None else f"\n{losses.table()}"]
    write_result(result | report.to_json(), "\n".join(tables).rstrip(), json_file)
    if report.num_ok == 0:
        raise typer.Exit(1)


def _json_object(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ConfigError(f"--extra-body must be a JSON object, but {text!r} is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ConfigError(f"--extra-body must be a JSON object, not {text!r}.")
    return value
