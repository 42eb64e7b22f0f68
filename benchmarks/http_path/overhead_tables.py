"""The results of `http_overhead.py` as text, for a terminal of 120 columns."""

from collections.abc import Mapping
from typing import Any


def format_tables(summary: dict[str, Any]) -> str:
    """`summary` is what --json prints."""
    title = f"{summary['model']}, {summary['num_requests']} x {summary['shape']}, {summary['num_threads']} threads"
    tables = [title]
    if "saturation" in summary:
        tables.append(_saturation(summary["saturation"]))
    if "idle" in summary:
        tables.append(_idle(summary["idle"]))
    if "streams" in summary:
        tables.append(_streams(summary["streams"]))
    return "\n\n".join(tables)


def _saturation(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'tokens out per second':<42}" + "".join(f"{row['way']:>12}" for row in rows)]

    def line(name: str, values: list[str]) -> None:
        lines.append(f"{name:<42}" + "".join(f"{value:>12}" for value in values))

    line("over HTTP, as measured", [f"{row['output_tokens_per_second']:,.0f}" for row in rows])
    line("over HTTP, the client's time handed back", [f"{row['corrected_tokens_per_second']:,.0f}" for row in rows])
    line("engine alone", [f"{row['offline_tokens_per_second']:,.0f}" for row in rows])
    line(
        "engine alone, beside a client's stand-in",
        [f"{row['offline_beside_stand_in_tokens_per_second']:,.0f}" for row in rows],
    )
    line("HTTP / engine, as measured", [f"{row['ratio']:.1%}" for row in rows])
    line("HTTP / engine, client's time handed back", [f"{row['corrected_ratio']:.1%}" for row in rows])
    line("HTTP / engine, both beside a client", [f"{row['stand_in_ratio']:.1%}" for row in rows])
    line("server beside the ranks, of all cores", [f"{row['server_share_beside_ranks']:.1%}" for row in rows])
    line("client, of all cores", [f"{row['client_share']:.1%}" for row in rows])
    line("idle", [f"{row['idle_share']:.1%}" for row in rows])
    line("other programs", [f"{row['others_share']:.1%}" for row in rows])
    for role in rows[0]["microseconds_per_token"]:
        line(f"CPU us per token: {role}", [f"{row['microseconds_per_token'].get(role, 0):,.0f}" for row in rows])
    line("CPU us per token: client", [f"{row['client_microseconds_per_token']:,.0f}" for row in rows])
    return "\n".join(lines)


def _idle(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'first token of an idle server, ms':<42}" + "".join(f"{row['way']:>12} p50{'p99':>8}" for row in rows)]

    def line(name: str, stages: list[Mapping[str, Any]]) -> None:
        lines.append(f"{name:<42}" + "".join(f"{stage['p50_ms']:>16.2f}{stage['p99_ms']:>8.2f}" for stage in stages))

    for index, stage in enumerate(rows[0]["stages"]):
        line(stage["name"], [row["stages"][index] for row in rows])
    line("engine's own", [row["engine"] for row in rows])
    line("HTTP minus engine", [row["beyond_engine"] for row in rows])
    for role in rows[0]["processor_milliseconds_per_request"]:
        values = (row["processor_milliseconds_per_request"].get(role, 0.0) for row in rows)
        lines.append(f"{'CPU ms per request: ' + role:<42}" + "".join(f"{value:>16.2f}{'':>8}" for value in values))
    return "\n".join(lines)


def _streams(row: dict[str, Any]) -> str:
    def each(name: str) -> str:
        return "".join(f"{value:>12.1f}" for value in row[name])

    lines = [
        f"{row['num_streams']} streams of {row['num_output_tokens']} tokens, by round",
        f"{'longest gap of a stream, ms':<42}{each('longest_gap_ms')}",
        f"{'longest gap between steps, ms':<42}{each('longest_engine_gap_ms')}",
        f"{'longest gap beyond the steps, ms':<42}{each('longest_stall_ms')}",
        f"{'a step, ms':<42}{'p50':>12}{'p99':>12}",
    ]
    lines += [f"{stage['name']:<42}{stage['p50_ms']:>12.2f}{stage['p99_ms']:>12.2f}" for stage in row["stages"]]
    return "\n".join(lines)
