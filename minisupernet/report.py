"""Tables and figures of the recorded experiments, drawn from the runs in `results/` and from nothing else."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from minisupernet.plots import ladder, table
from minisupernet.results import Interval, ResultError, difference, interval, task_means

if TYPE_CHECKING:
    from IPython.display import Markdown
    from matplotlib.figure import Figure

__all__ = ["ARM_NAMES", "arms_table", "compare", "cost_table", "differences_table", "recorded_ladder", "verdict"]

ARM_NAMES = {
    "z_only": "z only, generator frozen",
    "random_generator": "z only, random generator",
    "no_adaptation": "no adaptation",
    "from_scratch": "from scratch",
    "fine_tuned": "fine-tuned",
    "unfrozen": "z and generator, as coded",
    "right_z": "trained tasks, right z",
    "wrong_z": "trained tasks, wrong z",
}
SETUPS = ("original", "better")


def compare(runs: Sequence[dict], setup: str, first: str, second: str) -> Interval:
    """The paired difference in test accuracy, first arm minus second, over the tasks that both measured."""
    return difference(task_means(runs, setup, first), task_means(runs, setup, second))


def verdict(found: Interval) -> str:
    """What the interval of a difference allows to be said: "higher", "lower" or "not told apart"."""
    return "higher" if found.low > 0 else "lower" if found.high < 0 else "not told apart"


def cost_table(runs: Sequence[dict]) -> "Markdown":
    """What was run: for each set-up its seeds, held-out tasks, sizes, time and machine."""
    rows = []
    for name in SETUPS:
        mine = [run for run in runs if run["setup"] == name]
        tasks = {task for run in mine for task in run["held_out"]}
        minutes = sum(run["seconds"] for run in mine) / len(mine) / 60
        size = mine[0]["parameters"]
        devices = ", ".join(sorted({run["device"] for run in mine}))
        rows.append([name, len(mine), len(tasks), size["z"], f"{size['generator']:,}", f"{minutes:.0f}", devices])
    return table(
        ["set-up", "seeds", "held-out tasks", "numbers in z", "in the generator", "minutes a seed", "run on"], rows
    )


def arms_table(runs: Sequence[dict]) -> "Markdown":
    """Mean test accuracy of every arm with its 95 % interval over tasks, for both set-ups."""
    rows = [[label, *(_cell(runs, setup, arm) for setup in SETUPS)] for arm, label in ARM_NAMES.items()]
    return table(["test accuracy in %, mean (95 % interval)", "original set-up", "better generator"], rows)


def _cell(runs: Sequence[dict], setup: str, arm: str) -> str:
    try:
        found = interval(list(task_means(runs, setup, arm).values()))
    except ResultError:
        return "not run"
    return f"{found.percent()}, n\u00a0=\u00a0{found.n}"


def differences_table(runs: Sequence[dict]) -> "Markdown":
    """What z alone reaches against each control, paired by task; and the right z against the wrong one."""
    controls = ("random_generator", "no_adaptation", "from_scratch", "fine_tuned")
    rows = []
    for setup in SETUPS:
        for first, second in [*(("z_only", arm) for arm in controls), ("right_z", "wrong_z")]:
            found = compare(runs, setup, first, second)
            words = f"{ARM_NAMES[first]} − {ARM_NAMES[second]}"
            rows.append([setup, words, found.percent(), found.n, verdict(found)])
    return table(["set-up", "difference in points", "mean (95 % interval)", "tasks", "the first is"], rows)


def recorded_ladder(runs: Sequence[dict], setup: str) -> "Figure":
    """The ladder of one set-up: every held-out task, means and intervals."""
    order = ("z_only", "random_generator", "no_adaptation", "from_scratch", "fine_tuned")
    values = {ARM_NAMES[arm]: list(task_means(runs, setup, arm).values()) for arm in order}
    data = " and ".join(sorted({run["data"]["name"].upper().replace("CIFAR", "CIFAR-") for run in runs}))
    return ladder(values, f"test accuracy (%), {setup} set-up, {data}")
