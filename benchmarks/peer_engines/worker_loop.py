"""`serve`: the worker's side of the line-JSON protocol between the comparison and one engine's process.

Each line on standard input is {"load": setup}, {"run": [[prompt, number of output tokens], ...]} or {"close": null};
each is answered by one line: {"version"}, {"seconds", "cpu_seconds", "tokens"}, {}, or {"error": the exception's last
line}. Standard library only: peers' interpreters import it.
"""

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peer_engines.peer_engine import EngineSetup, PeerEngine, PeerRequest

_PR_SET_PDEATHSIG = 1  # of prctl(2)


def serve(load: Callable[[EngineSetup], PeerEngine]) -> None:
    """Answer until asked to close or until standard input ends."""
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print, also from native code, must not come between the answers
    engine: PeerEngine | None = None
    for line in sys.stdin:
        try:
            ((verb, value),) = json.loads(line).items()
            if verb == "load":
                engine = load(_setup(value))
                answer: dict[str, Any] = {"version": engine.version}
            elif verb == "close":
                answer = {}
                if engine is not None:
                    engine.close()
            elif engine is not None:
                answer = _run(engine, value)
            else:
                raise RuntimeError("An engine must be loaded before it runs.")
        except Exception as error:
            traceback.print_exc()
            answer = {"error": traceback.format_exception_only(error)[-1].strip()}
            verb = "error"
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if verb == "close":
            return


def _end_with_parent() -> None:
    """Where the parent is killed, nobody would wake and end a paused worker: ask Linux to do so."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _setup(value: dict[str, Any]) -> EngineSetup:
    return EngineSetup(
        **{**value, "checkpoint": Path(value["checkpoint"]), "converted": Path(value["converted"])},
    )


def _run(engine: PeerEngine, value: list[tuple[list[int], int]]) -> dict[str, Any]:
    requests = [PeerRequest(prompt=prompt, num_output_tokens=count) for prompt, count in value]
    started, cpu_started = time.perf_counter(), time.process_time()
    tokens = engine.run(requests)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    for index, (request, generated) in enumerate(zip(requests, tokens, strict=True)):
        if len(generated) != request.num_output_tokens:
            raise RuntimeError(
                f"Request {index} got {len(generated)} tokens and should have got {request.num_output_tokens}."
            )
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": tokens}
