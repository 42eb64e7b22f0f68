"""Overlap on a real slow link: two tensor-parallel ranks in network namespaces, by rate of the link and size of batch.

    python benchmarks/overlap_network.py [--rates 500,1000] [--tokens 256,512] [--dtype bfloat16] [--json FILE]

Each rank has one CPU thread. For every cell the layer is profiled at this rate, planned for this batch, and the best
plans are run against the sequential schedule, as a starting engine does (`engine.pipeline.selection`). Then whole
steps of the engine (inputs, layers, head, sampling) run turn by turn in each mode, and medians are reported:
`sequential`, `nanobatch` (the best plan's cut without overlap), `overlap` (the best plan, even where it loses), and
`chosen` (what the selection kept). `ideal` is max(computing + the CPU time of the network's threads, network), both
measured in the sequential steps. Needs root, for the namespaces.
"""

import argparse
import json
import logging
import os
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from slow_link import SlowLink
from steady_steps import SteadySteps

from engine.batch_shape import BatchShape
from engine.config import EngineConfig
from engine.local_group import LocalGroup
from engine.model_config import Architecture, DType, ModelConfig
from engine.random_checkpoint import sized_config, write_random_checkpoint

if TYPE_CHECKING:
    from engine.pipeline.schedule import Schedule
    from engine.worker import Worker

CONTEXT = 256
DECODE_SHARE = 0.25
MAX_MODEL_LEN = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One rate and batch; seconds of a step, medians on the slowest rank."""

    megabits: float
    num_tokens: int
    compute_seconds: float
    network_seconds: float
    network_cpu_seconds: float
    sequential_seconds: float
    nanobatch_seconds: float
    overlap_seconds: float
    chosen_seconds: float
    sequential_layers_seconds: float
    predicted_sequential_seconds: float
    plan_layers_seconds: float
    predicted_plan_seconds: float
    schedule: str
    is_chosen: bool

    @property
    def ideal_seconds(self) -> float:
        """Everything overlapped, but for the CPU time that the network takes from computing."""
        return max(self.compute_seconds + self.network_cpu_seconds, self.network_seconds)

    def row(self) -> list[str]:
        """The cell in the table, in milliseconds and ratios."""
        times = (
            self.compute_seconds, self.network_seconds, self.network_cpu_seconds, self.sequential_seconds,
            self.nanobatch_seconds, self.overlap_seconds, self.chosen_seconds, self.ideal_seconds,
        )  # fmt: skip
        return [
            f"{self.megabits:.0f}",
            str(self.num_tokens),
            f"{self.network_seconds / self.compute_seconds:.2f}",
            *(f"{1e3 * seconds:.0f}" for seconds in times),
            f"{self.sequential_seconds / self.overlap_seconds:.2f}",
            f"{self.sequential_seconds / self.chosen_seconds:.2f}",
            f"{100 * self.ideal_seconds / self.overlap_seconds:.0f} %",
            f"{100 * (self.predicted_sequential_seconds / self.sequential_layers_seconds - 1):+.0f} %",
            f"{100 * (self.predicted_plan_seconds / self.plan_layers_seconds - 1):+.0f} %",
            "plan" if self.is_chosen else "sequential",
        ]


HEADINGS = (
    "Mbit/s", "tokens", "net/comp", "compute", "network", "net CPU", "sequential", "nanobatch", "overlap", "chosen",
    "ideal", "overlap x", "chosen x", "of ideal", "pred. seq", "pred. plan", "chosen is",
)  # fmt: skip


def measure(worker: "Worker", megabits: float, num_tokens: int, seconds: float) -> Cell:
    """One cell, on one rank; all ranks return the same but for their own computing times."""
    from engine.pipeline.profile import MeasuredCosts
    from engine.pipeline.profile_grid import QUICK
    from engine.pipeline.selection import Selector
    from engine.pipeline.trial import Trial

    pipeline = worker.runner.pipeline
    selector = Selector(worker.config, pipeline, worker.tensor_parallel)
    costs = MeasuredCosts(selector.profile(QUICK), pipeline.graph)
    trial = Trial(worker.config, pipeline, worker.tensor_parallel)
    num_decodes = round(num_tokens * DECODE_SHARE)
    shape = BatchShape(
        num_decodes=num_decodes,
        num_prefills=num_tokens - num_decodes,
        decode_context=CONTEXT,
        prefill_context=MAX_MODEL_LEN / 4,
    )
    contest = selector.contest(shape, costs, trial, seconds, least_gain=-1.0)
    best = min(contest.tried, key=lambda tried: tried.timing.seconds)
    steps = _steps(worker, shape, pipeline.sequential, best.schedule, seconds)
    chosen = steps["overlap"] if contest.winner else steps["sequential again"]
    return Cell(
        megabits=megabits,
        num_tokens=num_tokens,
        compute_seconds=steps["compute"],
        network_seconds=steps["network"],
        network_cpu_seconds=steps["network cpu"],
        sequential_seconds=steps["sequential"],
        nanobatch_seconds=steps["nanobatch"],
        overlap_seconds=steps["overlap"],
        chosen_seconds=chosen,
        sequential_layers_seconds=contest.sequential.seconds,
        predicted_sequential_seconds=contest.predicted_sequential,
        plan_layers_seconds=best.timing.seconds,
        predicted_plan_seconds=best.predicted_seconds,
        schedule=str(best.schedule),
        is_chosen=contest.winner is not None,
    )


def _steps(
    worker: "Worker", shape: BatchShape, sequential: "Schedule", plan: "Schedule", seconds: float
) -> dict[str, float]:
    """Median seconds of whole steps in every mode, turn by turn; and of the sequential ones their parts."""
    from engine.pipeline.plan_choice import PlanChoice
    from engine.pipeline.rank_agreement import RankAgreement

    runner = worker.runner
    modes = {
        "sequential": (sequential, False),
        "nanobatch": (plan, False),
        "overlap": (plan, True),
        "sequential again": (sequential, False),
    }
    source = SteadySteps(worker.config, int(shape.num_decodes), int(shape.num_prefills), CONTEXT)
    assert worker.config.num_blocks is not None and source.num_blocks <= worker.config.num_blocks
    ranks = RankAgreement(worker.tensor_parallel, runner.device)
    found: dict[str, list[float]] = {name: [] for name in (*modes, "compute", "network", "network cpu")}
    started, num_rounds = time.perf_counter(), -1
    while num_rounds < 4 or ranks.largest([time.perf_counter() - started])[0] < seconds:
        for name, (schedule, overlaps) in modes.items():
            runner.use(PlanChoice(schedule), overlaps=overlaps)
            batch = source.next()
            ranks.meet()
            cpu = time.process_time() - time.thread_time()
            output = runner.launch(batch).wait()
            cpu = time.process_time() - time.thread_time() - cpu
            step_seconds = ranks.largest([output.device_seconds])[0]
            if num_rounds < 0:
                continue
            found[name].append(step_seconds)
            if name.startswith("sequential") and output.times is not None:
                found["compute"].append(output.device_seconds - output.times.exposed_network_seconds)
                found["network"].append(output.times.network_seconds)
                found["network cpu"].append(cpu)
        num_rounds += 1
    return {name: statistics.median(values) for name, values in found.items()}


def prepare(link: SlowLink, rank: int) -> None:
    """Runs first in every rank."""
    link.enter(rank)
    logging.basicConfig(level=logging.WARNING)


def make_config(folder: Path, arguments: argparse.Namespace) -> EngineConfig:
    """A random Llama of the size asked for."""
    model = sized_config(
        Architecture.LLAMA,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        num_layers=arguments.layers,
        num_heads=arguments.hidden_size // 128,
        num_kv_heads=arguments.hidden_size // 256,
        vocab_size=2048,
        dtype=DType(arguments.dtype),
    )
    write_random_checkpoint(folder, model, 0)
    largest = max(arguments.tokens)
    num_rows = round(largest * DECODE_SHARE) + largest // (MAX_MODEL_LEN // 2) + 2
    return EngineConfig(
        model=ModelConfig.from_checkpoint(folder),
        checkpoint=folder,
        dtype=DType(arguments.dtype),
        tensor_parallel=2,
        max_model_len=MAX_MODEL_LEN,
        max_batch_tokens=largest,
        max_sequences=min(num_rows, largest),
        num_blocks=num_rows * (MAX_MODEL_LEN // 16),
        num_threads=1,
        plan_seconds=0,
    )


def main() -> None:
    """Measure every cell and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    numbers = partial(_numbers, int)
    parser.add_argument("--rates", type=numbers, default=[200, 300, 400, 1000], help="of the link, in Mbit/s")
    parser.add_argument("--tokens", type=numbers, default=[128, 512, 1024], help="tokens of a batch")
    parser.add_argument("--dtype", default="bfloat16", choices=[dtype.value for dtype in DType])
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--intermediate-size", type=int, default=5632)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each part of a cell")
    parser.add_argument("--json", type=Path, help="write the cells to this file")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the namespaces are removed
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory() as folder, SlowLink() as link:
        os.environ["NANOSERVE_CACHE_DIR"] = f"{folder}/cache"
        config = make_config(Path(folder), arguments)
        print(" ".join(f"{heading:>10}" for heading in HEADINGS), flush=True)
        link.limit(arguments.rates[0])
        with LocalGroup(config, partial(prepare, link)) as group:
            for megabits in arguments.rates:
                link.limit(megabits)
                for num_tokens in arguments.tokens:
                    cells.append(group.run(measure, megabits, num_tokens, arguments.seconds)[0])
                    print(" ".join(f"{text:>10}" for text in cells[-1].row()), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(cell) for cell in cells], indent=2) + "\n")


def _numbers(kind: type[int], text: str) -> list[int]:
    return [kind(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
