"""This project's server beside others that serve on a CPU: the same random Llama, the same requests; prints a table.

    python benchmarks/serving_peers.py --install                          # what is missing, once
    python benchmarks/serving_peers.py [--workload 32x128/128] [--dtype bfloat16] [--engines vllm-compiled] [--json]

Workloads, environments, checkpoint and rounds are those of benchmarks/peers.py. The client is that of `nanoserve bench
serve`: prompts of token ids, as many users as requests, greedy, exact lengths, streamed. Every server lives through all
rounds and is stopped by a signal, with everything it started, while it is not its turn. In each round every engine also
runs the same requests offline, in a process of its own: "served" is the rate over HTTP divided by that offline rate, as
the median over the rounds, and "no client" the same with the client's processor time taken out (how, says
peer_engines/serving_result.py). "client", "idle" and "others" are cores: those that the client used, that nobody used,
and that other programs kept busy in the most disturbed round.
"""

import json
import sys
from dataclasses import replace

from peer_engines import nanoserve_engine
from peer_engines.contest import Contest
from peer_engines.peer_result import PeerResult
from peer_engines.peer_workload import parse_workload
from peer_engines.serving_contest import ServingContest
from peer_engines.serving_peer import SERVING_PEERS, ServingPeer
from peer_engines.serving_table import format_serving_table
from peers import parse_arguments, prepare

from cluster.load_test.serve_benchmark import PROBE_OUTPUT_TOKENS, PROBE_PROMPT_TOKENS
from engine.errors import NanoserveError
from engine.model_config import DType
from engine.workloads.workload import Workload

REFERENCE, *OTHERS = SERVING_PEERS


def main() -> None:
    """Print the table, or with --json the same as one JSON object."""
    options = parse_arguments(__doc__)
    try:
        workload = parse_workload(options.workload)
        servers = choose(options.engines)
        environments = options.environments.expanduser().resolve()
        setup = prepare(environments / "models", DType(options.dtype), workload, options.threads)
        setup = replace(setup, max_model_len=max(setup.max_model_len, PROBE_PROMPT_TOKENS + PROBE_OUTPUT_TOKENS))
    except NanoserveError as error:
        sys.exit(f"error: {error}")
    vocab_size = nanoserve_engine.engine_config(setup).model.vocab_size
    offline = Contest([server.peer for server in servers], environments, setup)
    contest = ServingContest(servers, environments, setup, vocab_size)
    with offline.loaded(install=options.install), contest.started(install=options.install):
        for number in range(options.rounds + 1):
            offline.run_round(number, workload, vocab_size)
            contest.run_round(number, workload)
    reference = contest.results[REFERENCE.name]
    rows = [
        contest.results[server.name].row(reference, alone.version, offline_rates(alone, workload))
        for server in servers
        for alone in (offline.results[server.name],)
    ]
    summary = {
        "workload": options.workload,
        "num_prompt_tokens": workload.num_prompt_tokens,
        "num_output_tokens": workload.num_output_tokens,
        "dtype": options.dtype,
        "num_threads": options.threads,
        "rounds": options.rounds,
        "rows": rows,
    }
    print(json.dumps(summary, indent=2) if options.json else format_serving_table(summary))


def choose(names: str | None) -> list[ServingPeer]:
    """This project's server, then those of these engines, or all."""
    if names is None:
        return [REFERENCE, *OTHERS]
    wanted = {name.strip() for name in names.split(",")} - {REFERENCE.name}
    known = [server.name for server in OTHERS]
    if unknown := wanted.difference(known):
        raise NanoserveError(f"There is no server of {', '.join(sorted(unknown))}; there are {', '.join(known)}.")
    return [REFERENCE, *(server for server in OTHERS if server.name in wanted)]


def offline_rates(result: PeerResult, workload: Workload) -> list[float]:
    """Output tokens per second by round; none where the engine failed."""
    return [] if result.problem is not None else [workload.num_output_tokens / seconds for seconds in result.seconds]


if __name__ == "__main__":
    main()
