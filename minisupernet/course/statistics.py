"""Intervals: what a mean over independent units allows to be said.

A unit is what would be drawn anew if the study were done again: a generator with its
own seed and fold, not one of the tasks, images or episodes that it is measured on.
Those are averaged within their unit.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minisupernet.errors import ResultError

__all__ = [
    "FEWEST",
    "Interval",
    "difference",
    "interval",
    "paired",
    "student",
    "verdict",
]

FEWEST = 3  # units; fewer say too little of how much units differ


@dataclass(frozen=True)
class Interval:
    """A mean over `n` values with its 95 % interval from `low` to `high`, which is
    without ends where n is below three."""

    mean: float
    low: float
    high: float
    n: int

    def percent(self) -> str:
        """As in a table, in percent: "84.1 (80.3 to 87.6)"."""
        if self.n < FEWEST:
            return f"{100 * self.mean:z.1f} (n = {self.n}: no interval)"
        ends = f"{100 * self.low:z.1f} to {100 * self.high:z.1f}"
        return f"{100 * self.mean:z.1f} ({ends})"


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of independent units: mean ± t s / sqrt(n), with Student's
    t (1908) of n - 1 degrees of freedom.

    Raises:
        ResultError: for no values, or one that is not a finite number.
    """
    numbers = np.asarray(list(values), dtype=np.float64)
    if not len(numbers) or not np.isfinite(numbers).all():
        raise ResultError(
            f"an interval needs finite values, got {numbers.tolist()[:5]}."
        )
    n, mean, half = len(numbers), float(numbers.mean()), math.inf
    if n >= FEWEST:
        half = student(n - 1) * float(numbers.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The mean difference, first minus second, over the same units, with its 95 %
    interval.

    Raises:
        ResultError: where the two are not of one length.
    """
    if len(first) != len(second):
        raise ResultError(
            f"a paired difference needs the same units on both sides, got {len(first)}"
            f" and {len(second)}."
        )
    return interval([a - b for a, b in zip(first, second, strict=True)])


def difference(first: Mapping[tuple, float], second: Mapping[tuple, float]) -> Interval:
    """The paired difference of two arms over the units that both measured, such as
    {(fold, seed): accuracy}."""
    both = sorted(first.keys() & second.keys())
    return paired([first[unit] for unit in both], [second[unit] for unit in both])


def verdict(found: Interval) -> str:
    """What the interval of a difference allows to be said: "higher", "lower", "not told
    apart", or of fewer than three units "no verdict".

    Where there is no difference it is wrong one time in twenty.
    """
    if found.n < FEWEST:
        return "no verdict"
    if found.low > 0:
        return "higher"
    return "lower" if found.high < 0 else "not told apart"


@functools.cache
def student(freedom: int) -> float:
    """How far from 0 Student's t of so many degrees of freedom is with a chance of
    5 %: 12.7 for 1, 2.78 for 4, towards 1.96."""
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _within(middle, freedom) > 0.95 else (middle, high)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """The chance that Student's t lies between -t and t: Abramowitz and Stegun (1964),
    equations 26.7.3 and 26.7.4."""
    angle, odd = math.atan(t / math.sqrt(freedom)), freedom % 2
    square, term = math.cos(angle) ** 2, math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= square * (k - 1) / k
        total += term
    inside = math.sin(angle) * total
    return 2 / math.pi * (angle + inside) if odd else inside
