"""`LengthPredictor`: how long answers get, learned from the requests that finished; never from a trace.

The scheduler admits by predicted peak KV use (NanoFlow, section 4.2.1, which uses the mean decode length; here the
mean and variance given that a sequence is already g tokens long). Old observations fade, so that a change of traffic
is followed.
"""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


class LengthPredictor:
    """Distribution of generated lengths 1..max_length as a fading histogram.

    Until `min_observations` requests have finished nothing is known, and every request is taken at its own limit.
    """

    def __init__(self, max_length: int, *, min_observations: int = 32, memory: float = 1000.0) -> None:
        self._histogram = np.zeros(max_length + 1)
        self._fade = 1.0 - 1.0 / memory
        self._min_observations = min_observations
        self._num_observations = 0
        self._longest = 0
        self._moments: tuple[FloatArray, FloatArray] | None = None

    def observe(self, length: int) -> None:
        """A request finished by itself or by its limit after `length` generated tokens."""
        self._histogram *= self._fade
        length = min(length, len(self._histogram) - 1)
        self._histogram[length] += 1.0
        self._longest = max(self._longest, length)
        self._num_observations += 1
        self._moments = None

    def remaining(self, generated: NDArray[np.int32], limits: NDArray[np.int32]) -> tuple[FloatArray, FloatArray]:
        """Mean and variance of the tokens still to come after `generated` of at most `limits` tokens."""
        most = (limits - generated).astype(np.float64)
        if self._num_observations < self._min_observations:
            return most, np.zeros_like(most)
        if self._moments is None:
            self._moments = self._conditional_moments()
        total, variance = (moment[np.minimum(generated, len(moment) - 1)] for moment in self._moments)
        expected = total - generated
        known = expected > 0
        # Longer than anything seen: nothing is known about it but its own limit.
        mean = np.where(known, np.minimum(np.maximum(expected, 1.0), most), most)
        return mean, np.where(known, variance, 0.0)

    def _conditional_moments(self) -> tuple[FloatArray, FloatArray]:
        """E[L | L > g] and Var[L | L > g] for every g up to the longest seen, by suffix sums over the histogram."""
        histogram = self._histogram[: self._longest + 1]
        lengths = np.arange(len(histogram), dtype=np.float64)

        def tail(values: FloatArray) -> FloatArray:
            return np.append(np.cumsum(values[::-1])[::-1][1:], 0.0)

        weight = tail(histogram)
        seen = np.maximum(weight, 1e-12)
        mean = tail(histogram * lengths) / seen
        square = tail(histogram * lengths**2) / seen
        unknown = weight < 1e-9
        return np.where(unknown, 0.0, mean), np.where(unknown, 0.0, np.maximum(square - mean**2, 0.0))
