"""The one rule by which an arm gets its learning rate, or whatever else is chosen.

Every arm tries as many candidates on validation images, and where the best lies at the
edge of what was tried, one more is tried beyond it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from minisupernet.course.records import once

__all__ = ["Choice", "best_rate", "best_rate_once"]

Result = TypeVar("Result")


class Choice(NamedTuple):
    """The best candidate, what its trial returned, and all that were `tried`."""

    rate: float
    result: object
    tried: list[dict[str, float]]


def best_rate(
    rates: Sequence[float],
    trial: Callable[[float], tuple[float, Result]],
    most: int | None = None,
) -> Choice:
    """Try each rate and keep the one of the highest validation value, the first of
    equals.

    Args:
        rates: rising, the same factor apart where `most` is given.
        trial: a rate to its validation value, more being better, and its result.
        most: candidates at most when the best lies at the edge; None adds none.
    """
    found: dict[float, tuple[float, Result]] = {rate: trial(rate) for rate in rates}
    factor = rates[1] / rates[0] if most else 0.0
    while most and len(found) < most:
        low, high, best = min(found), max(found), _best(found)
        if best not in (low, high):
            break
        beyond = low / factor if best == low else high * factor
        found[beyond] = trial(beyond)
    tried = [{"rate": rate, "validation": found[rate][0]} for rate in sorted(found)]
    return Choice(_best(found), found[_best(found)][1], tried)


def best_rate_once(
    kept: Path | None,
    rates: Sequence[float],
    trial: Callable[[float], float],
    most: int | None = None,
) -> dict:
    """The best rate and all that were tried, ready for JSON; kept in a file, so that a
    unit that is killed does not choose again.

    Args:
        kept: the file; None keeps nothing. `rates`, `most`: as `best_rate` takes them.
        trial: a rate to its validation value, more being better.
    """

    def choose() -> dict:
        rate, _, tried = best_rate(rates, lambda each: (trial(each), None), most)
        return {"rate": rate, "tried": tried}

    return once(kept, "rate", choose)


def _best(found: dict[float, tuple[float, Result]]) -> float:
    return max(found, key=lambda rate: found[rate][0])
