"""The comparison of servers as text, for a terminal of 130 columns."""

from typing import Any


def format_serving_table(summary: dict[str, Any]) -> str:
    """`summary` is what --json prints."""
    title = (
        f"{summary['workload']} over HTTP, all at once, {summary['dtype']}, {summary['num_threads']} threads, "
        f"median of {summary['rounds']} rounds; times in ms"
    )
    head = (
        f"{'server':<16}{'version':<19}{'tokens/s':>9}{'ratio':>7}{'TTFT p50':>10}{'p99':>8}{'TPOT p50':>10}"
        f"{'offline':>9}{'served':>8}{'no client':>11}{'client':>8}{'idle':>6}{'others':>8}"
    )
    return "\n".join((title, head, *map(_line, summary["rows"])))


def _line(row: dict[str, Any]) -> str:
    name = f"{row['engine']:<16}{row['version'] or '':<19}"
    if row["status"] != "ok":
        return f"{name}  {row['error']}"
    parts = (
        _cell(row["output_tokens_per_second"], ",.0f", 9),
        _cell(row["ratio"], ".2f", 7),
        _cell(row["ttft_p50_ms"], ",.0f", 10),
        _cell(row["ttft_p99_ms"], ",.0f", 8),
        _cell(row["tpot_p50_ms"], ",.1f", 10),
        _cell(row["offline_tokens_per_second"], ",.0f", 9),
        _cell(row["serving_efficiency"], ".1%", 8),
        _cell(row["serving_efficiency_without_client"], ".1%", 11),
        _cell(row["client_cores"], ".2f", 8),
        _cell(row["idle_cores"], ".2f", 6),
        _cell(row["foreign_cores"], ".2f", 8),
    )
    return name + "".join(parts)


def _cell(value: float | None, form: str, width: int) -> str:
    """Right-aligned; a dash for what is not known."""
    return f"{'-' if value is None else format(value, form):>{width}}"
