"""What HTTP costs, from the socket to the engine and back, with the real server; prints tables.

    python benchmarks/http_overhead.py [--model FOLDER] [--parts saturation,idle,streams] [--rounds 3] [--json]

saturation: `--requests` at once, IN/OUT tokens, over HTTP and in `nanoserve bench offline`, interleaved, medians of
    ratios within a round; processor microseconds per token by process. `http_path/saturation.py` says how the
    client's own processor time is taken out.
idle: one request at a time, through every way there is, and where the time to its first token goes, part by part.
    "engine's own" is from the request's arrival in the engine's queue to the engine handing out its first token.
streams: 256 at once, `--rounds` times; the longest gap of any stream beyond the engine's own between steps, and the
    parts of a step. The tokenizer has text for every token here, so that every token can be seen to arrive.

Ways: "HAProxy" is what `nanoserve serve` listens on, "ingress" the port of its HTTP process behind HAProxy, "proxy"
Ray Serve's own proxy in Python in the place of HAProxy (a server of its own). `--rank-variables LD_PRELOAD=...` sets
variables of all processes of server and engine, `--serve-variables` replaces what `cluster.ray_environment` sets.
Without --model the 8x512 Llama of `peers.py` is served.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from http_path.audible_checkpoint import audible_checkpoint
from http_path.http_load import HttpLoad, LoadResult
from http_path.overhead_tables import format_tables
from http_path.saturation import measure_saturation
from http_path.server_process import ServerOptions, ServerProcess
from http_path.stage_times import (
    SETTLE_SECONDS,
    first_token_stages,
    longest_stall,
    overhead,
    read_marks,
    request_passes,
    step_stages,
)
from peer_engines.random_llama import random_llama

from engine.errors import NanoserveError
from engine.model_config import DType, ModelConfig
from engine.user_cache import cache_directory

PARTS = ("saturation", "idle", "streams")
SERVE_PROXY = {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}


def main() -> None:
    """Print the tables, or with --json the same as one JSON object."""
    options = parse_arguments()
    try:
        summary = measure(options)
    except NanoserveError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(summary, indent=2) if options.json else format_tables(summary))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--shape", default="128/128", help="tokens in and out of a request at saturation")
    parser.add_argument("--requests", type=int, default=64, help="at once, at saturation")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--idle-requests", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of the rank, and of the engine alone")
    parser.add_argument("--cache", default="512MiB", help="KV cache of the server")
    parser.add_argument("--rank-variables", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--serve-variables", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--rank-niceness", type=int, help="of the ranks, set from outside once the server is ready")
    parser.add_argument("--with-proxy", action="store_true", help="idle: also Ray Serve's own proxy")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.parts.split(",")) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if min(options.rounds, options.requests, options.streams, options.idle_requests, options.threads) < 1:
        parser.error("counts must be at least 1")
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every part that was asked for."""
    parts = set(options.parts.split(","))
    checkpoint = options.model or random_llama(cache_directory() / "peers" / "models", DType.BFLOAT16)
    vocab_size = ModelConfig.from_checkpoint(checkpoint).vocab_size
    num_prompt_tokens, num_output_tokens = (int(text) for text in options.shape.split("/"))
    load = HttpLoad(
        num_requests=options.requests,
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_output_tokens,
        vocab_size=vocab_size,
    )
    served = ServerOptions(
        checkpoint=checkpoint,
        num_threads=options.threads,
        cache=options.cache,
        max_model_len=max(256, num_prompt_tokens + num_output_tokens),
        rank_variables=dict(text.split("=", 1) for text in options.rank_variables),
        serve_variables=dict(text.split("=", 1) for text in options.serve_variables),
        rank_niceness=options.rank_niceness,
    )
    summary: dict[str, Any] = {
        "model": str(checkpoint),
        "shape": options.shape,
        "num_requests": options.requests,
        "num_threads": options.threads,
        "rank_variables": dict(served.rank_variables),
        "serve_variables": dict(served.serve_variables),
        "rank_niceness": served.rank_niceness,
    }
    if "saturation" in parts:
        with ServerProcess.started(served) as server:
            ways = {"HAProxy": server.url, "ingress": server.ingress_url()}
            summary["saturation"] = measure_saturation(server, ways, served, load, options.rounds)
    if parts & {"idle", "streams"}:
        summary |= measure_stages(options, parts, served, vocab_size)
    return summary


def measure_stages(
    options: argparse.Namespace, parts: set[str], served: ServerOptions, vocab_size: int
) -> dict[str, Any]:
    """The parts that need the stage clock, on servers that have it."""
    idle = HttpLoad(
        num_requests=options.idle_requests,
        num_prompt_tokens=32,
        num_output_tokens=8,
        vocab_size=vocab_size,
        gap_seconds=0.15,
    )
    summary: dict[str, Any] = {}
    with clocked(served) as (server, clock):
        ways = {"HAProxy": server.url, "ingress": server.ingress_url()}
        if "idle" in parts:
            summary["idle"] = [idle_row(server, clock, way, url, idle) for way, url in ways.items()]
        if "streams" in parts:
            streams = replace(
                idle,
                num_requests=options.streams,
                num_prompt_tokens=min(64, idle.num_prompt_tokens),
                num_output_tokens=64,
                gap_seconds=None,
            )
            streams.run(server, server.url, seed=3)  # warms up
            rounds = [streams.run(server, server.url, seed=4 + number) for number in range(options.rounds)]
            summary["streams"] = streams_row(clock, streams, rounds)
    if "idle" in parts and options.with_proxy:
        with clocked(replace(served, serve_variables=SERVE_PROXY)) as (server, clock):
            summary["idle"].append(idle_row(server, clock, "proxy", server.url, idle))
    return summary


@contextlib.contextmanager
def clocked(served: ServerOptions) -> Any:
    """A server with the stage clock, and the folder of its marks."""
    with tempfile.TemporaryDirectory(prefix="http-path-") as name:
        clock, checkpoint = Path(name), Path(name) / "checkpoint"
        checkpoint.mkdir()
        audible = audible_checkpoint(checkpoint, served.checkpoint)
        with ServerProcess.started(replace(served, checkpoint=audible, clock=clock)) as server:
            yield server, clock


def idle_row(server: ServerProcess, clock: Path, way: str, url: str, load: HttpLoad) -> dict[str, Any]:
    """The time to the first token through one way, by its parts, and processor time of a request."""
    replace(load, num_requests=min(10, load.num_requests)).run(server, url, seed=1)  # warms up
    result = load.run(server, url, seed=2)
    time.sleep(SETTLE_SECONDS)
    passes = request_passes(read_marks(clock), result)
    own, beyond = overhead(passes)
    return {
        "way": way,
        "num_requests": len(passes),
        "engine": own.to_json(),
        "beyond_engine": beyond.to_json(),
        "stages": [stage.to_json() for stage in first_token_stages(passes)],
        "processor_milliseconds_per_request": processor_milliseconds(result, len(result.outcomes)),
    }


def streams_row(clock: Path, load: HttpLoad, rounds: Sequence[LoadResult]) -> dict[str, Any]:
    """The longest stall of many streams in each round, and the parts of the last round's steps."""
    time.sleep(SETTLE_SECONDS)
    marks = read_marks(clock)
    stalls = [longest_stall(marks, result) for result in rounds]
    return {
        "num_streams": load.num_requests,
        "num_output_tokens": load.num_output_tokens,
        "longest_gap_ms": [1000 * longest for longest, _, _ in stalls],
        "longest_engine_gap_ms": [1000 * own for _, own, _ in stalls],
        "longest_stall_ms": [1000 * stall for _, _, stall in stalls],
        "stages": [stage.to_json() for stage in step_stages(marks, rounds[-1])],
    }


def processor_milliseconds(result: LoadResult, count: int) -> Mapping[str, float]:
    """Processor time by role, for each of `count`; "Ray, idle parts" also runs without requests."""
    return {role: 1000 * seconds / count for role, seconds in {**result.used.by_role, "client": result.client}.items()}


if __name__ == "__main__":
    main()
