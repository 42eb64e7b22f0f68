"""What a step costs beside the model: scheduling, transport, input preparation, drawing, outputs; prints a table.

    python benchmarks/step_overhead.py [--sequences 32,256,1024,2048] [--ranks 1,2,4] [--steps 200] [--json]

First by themselves, over traffic with ShareGPT's lengths in which a request comes as one ends. "scheduling" composes a
step, frees what ended and queues what came; "tokens back" appends the drawn tokens and registers full blocks as
prefixes; "inputs", "drawing" and "output" are a rank's work around the layers, with a vocabulary of 64. "transport" is
a decode step's way to rank processes and back.

Then together: the engine serves an ingress over rank processes, and a device that only takes its time does the model's
work in 20 ms. "unhidden" is how long that device waits between steps, as mean and share of a step. "own thread" is the
same where ranks compute in the thread that prepares a step, as on a CPU: there nothing of a rank's own work is hidden.
How late a sleep ends is taken out of both. Figures are milliseconds, p50 / p99; those compared with a limit are means,
of transport medians.
"""

import argparse
import asyncio
import json
import os
from typing import Any

from step_parts.measurement import Row, measure_overlap, measure_parts
from step_parts.rank_group import RankGroup
from step_parts.setting import Setting


def main() -> None:
    """Print the tables, or with --json the same as one JSON object."""
    options = parse_arguments()
    summary: dict[str, Any] = {"step_ms": options.step_ms, "steps": options.steps, "cores": os.cpu_count()}
    summary["parts"] = [measure_parts(number, options.steps, options.warm_up) for number in options.sequences]
    summary["overlap"] = []
    for num_ranks in options.ranks:
        group = RankGroup(Setting(max(options.sequences), num_ranks))
        try:
            summary["overlap"] += asyncio.run(overlap_rows(group, num_ranks, options))
        finally:
            group.stop()
    print(json.dumps(summary, indent=2) if options.json else format_tables(summary))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=numbers, default=[32, 256, 1024, 2048], help="running at once")
    parser.add_argument("--ranks", type=numbers, default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=200, help="timed, per figure")
    parser.add_argument("--warm-up", type=int, default=700, help="steps before them, in which the sequences get going")
    parser.add_argument("--step-ms", type=float, default=20.0, help="what the model takes")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    options = parser.parse_args()
    if min(options.steps, options.warm_up, *options.sequences, *options.ranks) < 1 or options.step_ms <= 0:
        parser.error("every number must be at least 1, and --step-ms positive")
    return options


def numbers(text: str) -> list[int]:
    """Read "32,256"."""
    return [int(part) for part in text.split(",")]


async def overlap_rows(group: RankGroup, num_ranks: int, options: argparse.Namespace) -> list[Row]:
    """The rows of one group of ranks; they keep their processes."""
    return [
        await measure_overlap(
            Setting(number, num_ranks),
            group,
            num_steps=options.steps,
            num_warm_up=options.warm_up,
            step_ms=options.step_ms,
        )
        for number in options.sequences
    ]


def format_tables(summary: dict[str, Any]) -> str:
    """`summary` is what --json prints."""
    lines = [f"{summary['steps']} steps each, {summary['cores']} cores; milliseconds, p50 / p99"]
    lines += [
        "",
        f"{'sequences':>9}{'scheduling':>16}{'mean':>7}{'limit':>7}       {'tokens back':>14}{'inputs':>14}"
        f"{'drawing':>14}{'output':>14}",
    ]
    for row in summary["parts"]:
        lines.append(
            f"{row['sequences']:>9}{pair(row['scheduling']):>16}{row['scheduling']['mean']:>7.2f}"
            f"{verdict(row, 'scheduling', 'scheduling_limit_ms')}{pair(row['tokens_back']):>14}"
            f"{pair(row['rank_inputs']):>14}{pair(row['rank_drawing']):>14}{pair(row['rank_output']):>14}"
        )
    lines += [
        "",
        f"steps of {summary['step_ms']:g} ms",
        f"{'sequences':>9}{'ranks':>6}{'transport':>14}{'limit':>7}       {'unhidden':>9}{'share':>8}{'limit':>7}"
        f"       {'own thread':>10}{'share':>8}{'schedule':>14}{'deliver':>14}",
    ]
    for row in summary["overlap"]:
        device, own = row["device"], row["own_thread"]
        lines.append(
            f"{row['sequences']:>9}{row['ranks']:>6}{pair(row['transport']):>14}"
            f"{verdict(row, 'transport', 'transport_limit_ms')}{device['unhidden']['mean']:>9.3f}"
            f"{device['unhidden_share']:>8.2%}{verdict(row, 'unhidden', 'unhidden_limit', '.0%')}"
            f"{own['unhidden']['mean']:>10.3f}{own['unhidden_share']:>8.2%}{pair(device['schedule']):>14}"
            f"{pair(device['deliver']):>14}"
        )
    return "\n".join(lines)


def pair(figure: dict[str, float]) -> str:
    """Median and 99th percentile."""
    return f"{figure['p50']:.2f} / {figure['p99']:.2f}"


def verdict(row: Row, name: str, limit: str, form: str = "g") -> str:
    """The limit and whether it holds, where there is one."""
    if limit not in row:
        return " " * 14
    return f"{row[limit]:>7{form}} {'holds' if row[f'{name}_holds'] else 'MISSED':<6}"


if __name__ == "__main__":
    main()
