"""`LocalGroup`: the ranks of one tensor-parallel group as processes of this machine, without Ray.

For commands, benchmarks and tests that want a whole group: each rank starts a `Worker` and then runs, in lockstep with
the others, whatever function it is sent. Serving uses `cluster.WorkerGroup` instead.
"""

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from engine.config import EngineConfig
from engine.errors import EngineDeadError, NanoserveError

if TYPE_CHECKING:
    from engine.executor import CacheCapacity
    from engine.worker import Worker

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

CLOSE_SECONDS = 10.0  # for a rank to leave by itself
_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


class LocalGroup:
    """A context: ranks start on entry and end on exit. `prepare(rank)` runs first in every process.

    `capacity` is what the started ranks say of their caches. A failure of one rank ends all of them.
    """

    capacity: "CacheCapacity"

    def __init__(self, config: EngineConfig, prepare: Callable[[int], None] | None = None) -> None:
        self._config = config
        self._prepare = prepare
        self._connections: list[Connection] = []
        self._processes: list[Any] = []

    def __enter__(self) -> "LocalGroup":
        """Start the ranks and load the model; raises what a rank raised."""
        context = multiprocessing.get_context("spawn")
        self._directory = tempfile.TemporaryDirectory(prefix="nanoserve-group-")
        rendezvous = f"file://{Path(self._directory.name) / 'rendezvous'}"
        try:
            for rank in range(self._config.tensor_parallel):
                ours, theirs = context.Pipe()
                arguments = (self._config, rank, rendezvous, theirs, self._prepare)
                process = context.Process(target=_serve, args=arguments, daemon=True, name=f"rank {rank}")
                process.start()
                theirs.close()
                self._connections.append(ours)
                self._processes.append(process)
            self.capacity = self._results()[0]
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self,
        function: "Callable[Concatenate[Worker, _Arguments], _Result]",
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> list[_Result]:
        """`function(worker, *args, **kwargs)` on every rank; their results by rank. It must be importable there."""
        for connection in self._connections:
            connection.send((function, args, kwargs))
        return self._results()

    def close(self) -> None:
        """End the ranks, by force if need be. Idempotent."""
        for connection in self._connections:
            try:
                connection.send(None)
            except OSError:
                continue
        for process in self._processes:
            process.join(CLOSE_SECONDS)
        self._kill()
        self._connections, self._processes = [], []
        self._directory.cleanup()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def _results(self) -> list[Any]:
        """One result of every rank; the first failure ends the others, because they may wait for that rank."""
        results: list[Any] = [None] * len(self._connections)
        waiting = dict(zip(self._connections, range(len(self._connections)), strict=True))
        while waiting:
            for connection in multiprocessing.connection.wait(list(waiting)):
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    is_good, value = connection.recv()
                except EOFError:
                    self._processes[rank].join(CLOSE_SECONDS)
                    exit_code = self._processes[rank].exitcode
                    self._kill()
                    raise EngineDeadError(f"Rank {rank} died: exit code {exit_code}.") from None
                if not is_good:
                    self._kill()
                    raise value
                results[rank] = value
        return results


def _serve(
    config: EngineConfig,
    rank: int,
    rendezvous: str,
    connection: Connection,
    prepare: Callable[[int], None] | None,
) -> None:
    """The life of one rank."""
    os.environ.update({name: value for name, value in _LOOPBACK.items() if name not in os.environ})
    try:
        if prepare is not None:
            prepare(rank)
        from engine.worker import Worker

        worker = Worker(config, rank, rendezvous if config.tensor_parallel > 1 else None)
        connection.send((True, worker.start()))
        while (request := connection.recv()) is not None:
            function, args, kwargs = request
            connection.send((True, function(worker, *args, **kwargs)))
        worker.close()
    except EOFError:
        pass  # whoever started this is gone
    except NanoserveError as error:
        connection.send((False, error))
    except Exception as error:
        message = f"Rank {rank} failed: {type(error).__name__}: {error}\n{traceback.format_exc()}"
        connection.send((False, EngineDeadError(message)))
    leave_process()


def leave_process() -> None:
    """End this rank's process without finalizing the interpreter.

    A thread of gloo that is only then letting go of the tensors of its last collective would ask a dead interpreter for
    its lock, which aborts the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
