"""Intervals: what a mean over independent units allows to be said."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minisupernet.errors import ResultError

__all__ = ["RESAMPLES", "Interval", "difference", "interval", "paired"]

RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean over `n` values with its 95 % interval from `low` to `high`."""

    mean: float
    low: float
    high: float
    n: int

    def percent(self) -> str:
        """As in a table, in percent: "84.1 (80.3 to 87.6)"."""
        return f"{100 * self.mean:.1f} ({100 * self.low:.1f} to {100 * self.high:.1f})"


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % percentile-bootstrap interval of independent values, such as one
    accuracy a held-out task.

    10,000 resamples of the values, with a fixed seed, so that a recorded table is drawn
    the same way every time.

    Raises:
        ResultError: for fewer than two values, or one that is not a finite number.
    """
    numbers = np.asarray(list(values), dtype=np.float64)
    if len(numbers) < 2 or not np.isfinite(numbers).all():
        raise ResultError(
            f"an interval needs at least two finite values, got {numbers.tolist()[:5]}."
        )
    picks = np.random.default_rng(0).integers(
        len(numbers), size=(RESAMPLES, len(numbers))
    )
    low, high = np.quantile(numbers[picks].mean(axis=1), [0.025, 0.975])
    return Interval(float(numbers.mean()), float(low), float(high), len(numbers))


def paired(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The mean difference, first minus second, over the same tasks, with its 95 %
    interval.

    Raises:
        ResultError: where the two are not of one length.
    """
    if len(first) != len(second):
        raise ResultError(
            f"a paired difference needs the same tasks on both sides, got {len(first)}"
            f" and {len(second)}."
        )
    return interval([a - b for a, b in zip(first, second, strict=True)])


def difference(first: dict[int, float], second: dict[int, float]) -> Interval:
    """The paired difference of two arms over the tasks that both measured."""
    both = sorted(first.keys() & second.keys())
    return paired([first[task] for task in both], [second[task] for task in both])
