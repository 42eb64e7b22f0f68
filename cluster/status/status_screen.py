"""The lines of `nanoserve status`: a `ClusterView` as text for a terminal of any width. Pure; knows no clock."""

import textwrap
from collections import deque
from collections.abc import Iterator, Sequence

from rich.text import Text

from cluster.status.cluster_view import ClusterView, LatencyView, LoadView, ReplicaState, ReplicaView

HISTORY = 60
_BARS = "▁▂▃▄▅▆▇█"
_LABEL = 13
_MOST_LOSSES = 4
_NARROWEST = 40
_WIDEST_BAR = 40
_STYLES = {
    ReplicaState.READY: "green",
    ReplicaState.FAILED: "bold red",
    ReplicaState.SILENT: "bold red",
}


class LoadHistory:
    """Tokens per second of the last looks, the oldest first."""

    def __init__(self) -> None:
        self.generated: deque[float] = deque(maxlen=HISTORY)
        self.prompt: deque[float] = deque(maxlen=HISTORY)

    def add(self, view: ClusterView) -> None:
        """One more look."""
        self.generated.append(view.total.generated_tokens_per_second)
        self.prompt.append(view.total.prompt_tokens_per_second)


def draw_status(view: ClusterView, url: str, time: str, width: int, height: int, history: LoadHistory) -> Text:
    """No line is longer than `width`, nor are there more than `height`; replicas that find no place are counted."""
    width = max(_NARROWEST, width)
    lines = [*_head(view, url, time, width), Text(), *_totals(view, width, history), Text()]
    lines += _replicas(view.replicas, width, max(3, height - len(lines)))
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return Text("\n").join(lines)


def _head(view: ClusterView, url: str, time: str, width: int) -> Iterator[Text]:
    title = Text.assemble(("nanoserve ", "bold"), (printable(", ".join(view.models)), "bold cyan"), f" at {url}")
    title.truncate(width - len(time) - 1, overflow="ellipsis")
    yield Text.assemble(title, " " * (width - len(title) - len(time)), (time, "dim"))
    is_whole = view.num_ready >= view.num_wanted
    restarts = f"{view.num_restarts} restart" + ("" if view.num_restarts == 1 else "s")
    yield Text.assemble(
        (f"{view.num_ready} of {view.num_wanted} replicas ready", "green" if is_whole else "bold red"),
        ", ",
        (restarts, "" if view.num_restarts == 0 else "yellow"),
        (f", version {printable(view.version)}", "dim"),
    )


def _totals(view: ClusterView, width: int, history: LoadHistory) -> Iterator[Text]:
    load, ingress = view.total, view.ingress
    room = min(HISTORY, width - _LABEL - 12)
    yield _line("Tokens out", f"{number(load.generated_tokens_per_second):>8}/s  ", sparkline(history.generated, room))
    yield _line("Tokens in", f"{number(load.prompt_tokens_per_second):>8}/s  ", sparkline(history.prompt, room))
    yield _line("Requests", f"{load.num_running:>8,} running, {load.num_waiting:,} waiting")
    preempted = f", {load.num_preemptions:,} preempted" if load.num_preemptions else ""
    yield _line("KV cache", f"{100 * load.kv_usage:>8.1f} %  ", bar(load.kv_usage, min(_WIDEST_BAR, room)), preempted)
    window = f" in {ingress.window_seconds:.0f} s"
    if ingress.num_ingresses > 1:
        window += f", through one of {ingress.num_ingresses} ingresses"
    yield _line("First token", _latency(ingress.time_to_first_token, window))
    yield _line("Per token", _latency(ingress.time_per_output_token, window))
    yield from _optimum(load, width)


def _optimum(load: LoadView, width: int) -> Iterator[Text]:
    if load.percent_of_optimal is None or load.optimal_tokens_per_second is None:
        yield _line("Optimum", " unknown: no GEMM peak was measured")
        return
    yield _line(
        "Optimum", f"{load.percent_of_optimal:>8.1f} % of {number(load.optimal_tokens_per_second)} tokens per second"
    )
    losses = ", ".join(f"{printable(loss.description)} {loss.percent:.1f} %" for loss in load.losses[:_MOST_LOSSES])
    for index, line in enumerate(textwrap.wrap(losses, width - _LABEL)[:2]):
        yield _line("Lost to" if index == 0 else "", line)


def _latency(view: LatencyView | None, window: str) -> str:
    if view is None:
        return f"       -  no call{window}"
    p50, p99 = seconds(view.p50_seconds), seconds(view.p99_seconds)
    return f"{p50:>10} p50, {p99} p99 ({view.num_calls:,} calls{window})"


def _replicas(replicas: Sequence[ReplicaView], width: int, height: int) -> Iterator[Text]:
    if not replicas:
        yield Text("No replica is there.", "bold red")
        return
    name = min(16, max(7, *(len(replica.id) for replica in replicas)))
    head = f"{'Replica':<{name}} {'State':<10} {'Ranks':>5} {'Run':>5} {'Wait':>5} {'KV':>5}"
    yield Text(f"{head} {'In/s':>7} {'Out/s':>7} {'Opt.':>6}  Largest loss", "dim")
    shown = replicas if len(replicas) < height else replicas[: max(1, height - 2)]
    yield from (_replica(replica, name) for replica in shown)
    if len(shown) < len(replicas):
        yield Text(f"and {len(replicas) - len(shown)} more", "dim")


def _replica(replica: ReplicaView, name: int) -> Text:
    row = Text(f"{printable(replica.id)[:name]:<{name}} ")
    row.append(f"{replica.state:<10}", _STYLES.get(replica.state, "yellow"))
    load = replica.load
    if load is None:
        return row.append(" " + printable(replica.detail))
    percent = "-" if load.percent_of_optimal is None else f"{load.percent_of_optimal:.1f}%"
    row.append(f" {len(replica.ranks):>5} {load.num_running:>5} {load.num_waiting:>5} {100 * load.kv_usage:>4.0f}%")
    row.append(f" {number(load.prompt_tokens_per_second):>7} {number(load.generated_tokens_per_second):>7}")
    return row.append(f" {percent:>6}  {printable(load.losses[0].description) if load.losses else ''}")


def _line(label: str, *texts: str) -> Text:
    return Text.assemble((f"{label:<{_LABEL}}", "dim"), *texts)


def printable(text: str) -> str:
    """On one line, and without what would move a terminal's cursor."""
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())


def number(value: float) -> str:
    """Of tokens: no digits that nobody reads."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def seconds(value: float) -> str:
    """Of a latency: three digits, in milliseconds below a second."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:#.3g} ms".replace(". ms", " ms")


def bar(share: float, width: int) -> str:
    """A part of a whole."""
    full = round(max(0.0, min(1.0, share)) * width)
    return "█" * full + "░" * (width - full)


def sparkline(values: Sequence[float], width: int) -> str:
    """The latest `width` values, of which the highest fills its place."""
    shown = list(values)[-width:] if width > 0 else []
    top = max(shown, default=0.0)
    if top <= 0:
        return _BARS[0] * len(shown)
    return "".join(_BARS[min(len(_BARS) - 1, int(value / top * (len(_BARS) - 1) + 0.5))] for value in shown)
