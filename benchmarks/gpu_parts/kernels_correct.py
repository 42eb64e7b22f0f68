"""The part `kernels-correct`: every kernel against float64 on fresh random inputs, and replayed from a graph.

What was left out for want of time is no failure, and is said in the row of its kernel.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from gpu_parts.attention_checks import decode_checks, prefill_checks
from gpu_parts.budget import NO_TIME, Budget
from gpu_parts.check import Check, CheckResult
from gpu_parts.check_sizes import CheckSizes
from gpu_parts.check_worker import CheckPool
from gpu_parts.ledger import Ledger, Row
from gpu_parts.product_checks import expert_checks, product_checks
from gpu_parts.row_checks import row_checks
from gpu_parts.sampling_checks import sampling_checks

GROUP = "correct"


def all_checks(sizes: CheckSizes) -> list[Check]:
    """Each once; the kinds take turns, so that none is left out whole when time is short."""
    kinds = (product_checks, decode_checks, prefill_checks, row_checks, expert_checks, sampling_checks)
    turns = zip_longest(*(kind(sizes) for kind in kinds))
    return list({check.name: check for turn in turns for check in turn if check is not None}.values())


def check_kernels(ledger: Ledger, budget: Budget, checks: Sequence[Check], pool: CheckPool) -> None:
    """A row for every check that failed, as soon as it did, and one for every kernel and precision at the end."""
    kernels = {check.name: f"{check.kernel} {check.precision}" for check in checks}
    results: dict[str, list[CheckResult]] = defaultdict(list)
    for result in pool.results(checks, budget):
        results[kernels.get(result.name, result.name)].append(result)
        if result.problem and result.problem != NO_TIME:
            errors = f"norm {result.error:.1e}, worst {result.worst:.1e}: "
            note = (errors if result.error == result.error else "") + result.problem
            ledger.add(Row(group=GROUP, name=result.name, is_right=False, note=note))
        elif not result.problem:
            row = Row(group=GROUP, name=result.name, value=result.error, unit="norm", is_right=True, is_shown=False)
            ledger.add(row)
    for row in _summary(results):
        ledger.add(row)
    everything = [result for found in results.values() for result in found]
    seconds = sum(result.compile_seconds for result in everything)
    note = f"{sum(result.num_compiled for result in everything)} specialisations in the processes of the checks"
    ledger.add(Row(group="compiled", name="checks", value=seconds, unit="s", note=note))


def _summary(results: dict[str, list[CheckResult]]) -> Iterator[Row]:
    for kernel, found in sorted(results.items()):
        tried = [result for result in found if result.problem != NO_TIME]
        passed = [result for result in tried if not result.problem]
        note = f"{len(passed)} of {len(tried)} right"
        if len(tried) < len(found):
            note += f", {len(found) - len(tried)} {NO_TIME}"
        if passed:
            note += f"; worst element {max(result.worst for result in passed):.1e}"
        yield Row(
            group=GROUP,
            name=kernel,
            value=max((result.error for result in passed), default=None),
            unit="norm",
            is_right=len(passed) == len(tried) if tried else None,
            note=note,
            details={"seconds": sum(result.seconds for result in found)},
        )
