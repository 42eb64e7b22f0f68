"""`StepPicture`: what ran when in the next step of a replica, as SVG, for `GET /timeline.svg`.

However often somebody asks, a step is recorded every `PAUSE_SECONDS` at most, and one at a time; in between everybody
is given the last picture. A recorded step on a GPU runs without its CUDA graph and waits for the device, which costs it
some milliseconds; on a CPU it costs a step next to nothing.
"""

import asyncio
import time

from cluster.api_error import ApiError
from cluster.dispatcher import Dispatcher
from cluster.replica_report import Question
from engine import RecordedStep, draw_notice, draw_recorded_step

PAUSE_SECONDS = 5.0
ANSWER_SECONDS = 15.0  # longer than a replica takes to say that it is idle


class StepPicture:
    """Of one ingress; `model` is what the picture is called."""

    def __init__(self, dispatcher: Dispatcher, model: str) -> None:
        self._dispatcher = dispatcher
        self._model = model
        self._drawing: asyncio.Task[str] | None = None
        self._drawn_at = float("-inf")
        self._last = ""

    async def svg(self) -> str:
        """The picture; raises `ApiError` (503) where no replica is ready."""
        if self._drawing is None or (self._drawing.done() and time.monotonic() - self._drawn_at > PAUSE_SECONDS):
            self._drawing = asyncio.create_task(self._draw(), name="picture of a step")
        return await asyncio.shield(self._drawing)

    async def _draw(self) -> str:
        replica_id = self._dispatcher.busiest
        if replica_id is None:
            raise ApiError.unavailable("No replica of the model is ready.", 2.0)
        answer = await self._dispatcher.ask(replica_id, Question.STEP, ANSWER_SECONDS)
        self._drawn_at = time.monotonic()
        if isinstance(answer, tuple) and answer:
            at = time.strftime("%H:%M:%S", time.gmtime())
            self._last = await asyncio.to_thread(self._picture, replica_id, answer, at)
            return self._last
        if answer is None:
            return draw_notice(self._model, f"Replica {replica_id} did not answer.")
        # The last picture stays: it says when it was recorded.
        return self._last or draw_notice(self._model, "Idle: no step ran. Send a request, and ask again.")

    def _picture(self, replica_id: str, ranks: tuple[RecordedStep, ...], at: str) -> str:
        return draw_recorded_step(ranks, f"{self._model}, replica {replica_id}", f", recorded at {at} UTC")
