"""Notes when requests and steps pass certain points of a server, without changing the server: a clock from outside.

Python imports a module of this name by itself where it finds one, so it reaches every process of a server that is
started with this folder in PYTHONPATH. Where NANOSERVE_STAGE_CLOCK names a folder, the functions in `POINTS` are
wrapped as their modules are imported; each process appends the monotonic clock and the point's name to a file of its
own there, in the background. NANOSERVE_SERVE_VARIABLES is a JSON object that replaces variables of Serve's environment.
"""

import importlib.abc
import importlib.machinery
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final

FOLDER_VARIABLE: Final = "NANOSERVE_STAGE_CLOCK"
SERVE_VARIABLES: Final = "NANOSERVE_SERVE_VARIABLES"
FLUSH_SECONDS: Final = 0.05

# Module -> (point, class, method), in the order in which a first token passes them.
POINTS: Final[dict[str, tuple[tuple[str, str, str], ...]]] = {
    "cluster.ingress": (("called", "Ingress", "answer"), ("written", "CallResponse", "_write")),
    "cluster.dispatcher": (("opened", "Dispatcher", "open"), ("heard", "Dispatcher", "on_message")),
    "cluster.engine_host": (("submitted", "EngineHost", "submit"), ("put", "_Stream", "put")),
    "cluster.worker_group": (("sent", "WorkerGroup", "execute"),),
    "engine.worker": (("computing", "Worker", "execute"),),
    "cluster.step_transport": (("computed", "RankSocket", "send"),),
}
AT_THE_END: Final = {"written"}  # noted when the method is done; the others when it is called


class _Marks:
    """The marks of this process; a thread of its own writes them, from the first one on."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / f"{os.getpid()}.marks"
        self._marks: deque[tuple[float, str]] = deque()
        self._thread: threading.Thread | None = None

    def add(self, point: str) -> None:
        self._marks.append((time.monotonic(), point))
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name="stage clock", daemon=True)
            self._thread.start()

    def _write(self) -> None:
        with self._file.open("a") as file:
            while True:
                while self._marks:
                    moment, point = self._marks.popleft()
                    file.write(f"{moment:.6f} {point}\n")
                file.flush()
                time.sleep(FLUSH_SECONDS)


class _Finder(importlib.abc.MetaPathFinder):
    """Lets Python's own finder find a module, and changes it once it has run."""

    def __init__(self, changes: dict[str, Callable[[ModuleType], None]]) -> None:
        self._changes = changes

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._changes:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            change, execute = self._changes[fullname], spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                change(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _wrap(module: ModuleType, marks: _Marks) -> None:
    for point, class_name, method in POINTS[module.__name__]:
        owner = getattr(module, class_name)
        wrapper = _after if point in AT_THE_END else _before
        setattr(owner, method, wrapper(getattr(owner, method), marks, point))


def _before(function: Callable[..., Any], marks: _Marks, point: str) -> Callable[..., Any]:
    def marked(*arguments: Any, **options: Any) -> Any:
        marks.add(point)
        return function(*arguments, **options)

    return marked


def _after(function: Callable[..., Any], marks: _Marks, point: str) -> Callable[..., Any]:
    async def marked(*arguments: Any, **options: Any) -> Any:
        result = await function(*arguments, **options)
        marks.add(point)
        return result

    return marked


def _replace_variables(module: ModuleType, variables: dict[str, str]) -> None:
    original = module.serving_environment
    module.serving_environment = lambda: original() | variables  # type: ignore[attr-defined]


def _install() -> None:
    changes: dict[str, Callable[[ModuleType], None]] = {}
    if folder := os.environ.get(FOLDER_VARIABLE):
        marks = _Marks(Path(folder))
        changes |= dict.fromkeys(POINTS, lambda module: _wrap(module, marks))
    if variables := os.environ.get(SERVE_VARIABLES):
        changes["cluster.ray_environment"] = lambda module: _replace_variables(module, json.loads(variables))
    if changes:
        sys.meta_path.insert(0, _Finder(changes))


_install()
