"""`StartDisplay`: what `nanoserve serve` prints. Plain lines, and on a terminal a bar while weights load."""

import json
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from cluster.config import ServingConfig
from cluster.memory_table import memory_tables
from engine import MemoryUse


class StartDisplay:
    """Lines go to standard error; the ready line, which scripts wait for, to standard output."""

    def __init__(self) -> None:
        self._errors = Console(stderr=True, highlight=False, soft_wrap=True)
        self._output = Console(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._last_line = ""
        self._told: set[str] = set()

    def say(self, line: str) -> None:
        """One line."""
        self._errors.print(line, markup=False)

    def loading(self, done: int, total: int, num_ready: int, num_replicas: int) -> None:
        """Weights of all replicas so far; may be called often."""
        if self._errors.is_terminal and total:
            self._bar(done, total)
        line = f"Replicas ready: {num_ready}/{num_replicas}."
        if num_ready and line != self._last_line:
            self._last_line = line
            self.say(line)

    def doing(self, text: str) -> None:
        """What ranks are busy with; may be called often, and by several replicas that do the same: told once."""
        if text not in self._told:
            self._told.add(text)
            self.say(f"{text[0].upper()}{text[1:]}.")

    def memory(self, replicas: Mapping[str, Sequence[MemoryUse]]) -> None:
        """What the memory of each replica's processes consists of."""
        for table in memory_tables(replicas):
            self.say(table)

    def ready(self, config: ServingConfig, url: str) -> None:
        """The model can be used."""
        self.stop()
        name = config.names[0]
        body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 64})
        self._output.print(
            f"nanoserve is ready: {name} at {url}/v1; try:\n"
            f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'",
            markup=False,
        )

    def fail(self, error: Exception | str) -> None:
        """Why there is nothing to use."""
        self.stop()
        self._errors.print(f"nanoserve: {error}", markup=False)

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _bar(self, done: int, total: int) -> None:
        if self._progress is None:
            columns = (TextColumn("Loading weights"), BarColumn(), DownloadColumn(binary_units=True))
            self._progress = Progress(*columns, console=self._errors, transient=True)
            self._progress.add_task("", total=total)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=done, total=total)
