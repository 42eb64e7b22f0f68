"""A `PlanReport` for people, in three parts: what was asked, what each operation asks of the devices, what came out."""

from engine.pipeline.plan_report import PlanReport

_RATES = ((1e12, "TFLOP/s"), (1e9, "GFLOP/s"))


def operations_text(report: PlanReport) -> str:
    """The table of operations."""
    lines = [
        f"{'operation':<26}{'GFLOP':>12}{'memory GB':>12}{'network GB':>12}"
        f"{'compute ms':>12}{'memory ms':>11}{'network ms':>12}  {'bound':<8}{'cost ms':>10}"
    ]
    rows = [*report.request.table.rows, report.request.table.total]
    prices = [report.request.price(row.name) for row in rows[:-1]]
    for row, price in zip(rows, [*prices, sum(prices)], strict=True):
        lines.append(
            f"{row.name:<26}{row.flops / 1e9:>12,.1f}{row.memory_bytes / 1e9:>12,.2f}"
            f"{row.network_bytes / 1e9:>12,.2f}{1e3 * row.compute_seconds:>12,.2f}"
            f"{1e3 * row.memory_seconds:>11,.2f}{1e3 * row.network_seconds:>12,.2f}  {row.bound:<8}"
            f"{1e3 * price:>10,.2f}"
        )
    return "\n".join(lines)


def question_text(report: PlanReport) -> str:
    """What was asked."""
    request = report.request
    shape = request.shape
    rows = (
        ("plan for", report.title),
        (
            "batch",
            f"{shape.num_decodes:,.0f} decodes and {shape.num_prefills:,.0f} prefill tokens: requests of "
            f"{request.num_prompt_tokens:,} prompt and {request.num_output_tokens:,} output tokens",
        ),
        ("model", f"{request.model.architecture}, {request.num_layers} layers, {request.number_format}"),
        ("costs", request.costs.source),
    )
    return _text(rows)


def answer_text(report: PlanReport) -> str:
    """What came out."""
    request, plan = report.request, report.plan
    optimum = report.optimal_tokens_per_second_per_device
    peak = report.peak_flops_per_second
    unit, name = next((rate for rate in _RATES if peak >= rate[0]), _RATES[-1])
    is_sequential = plan.schedule == plan.sequential.schedule
    rows = (
        ("sequential", f"{1e3 * plan.sequential.step_seconds:,.5g} ms a step"),
        (
            "planned",
            "nothing is faster than sequential"
            if is_sequential
            else f"{1e3 * plan.best.step_seconds:,.5g} ms a step, {plan.speedup:.3f} times as fast",
        ),
        (
            "tokens per second",
            f"{report.tokens_per_second_per_device:,.5g} per device, "
            f"{request.num_devices * report.tokens_per_second_per_device:,.5g} in all",
        ),
        (
            "percent of optimal",
            f"{report.percent_of_optimal:.1f} % of {optimum:,.5g} tokens per second "
            f"per device: {peak / unit:,.5g} {name} ({request.device.source}) / (2 x "
            f"{report.layer_parameters / 1e9:,.4g} billion parameters of the layers)",
        ),
        (
            "lower bound",
            f"{1e3 * plan.lower_bound_seconds:,.5g} ms a layer, planned {1e3 * plan.best.period_seconds:,.5g}: gap "
            f"{100 * plan.gap:.1f} %",
        ),
        ("among", plan.family),
        (
            "search",
            f"{plan.solve_seconds:.1f} s, {plan.num_solved} partitions of {plan.num_partitions} solved: "
            f"{plan.stop_reason}",
        ),
        *(("note", note) for note in report.notes),
    )
    return _text(rows)


def _text(rows: tuple[tuple[str, str], ...]) -> str:
    return "\n".join(f"{name:<20}{value}" for name, value in rows)
