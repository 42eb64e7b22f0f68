"""`Budget`: the seconds that a part may take, and which of its work they suffice for.

Work is tried in the order of what matters, and whoever asks for more than is left is told so and leaves it out.
"""

import time
from collections.abc import Callable


class Budget:
    """Begins to run when it is made."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._started = clock()

    @property
    def left(self) -> float:
        """Seconds; negative when it is overdrawn."""
        return self.seconds - (self._clock() - self._started)

    def has(self, seconds: float) -> bool:
        """Whether so many are left."""
        return self.left >= seconds

    def part(self, share: float) -> "Budget":
        """A budget of this share of all seconds, or of what is left if that is less."""
        return Budget(max(0.0, min(share * self.seconds, self.left)), self._clock)


NO_TIME = "left out: the part's time was over (--seconds)"
