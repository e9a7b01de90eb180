"""What the recorded runs of chapter 8 say: arms on episodes and pairs, accuracy over
time, and the headline.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from minisupernet.course.statistics import Interval, paired
from minisupernet.errors import ResultError

__all__ = [
    "ARM_NAMES",
    "Headline",
    "accuracy_over_time",
    "against",
    "headline",
    "on_episodes",
    "on_pairs",
]

ARM_NAMES = {
    "pudnet": "PudNet",
    "wrong_sketch": "PudNet, wrong dataset",
    "no_auxiliary": "PudNet, prototype loss only",
    "one_network": "one network",
    "untrained": "PudNet, untrained",
}


@dataclass(frozen=True)
class Headline:
    """Predicting a dataset's network against training it; all times in seconds,
    accuracies as shares.

    `match` is when training from scratch gets to the prediction's accuracy, `proper`
    the accuracy of the longest training and `proper_seconds` its time; `meta_seconds`
    the generator's own training.
    """

    seconds: float
    accuracy: float
    match: float
    proper: float
    proper_seconds: float
    meta_seconds: float

    @property
    def times_faster(self) -> float:
        """The ratio that a headline reports."""
        return self.match / self.seconds

    @property
    def datasets_to_pay(self) -> float:
        """How many datasets must be served before the generator's own training has
        paid; infinite if never.
        """
        saved = self.match - self.seconds
        return self.meta_seconds / saved if saved > 0 else math.inf


def on_episodes(runs: Sequence[dict], place: str, arm: str) -> list[float]:
    """Accuracy on the episodes of one place by one arm, a mean a seed: episodes of one
    seed share a generator, which is the unit.

    Raises:
        ResultError: for a place or an arm that was not recorded.
    """
    if not all(
        place in run["episodes"] and arm in run["episodes"][place] for run in runs
    ):
        raise ResultError(f"no recorded run has the arm '{arm}' at '{place}'.")
    return [fmean(run["episodes"][place][arm]) for run in runs]


def against(runs: Sequence[dict], place: str, first: str, second: str) -> Interval:
    """The difference in accuracy, first arm minus second, paired by seed, whose arms
    met the same episodes."""
    return paired(on_episodes(runs, place, first), on_episodes(runs, place, second))


def on_pairs(runs: Sequence[dict], arm: str) -> dict[tuple[int, int], float]:
    """Accuracy of an arm's two-class networks on held-out pairs, a mean a seed, whose
    pairs are those of the fold of the same number: {(fold, seed): accuracy}.
    """
    return {(run["seed"], run["seed"]): fmean(run["pairs"][arm]) for run in runs}


def accuracy_over_time(
    runs: Sequence[dict], start: str
) -> tuple[list[float], list[float]]:
    """Mean seconds and mean accuracy after each length of training from one start, over
    all seeds and datasets.
    """
    lengths = list(
        zip(*(run["datasets"]["fits"][start]["curve"] for run in runs), strict=True)
    )
    seconds = [fmean(each["seconds"] for each in length) for length in lengths]
    return seconds, [
        fmean(value for each in length for value in each["accuracy"])
        for length in lengths
    ]


def headline(runs: Sequence[dict], arm: str, shown: str = "predicted") -> Headline:
    """The headline of "pudnet", "one_network" or "untrained", on the datasets of five
    unseen classes.

    Predictions are made from all training images of a dataset, or with `shown` "few"
    from a few of each class. `match` is interpolated in the logarithm of seconds
    between two lengths of training; where the shortest is already as good it is that
    one's time, an upper bound, and where none is, infinite.
    """
    made = [run["datasets"][shown][arm] for run in runs]
    accuracy = fmean(value for each in made for value in each["accuracy"])
    seconds, reached = accuracy_over_time(runs, "scratch")
    meta = [run["training"].get(arm, {"seconds": 0.0})["seconds"] for run in runs]
    match = _time_to(accuracy, seconds, reached)
    return Headline(
        fmean(e["seconds"] for e in made),
        accuracy,
        match,
        reached[-1],
        seconds[-1],
        fmean(meta),
    )


def _time_to(goal: float, seconds: list[float], reached: list[float]) -> float:
    after = next((n for n, value in enumerate(reached) if value >= goal), None)
    if after is None:
        return math.inf
    if after == 0:
        return seconds[0]
    before = after - 1
    part = (goal - reached[before]) / (reached[after] - reached[before])
    return math.exp(
        (1 - part) * math.log(seconds[before]) + part * math.log(seconds[after])
    )
