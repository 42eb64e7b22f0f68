"""A process that evaluates checks, one line of standard input after the other, and the pool of such processes.

A kernel that reads beyond its memory ends the CUDA context of its process, and one that never ends blocks it: the pool
then begins another process and goes on with the next check. Several processes compile at the same time, which is what
most of the time goes into.
"""

import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from gpu_parts.budget import NO_TIME, Budget
from gpu_parts.check import Check, CheckResult, evaluate
from gpu_parts.compile_log import CompileLog

ENTRANCE = Path(__file__).resolve().parents[1] / "gpu.py"
SECONDS_PER_CHECK = 60.0
_PR_SET_PDEATHSIG = 1  # of prctl(2)


def serve(checks: Sequence[Check], device: torch.device, seed: int) -> None:
    """Answer the numbers of checks with their results, until there are no more; other output goes to stderr."""
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        log = CompileLog()
        with log.listening():
            result = evaluate(checks[int(line)], device, seed)
        result = replace(result, num_compiled=log.num_compiled, compile_seconds=log.seconds)
        answers.write(json.dumps(asdict(result)) + "\n")
        answers.flush()


def _end_with_parent() -> None:
    """A check that hangs must not outlive the part: Linux ends this process with the thread that began it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class CheckPool:
    """`arguments` follow the entrance on the command line of every process."""

    def __init__(
        self, num_workers: int, arguments: Sequence[str], seconds_per_check: float = SECONDS_PER_CHECK
    ) -> None:
        self._num_workers = num_workers
        self._arguments = list(arguments)
        self._seconds = seconds_per_check

    def results(self, checks: Sequence[Check], budget: Budget) -> Iterator[CheckResult]:
        """In the order in which they become known; those that the budget has no time for are said to be left out."""
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        found: queue.SimpleQueue[CheckResult] = queue.SimpleQueue()
        for number in range(len(checks)):
            waiting.put(number)

        def work() -> None:
            process: subprocess.Popen[str] | None = None
            while True:
                try:
                    number = waiting.get_nowait()
                except queue.Empty:
                    break
                if not budget.has(1.0):
                    found.put(_problem(checks[number], NO_TIME))
                    continue
                try:
                    process = process or self._begin()
                    result = self._ask(process, checks[number], number, min(self._seconds, budget.left + 10))
                except Exception as error:  # whatever breaks here must not leave the reader waiting for a result
                    result = _problem(checks[number], repr(error))
                if process is not None and process.poll() is not None:
                    process = None
                found.put(result)
            if process is not None:
                _end(process)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(self._num_workers)]
        for thread in threads:
            thread.start()
        for _ in checks:
            yield found.get()
        for thread in threads:
            thread.join()

    def _begin(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, str(ENTRANCE), *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def _ask(self, process: "subprocess.Popen[str]", check: Check, number: int, seconds: float) -> CheckResult:
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        line = ""
        try:
            process.stdin.write(f"{number}\n")
            process.stdin.flush()
            line = process.stdout.readline()
            while line and not line.startswith("{"):  # what something printed while it was imported
                line = process.stdout.readline()
        except OSError:
            pass
        finally:
            timer.cancel()
        if not line:
            code = _end(process)
            reason = f"no answer in {seconds:.0f} s" if code == -9 else f"its process ended with {code}"
            return _problem(check, reason)
        result = CheckResult(**json.loads(line))
        if "CUDA error" in result.problem or "AcceleratorError" in result.problem:
            _end(process)  # the context is lost, whatever comes next would fail
        return result


def _problem(check: Check, problem: str) -> CheckResult:
    return CheckResult(name=check.name, error=float("nan"), worst=float("nan"), seconds=0.0, problem=problem)


def _end(process: "subprocess.Popen[str]") -> int:
    """Its exit status; the process is ours."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        return process.wait(timeout=3)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
    finally:
        process.stdout.close()
