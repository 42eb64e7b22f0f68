"""The comparison as text, for a terminal of 120 columns."""

from typing import Any


def format_table(summary: dict[str, Any]) -> str:
    """`summary` is what --json prints."""
    peak, optimum = summary["gemm_peak_flops_per_second"] / 1e12, summary["optimal_tokens_per_second"]
    title = (
        f"{summary['workload']}, {summary['dtype']}, {summary['num_threads']} threads, median of {summary['rounds']} "
        f"rounds; GEMM peak {peak:.3f} TFLOP/s, optimum {optimum:,.0f} tokens/s"
    )
    head = f"{'engine':<25}{'version':<19}{'tokens out/s':>14}{'ratio':>8}{'% of optimum':>14}"
    return "\n".join((title, f"{head}{'same':>7}{'prefix':>8}{'others':>8}", *map(_line, summary["rows"])))


def _line(row: dict[str, Any]) -> str:
    name = f"{row['engine']:<25}{row['version'] or '':<19}"
    if row["status"] != "ok":
        return f"{name}  {row['error']}"
    agreement = row["agreement"] or {"requests": None, "mean_common_prefix": None}
    parts = (
        f"{row['output_tokens_per_second']:>14,.0f}",
        _cell(row["ratio"], ".2f", 8),
        f"{row['percent_of_optimum']:>12.1f} %",
        _cell(agreement["requests"], ".0%", 7),
        _cell(agreement["mean_common_prefix"], ".1f", 8),
        _cell(row["foreign_cores"], ".2f", 8),
    )
    return name + "".join(parts)


def _cell(value: float | None, form: str, width: int) -> str:
    """Right-aligned; a dash for what is not known."""
    return f"{'-' if value is None else format(value, form):>{width}}"
