"""This engine beside the other engines that run on a CPU: the same random Llama, the same requests; prints a table.

    python benchmarks/peers.py --install                              # what is missing, once: takes some 20 minutes
    python benchmarks/peers.py [--workload 32x128/128] [--dtype bfloat16] [--engines vllm-compiled,openvino] [--json]

Workloads are N x IN/OUT tokens, or N x NAME/DIVISOR for the lengths of a service; the usual ones are 32x128/128,
64xazure-conversation/8, 8x1024/32 and 1x128/128. Every engine has its own environment with pinned versions, and a
process that lives through all rounds and is stopped while it is not its turn. Rounds are interleaved; each sends new
prompts, all requests at once, greedy, ignoring end of sequence, and the first warms up and does not count. "ratio" is
the median of an engine's rate divided by nanoserve's in the same round; "% of optimum" counts tokens in and out against
the GEMM peak that torch reached in this run. "same" are the requests that got the tokens that nanoserve generated, and
"prefix" the tokens before the first difference, on average; "others" are the cores that other programs kept busy in
the most disturbed round: above a few hundredths figures mean little, since engines whose threads spin for each other
lose many times more than their share.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Final

from peer_engines import (
    llama_cpp_engine,
    nanoserve_engine,
    openvino_engine,
    transformers_engine,
    vllm_engine,
)
from peer_engines.contest import Contest
from peer_engines.peer import Peer
from peer_engines.peer_engine import EngineSetup
from peer_engines.peer_workload import parse_workload
from peer_engines.random_llama import random_llama
from peer_engines.result_table import format_table

from engine.errors import NanoserveError
from engine.gemm_peak import measure_gemm_peak
from engine.model_config import DType
from engine.optimum import optimal_tokens_per_second
from engine.user_cache import cache_directory
from engine.workloads.workload import Workload

REFERENCE, *OTHERS = (
    *nanoserve_engine.PEERS,
    *openvino_engine.PEERS,
    *vllm_engine.PEERS,
    *transformers_engine.PEERS,
    *llama_cpp_engine.PEERS,
)
MAX_SEQUENCES: Final = 256  # running at once, in every engine


def main() -> None:
    """Print the table, or with --json the same as one JSON object."""
    options = parse_arguments(__doc__)
    try:
        workload = parse_workload(options.workload)
        peers = choose(options.engines)
        environments = options.environments.expanduser().resolve()
        setup = prepare(environments / "models", DType(options.dtype), workload, options.threads)
    except NanoserveError as error:
        sys.exit(f"error: {error}")
    config = nanoserve_engine.engine_config(setup)
    contest = Contest(peers, environments, setup)
    with contest.loaded(install=options.install):
        peaks = []
        for number in range(options.rounds + 1):
            contest.run_round(number, workload, config.model.vocab_size)
            peaks.append(measure_gemm_peak(config).flops_per_second)
    peak = max(peaks)  # so that a disturbed moment cannot flatter the engines
    optimum = optimal_tokens_per_second(peak, config.model)
    counts = {"num_prompt_tokens": workload.num_prompt_tokens, "num_output_tokens": workload.num_output_tokens}
    reference = contest.results[REFERENCE.name]
    rows = [result.row(reference, **counts, optimum=optimum) for result in contest.results.values()]
    summary = {
        "workload": options.workload,
        **counts,
        "dtype": options.dtype,
        "num_threads": options.threads,
        "rounds": options.rounds,
        "gemm_peak_flops_per_second": peak,
        "optimal_tokens_per_second": optimum,
        "rows": rows,
    }
    print(json.dumps(summary, indent=2) if options.json else format_table(summary))


def parse_arguments(description: str | None) -> argparse.Namespace:
    """The command line, of this comparison and of that over HTTP."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="32x128/128")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--engines", help="separated by commas, nanoserve always being one; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of every engine")
    parser.add_argument("--install", action="store_true", help="make the environments that are missing")
    parser.add_argument("--environments", type=Path, default=cache_directory() / "peers")
    parser.add_argument("--json", action="store_true", help="print JSON only; progress goes to standard error anyway")
    options = parser.parse_args()
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    return options


def choose(names: str | None) -> list[Peer]:
    """The reference, then the peers of these names, or all."""
    if names is None:
        return [REFERENCE, *OTHERS]
    wanted = {name.strip() for name in names.split(",")} - {REFERENCE.name}
    known = [peer.name for peer in OTHERS]
    if unknown := wanted.difference(known):
        raise NanoserveError(f"There is no engine {', '.join(sorted(unknown))}; there are {', '.join(known)}.")
    return [REFERENCE, *(peer for peer in OTHERS if peer.name in wanted)]


def prepare(folder: Path, dtype: DType, workload: Workload, num_threads: int) -> EngineSetup:
    """Write the checkpoint where it is not there yet; it and what peers convert it to are kept for the next run."""
    checkpoint = random_llama(folder, dtype)
    return EngineSetup(
        checkpoint=checkpoint,
        converted=checkpoint.parent,
        dtype=dtype.value,
        num_threads=num_threads,
        cache_tokens=sum(item.num_prompt_tokens + item.num_output_tokens + 32 for item in workload.requests) + 1024,
        max_model_len=workload.longest,
        max_sequences=min(MAX_SEQUENCES, len(workload.requests)),
        options={},
    )


if __name__ == "__main__":
    main()
