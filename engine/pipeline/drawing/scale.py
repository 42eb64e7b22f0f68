"""`ticks`: where the marks of a time axis lie, at round numbers."""

import math


def ticks(seconds: float, most: int) -> tuple[float, ...]:
    """Multiples of 1, 2 or 5 times a power of ten from nothing to `seconds`: at most `most` after the first."""
    if seconds <= 0 or most < 1:
        return (0.0,)
    power = 10.0 ** math.floor(math.log10(seconds / most))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if seconds / (factor * power) <= most)
    return tuple(number * step for number in range(int(seconds / step * (1 + 1e-12)) + 1))


def milliseconds(seconds: float) -> str:
    """Without digits that say nothing: "0.25"."""
    return f"{1e3 * seconds:.6g}"
