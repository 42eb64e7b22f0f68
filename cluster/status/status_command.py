"""`nanoserve status`: the cluster in a terminal, once a second; elsewhere, and when asked to, once."""

import time
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from cluster.status.cluster_client import ClusterClient, NoAnswerError
from cluster.status.cluster_view import ClusterView
from cluster.status.status_screen import LoadHistory, draw_status

PERIOD_SECONDS = 1.0
EXIT_NO_ANSWER = 1
_TROUBLE_LINES = 3


def status(
    url: Annotated[str, typer.Option(help="Of a nanoserve server.")] = "http://127.0.0.1:8000",
    once: Annotated[bool, typer.Option("--once", help="Say it once, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what GET /cluster answers, once.")] = False,
) -> None:
    """Show replicas, load, latencies and the percent of the optimum, refreshed each second.

    Where the output is no terminal, once, as plain text. Ends with status 1 where the server does not answer; on a
    terminal it keeps asking until Ctrl-C.
    """
    console = Console(highlight=False)
    with ClusterClient(url) as client:
        if once or as_json or not console.is_terminal:
            _say_once(client, console, as_json=as_json)
        else:
            StatusDisplay(client, console).run()


def _say_once(client: ClusterClient, console: Console, *, as_json: bool) -> None:
    try:
        view = client.view()
    except NoAnswerError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"nanoserve: {error}", markup=False)
        raise typer.Exit(EXIT_NO_ANSWER) from None
    if as_json:
        typer.echo(view.model_dump_json(indent=2))
        return
    history = LoadHistory()
    history.add(view)
    console.print(draw_status(view, client.url, clock(view.time), console.width, 10_000, history))


class StatusDisplay:
    """The live view: what the server said last, and since when it says nothing, if it does not."""

    def __init__(self, client: ClusterClient, console: Console) -> None:
        self._client = client
        self._console = console
        self._history = LoadHistory()
        self._view: ClusterView | None = None
        self._trouble: NoAnswerError | None = None
        self._silent_since = 0.0

    def run(self) -> None:
        """Until Ctrl-C, which is no failure. The screen is another one, so that what was on it comes back."""
        try:
            with Live(
                Text(f"Asking {self._client.url}."), console=self._console, screen=True, auto_refresh=False
            ) as live:
                while True:
                    started = time.monotonic()
                    self.look()
                    live.update(self.picture(time.time()), refresh=True)
                    time.sleep(max(0.0, PERIOD_SECONDS - (time.monotonic() - started)))
        except KeyboardInterrupt:
            return

    def look(self) -> None:
        """Ask once."""
        try:
            self._view = self._client.view()
            self._history.add(self._view)
            self._trouble = None
        except NoAnswerError as error:
            if self._trouble is None:
                self._silent_since = time.time()
            self._trouble = error

    def picture(self, now: float) -> Group:
        """What is known at `now` (Unix seconds)."""
        parts: list[Text] = []
        width, height = self._console.size
        if self._trouble is not None:
            silence = f"No answer since {clock(self._silent_since)} ({now - self._silent_since:.0f} s). "
            parts.append(Text.assemble((silence, "bold red"), f"{self._trouble} Trying again every second."))
            height -= _TROUBLE_LINES
        if self._view is not None:
            shown = draw_status(self._view, self._client.url, clock(self._view.time), width, height - 1, self._history)
            if self._trouble is not None:
                shown.stylize("dim")
            parts.append(shown)
        return Group(*parts)


def clock(unix_seconds: float) -> str:
    """The time of day, here."""
    return time.strftime("%H:%M:%S", time.localtime(unix_seconds))
