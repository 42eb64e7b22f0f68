"""Rows of rates: what a call moves or computes over the seconds that it takes."""

from collections.abc import Callable, Mapping

from gpu_parts.ledger import Ledger, Row
from gpu_parts.timing import Timing


def rate_rows(
    ledger: Ledger,
    group: str,
    timings: Mapping[str, Timing | Exception],
    amount: float,
    unit: str,
    ceiling: float | None,
    *,
    note: str = "",
    is_shown: Callable[[str], bool] = lambda name: True,
) -> dict[str, float]:
    """One row for each timing, `amount` of `unit` x seconds a call; the rates of those that ran. `is_shown` by name."""
    rates: dict[str, float] = {}
    for name, timing in timings.items():
        if isinstance(timing, Exception):
            problem = f"{type(timing).__name__}: {timing}".splitlines()[0][:200]
            ledger.add(Row(group=group, name=name, note=problem))
            continue
        rates[name] = amount / timing.seconds
        details = {"seconds": timing.seconds, "spread": timing.spread, "num_replays": timing.num_replays}
        ledger.add(
            Row(
                group=group,
                name=name,
                value=rates[name],
                unit=unit,
                ceiling=ceiling,
                note=note,
                is_shown=is_shown(name),
                details=details,
            )
        )
    return rates
