"""`CostLaw`: the seconds of one operation for any number of tokens and any context, from a few measured samples.

Time grows with the tokens in pieces that are nearly straight (tiles, waves, caches), so between samples it is
interpolated linearly and beyond them the outer piece is prolonged. Attention grows with the context as well, in
proportion for a fixed number of tokens: a curve over the tokens per measured context, and a straight line between
curves. Where the samples form no such grid, fixed + a * tokens + b * tokens * context is fitted instead.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class LawSample:
    """`tokens` of the kind that the operation computes, each attending to `context` tokens on average."""

    tokens: float
    context: float
    seconds: float


class CostLaw(Protocol):
    """No tokens cost nothing; nothing costs less than nothing."""

    def seconds(self, tokens: float, context: float) -> float:
        """Predicted time for so many tokens with this mean context."""
        ...


def fit_law(samples: Sequence[LawSample], depends_on_context: bool) -> CostLaw:
    """The law of one operation; `samples` has at least one. Several at one point count as their mean.

    With one sample the time is in proportion to the work; with one context, to the tokens times the context.
    """
    contexts = sorted({sample.context for sample in samples})
    if not depends_on_context or contexts == [0.0]:
        return _TokensLaw(_Curve.of((sample.tokens, sample.seconds) for sample in samples))
    if len(contexts) == 1:
        return _TotalContextLaw(_Curve.of((sample.tokens * sample.context, sample.seconds) for sample in samples))
    curves = tuple(
        _Curve.of((sample.tokens, sample.seconds) for sample in samples if sample.context == context)
        for context in contexts
    )
    if all(len(curve.points) > 1 for curve in curves):
        return _GridLaw(tuple(contexts), curves)
    return _FittedLaw.of(samples)


@dataclass(frozen=True, slots=True)
class _Curve:
    """Seconds over an amount of work, through points of ascending work; more work takes no less time."""

    points: tuple[float, ...]
    values: tuple[float, ...]

    @classmethod
    def of(cls, pairs: Iterable[tuple[float, float]]) -> "_Curve":
        at_point: dict[float, list[float]] = {}
        for point, value in pairs:
            at_point.setdefault(point, []).append(value)
        points = sorted(at_point)
        return cls(tuple(points), _ascending([sum(at_point[point]) / len(at_point[point]) for point in points]))

    def at(self, point: float) -> float:
        if point <= 0:
            return 0.0
        if len(self.points) == 1:
            return self.values[0] * point / self.points[0]
        return _along(self.points, self.values, point)


def _ascending(values: Sequence[float]) -> tuple[float, ...]:
    """Neighbours that fall, which is noise, are both replaced by their mean (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            other, others = pools.pop()
            mean, count = (mean * count + other * others) / (count + others), count + others
        pools.append((mean, count))
    return tuple(mean for mean, count in pools for _ in range(count))


def _along(points: Sequence[float], values: Sequence[float], point: float) -> float:
    """Linear between the points; beyond them along the outer piece, which noise must not make fall, nor below zero."""
    index = min(max(bisect_right(points, point) - 1, 0), len(points) - 2)
    slope = (values[index + 1] - values[index]) / (points[index + 1] - points[index])
    if point > points[-1]:
        return values[-1] + max(0.0, slope) * (point - points[-1])
    if point < points[0]:
        return max(0.0, values[0] - max(0.0, slope) * (points[0] - point))
    return values[index] + slope * (point - points[index])


@dataclass(frozen=True, slots=True)
class _TokensLaw:
    curve: _Curve

    def seconds(self, tokens: float, context: float) -> float:
        return self.curve.at(tokens)


@dataclass(frozen=True, slots=True)
class _TotalContextLaw:
    curve: _Curve

    def seconds(self, tokens: float, context: float) -> float:
        return self.curve.at(tokens * context)


@dataclass(frozen=True, slots=True)
class _GridLaw:
    contexts: tuple[float, ...]
    curves: tuple[_Curve, ...]

    def seconds(self, tokens: float, context: float) -> float:
        if tokens <= 0:
            return 0.0
        return _along(self.contexts, [curve.at(tokens) for curve in self.curves], context)


@dataclass(frozen=True, slots=True)
class _FittedLaw:
    fixed: float
    per_token: float
    per_context_token: float

    @classmethod
    def of(cls, samples: Sequence[LawSample]) -> "_FittedLaw":
        """Least squares of the relative error with no coefficient below zero."""
        rows = np.array([(1.0, sample.tokens, sample.tokens * sample.context) for sample in samples])
        seconds = np.array([sample.seconds for sample in samples])
        weights = 1.0 / np.maximum(seconds, seconds.max() * 1e-3 or 1.0)
        fixed, per_token, per_context_token = _nonnegative_least_squares(rows * weights[:, None], seconds * weights)
        return cls(float(fixed), float(per_token), float(per_context_token))

    def seconds(self, tokens: float, context: float) -> float:
        if tokens <= 0:
            return 0.0
        return self.fixed + tokens * (self.per_token + self.per_context_token * context)


def _nonnegative_least_squares(rows: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exact for a few columns: the best solution has some columns at zero and solves the rest freely."""
    num_columns = rows.shape[1]
    best, best_error = np.zeros(num_columns), float(np.square(wanted).sum())
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-300)
    for count in range(1, num_columns + 1):
        for columns in map(list, combinations(range(num_columns), count)):
            part = np.linalg.lstsq(rows[:, columns] / scale[columns], wanted, rcond=None)[0] / scale[columns]
            error = float(np.square(rows[:, columns] @ part - wanted).sum())
            if (part >= 0).all() and error < best_error:
                best, best_error = np.zeros(num_columns), error
                best[columns] = part
    return best
