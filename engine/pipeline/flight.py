"""`Flight`: a collective on a CPU from its start to its landing, which gloo's threads carry in between."""

from torch import Tensor

from engine.layers.collective import CollectiveOperation
from engine.pipeline.schedule import Lane
from engine.pipeline.stopwatch import Cost, Stopwatch
from engine.tensor_parallel import Collective


class Flight:
    """Begun when it is made. `name`, `layer` (None outside the layers) and `tokens` are for the timeline."""

    def __init__(
        self,
        operation: CollectiveOperation,
        output: Tensor,
        source: Tensor,
        *,
        name: str,
        layer: int | None,
        tokens: tuple[int, int],
    ) -> None:
        self.tokens = tokens
        self._name, self._layer = name, layer
        self._ended: float | None = None
        self._started = Stopwatch.now()
        self._collective = operation.start(output, source)
        # From here on the compute lane is free: what launching took is no time that overlap hid.
        self._launched = Stopwatch.now()
        if self._collective is not None:
            self._notice_end(self._collective)

    def land(self, stopwatch: Stopwatch) -> None:
        """Wait until the result is there; only the waiting is time that the compute lane lost."""
        now = stopwatch.now()
        if self._collective is not None:
            early = self._ended  # over before anybody waited; else it is when the waiting is
            self._collective.wait()
            landed = stopwatch.spent(Cost.NETWORK, now)
            stopwatch.flown(self._launched, early or landed)
            ended = min(self._ended or landed, landed)
            stopwatch.record(
                self._name, Lane.NETWORK, self._started, ended=ended, layer=self._layer, tokens=self.tokens
            )

    def _notice_end(self, collective: Collective) -> None:
        def end(_: object) -> None:
            self._ended = Stopwatch.now()

        collective.get_future().add_done_callback(end)
