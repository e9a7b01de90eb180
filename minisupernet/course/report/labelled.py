"""What the recorded runs of chapter 9 say: one look at labelled examples beside its
controls, its opponents, and z fitted through the same generator."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from minisupernet.course.plots import COLOURS, new_figure, table
from minisupernet.course.records import load_runs, results_file
from minisupernet.course.report.opponents import lead, reached
from minisupernet.course.statistics import FEWEST, Interval, interval, verdict
from minisupernet.errors import ResultError

if TYPE_CHECKING:
    from IPython.display import Markdown
    from matplotlib.figure import Figure

__all__ = [
    "LOOK_NAMES",
    "arms_of_looks",
    "examples_figure",
    "look_leads_table",
    "looks_table",
    "read_looks",
]

SIZES = (1, 5, 10, 20, 50)  # examples of a class
LOOK_NAMES = {
    "look": "one look",
    "look_fitted": "one look, then z fitted",
    "z_only": "z fitted from the mean z",
    "z_prior": "z fitted under a prior",
    "protonet": "ProtoNet, the same encoder",
    "nearest_vector": "the encoder alone, nearest class vector",
    "nearest_mean": "nearest class mean on one shared network",
    "head": "a head on one shared network",
    "other_task": "one look at another task's examples",
    "shuffled": "one look, labels shuffled",
    "untrained": "one look, generator untrained",
}
FROM_OPPONENTS = ("head", "nearest_mean")  # arms of `07_opponents.json` set beside them
DRAWN = ("look", "protonet", "head", "z_only", "shuffled")
LEADS = (
    ("look", "protonet"),
    ("look", "nearest_vector"),
    ("look", "head"),
    ("look", "z_only"),
    ("look_fitted", "look"),
    ("look_fitted", "z_only"),
    ("look_fitted", "z_prior"),
    ("look", "other_task"),
    ("look", "shuffled"),
)


def read_looks() -> list[dict]:
    """The recorded units of chapter 9 and, on the same folds, the heads of chapter 7's
    opponents.

    Raises:
        ResultError: where nothing is recorded.
    """
    runs = load_runs(results_file("09_labelled.json"))
    return arms_of_looks(runs, load_runs(results_file("07_opponents.json")))


def arms_of_looks(runs: Sequence[dict], opponents: Sequence[dict]) -> list[dict]:
    """The units of chapter 9, and those of the opponents with nothing in them but what
    is set beside a look."""
    asked = {(run["of_experiment"], run["fold"], run["seed"]) for run in runs}
    beside = []
    for run in opponents:
        few = {
            size: {arm: arms[arm] for arm in FROM_OPPONENTS if arm in arms}
            for size, arms in run["few"].items()
        }
        if (run["of_experiment"], run["fold"], run["seed"]) in asked:
            beside.append({**run, "few": few})
    return [*runs, *beside]


def looks_table(runs: Sequence[dict], experiment: int) -> "Markdown":
    """Mean test accuracy of every arm at every number of examples, with half the width
    of its 95 % interval over folds."""
    rows = []
    for arm, words in LOOK_NAMES.items():
        cells = [_cell(runs, experiment, arm, size) for size in SIZES]
        if set(cells) != {"–"}:
            rows.append([words, *cells])
    return table(["test accuracy in %, examples of a class:", *map(str, SIZES)], rows)


def _cell(runs: Sequence[dict], experiment: int, arm: str, size: int) -> str:
    found = _reached(runs, experiment, arm, size)
    if found is None:
        return "–"
    if found.n < FEWEST:
        return found.percent()
    return f"{100 * found.mean:.1f} ± {50 * (found.high - found.low):.1f}"


def _reached(
    runs: Sequence[dict], experiment: int, arm: str, size: int
) -> Interval | None:
    try:
        return interval(list(reached(runs, experiment, arm, size).values()))
    except ResultError:  # this arm was not measured with so many examples
        return None


def look_leads_table(
    runs: Sequence[dict], experiment: int, sizes: Sequence[int] = (1, 5, 20)
) -> "Markdown":
    """One arm minus another in points, paired by fold, and the verdict."""
    rows = []
    for first, second in LEADS:
        cells = []
        for size in sizes:
            try:
                found = lead(runs, experiment, first, second, size)
            except ResultError:
                cells.append("–")
            else:
                cells.append(f"{found.percent()}: {verdict(found)}")
        if set(cells) != {"–"}:
            rows.append([f"{LOOK_NAMES[first]} − {LOOK_NAMES[second]}", *cells])
    return table(["points, examples of a class:", *map(str, sizes)], rows)


def examples_figure(runs: Sequence[dict], experiment: int) -> "Figure":
    """Accuracy against the number of examples: means over folds, and 95 % intervals
    where there are three or more."""
    figure, axes = new_figure(height=3.4)
    for arm, colour in zip(DRAWN, COLOURS, strict=False):
        found = {size: _reached(runs, experiment, arm, size) for size in SIZES}
        found = {size: each for size, each in found.items() if each is not None}
        means = [100 * each.mean for each in found.values()]
        axes.plot(list(found), means, marker="o", color=colour, label=LOOK_NAMES[arm])
        for size, each in found.items():
            if each.n >= FEWEST:
                axes.plot([size] * 2, [100 * each.low, 100 * each.high], color=colour)
    axes.set(xscale="log", xticks=SIZES, xticklabels=SIZES)
    axes.minorticks_off()
    axes.set(xlabel="examples of a class", ylabel="test accuracy (%)")
    axes.legend(fontsize=8)
    return figure
