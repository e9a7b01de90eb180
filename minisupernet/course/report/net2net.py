"""Chapter 2's pictures of copied matrices, and the tables and curves of its recorded
runs.

A seed, with its own teacher and its own batches, is the unit of every interval.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minisupernet.course.plots import COLOURS, new_figure, table
from minisupernet.course.statistics import interval, paired, verdict

if TYPE_CHECKING:
    from IPython.display import Markdown
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "accuracy_table",
    "choose",
    "chosen_schedules",
    "computation_table",
    "cost_to_reach",
    "differences_table",
    "matrices",
    "recorded_curves",
    "schedules_table",
    "settings_table",
    "final_accuracy",
]

SCHEDULES = ("early", "late")
PHASES = {"wider": "wider", "deeper_8": "to 8 layers", "deeper_20": "to 20 layers"}
ARMS = {
    "teacher": "teacher goes on",
    "net2net": "Net2Net",
    "noisy": "much noise",
    "random": "random",
    "zero": "random, outgoing 0",
    "scratch": "from scratch",
}
PAIRS = (
    ("net2net", "teacher"),
    ("net2net", "random"),
    ("net2net", "zero"),
    ("noisy", "net2net"),
    ("scratch", "random"),
    ("scratch", "zero"),
    ("scratch", "net2net"),
)


def matrices(maker: Tensor, reader: Tensor, source: Tensor, share: Tensor) -> "Figure":
    """A widening drawn: the matrix that makes units (units, inputs) and the one that
    reads them (outputs, units), before and after.

    Each old unit has its own colour, which its copies keep.

    Args:
        source: the old unit that each new one copies, (width,).
        share: what each passes on of the old unit's contribution, (width,).
    """
    figure, axes = new_figure(2, 2, width=6.0, height=4.8)
    units = torch.arange(len(maker))
    wide = maker[source], reader[:, source] * share
    for row, (old, new, axis, name) in enumerate(
        ((maker, wide[0], 0, "W"), (reader, wide[1], 1, "V"))
    ):
        _matrix(axes[row, 0], old, units, axis, f"${name}$")
        _matrix(axes[row, 1], new, source, axis, f"${name}'$")
    return figure


def _matrix(
    axes: "Axes", values: Tensor, source: Tensor, axis: int, title: str
) -> None:
    """One matrix with its numbers, each row or column in the colour of its old unit."""
    from matplotlib.colors import to_rgb

    light = torch.tensor([to_rgb(colour) for colour in COLOURS]) * 0.45 + 0.55
    colours = light[source]  # (units, 3)
    shape = (-1, 1, 3) if axis == 0 else (1, -1, 3)
    axes.imshow(colours.view(shape).expand(*values.shape, 3).numpy(), aspect="auto")
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=9)
    names = [f"unit {unit}" for unit in source.tolist()]
    axes.set_title(title)
    if axis == 0:
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.set_xticks([])
    else:
        axes.set_xticks(range(len(names)), source.tolist(), fontsize=9)
        axes.set_yticks([])
        axes.set_xlabel("unit")
    rows, columns = values.shape
    axes.set_xticks([edge - 0.5 for edge in range(1, columns)], minor=True)
    axes.set_yticks([edge - 0.5 for edge in range(1, rows)], minor=True)
    axes.grid(False, which="major")
    axes.grid(True, which="minor", color="white", linewidth=2, alpha=1)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0)


def choose(arm: dict) -> str:
    """The schedule of an arm that is better on validation images."""
    return max(SCHEDULES, key=lambda schedule: arm[schedule]["validation"])


def cost_to_reach(curve: Sequence[dict], accuracy: float) -> float | None:
    """The floating-point operations after which a curve first reached an accuracy; None
    where it never did."""
    return next((row["flops"] for row in curve if row["test"] >= accuracy), None)


def final_accuracy(runs: Sequence[dict], phase: str, arm: str) -> list[float]:
    """What an arm reached on all test images, a value a seed, under the schedule that
    validation images chose for it."""
    return [_chosen(run, phase, arm)["test"] for run in runs]


def chosen_schedules(runs: Sequence[dict]) -> list[str]:
    """The schedule that validation images chose, for every seed, phase and arm."""
    return [
        choose(found)
        for run in runs
        for phase in run["phases"].values()
        for found in phase.values()
    ]


def _chosen(run: dict, phase: str, arm: str) -> dict:
    found = run["phases"][phase][arm]
    return found[choose(found)]


def _arms(runs: Sequence[dict], phase: str) -> list[str]:
    return [arm for arm in ARMS if arm in runs[0]["phases"][phase]]


def settings_table(runs: Sequence[dict]) -> "Markdown":
    """What was run, and what it took."""
    used = runs[0]["settings"]
    minutes = fmean(run["seconds"] for run in runs) / 60
    rows = {
        "seeds": len(runs),
        "steps before growth, and after": f"{used['first']}, {used['second']}",
        "learning rate, momentum": f"{used['rate']}, {used['momentum']}",
        "images a step": used["batch"],
        "minutes a seed": f"{minutes:.0f}",
        "run on": runs[0]["device"],
    }
    return table(["the recorded runs", "value"], [*rows.items()])


def accuracy_table(runs: Sequence[dict]) -> "Markdown":
    """Final test accuracy of every arm with its interval over seeds, what it cost, its
    teacher's cost included, and its size."""
    rows, before = [], None
    for phase, label in PHASES.items():
        for arm in _arms(runs, phase):
            found = final_accuracy(runs, phase, arm)
            again = arm == "teacher" and found == before
            every = [_chosen(run, phase, arm) for run in runs]
            rows.append(
                [
                    label,
                    ARMS[arm] + " (the row above)" * again,
                    interval(found).percent(),
                    f"{fmean(each['flops'] for each in every) / 1e12:.2f}",
                    f"{every[0]['parameters']:,}",
                ]
            )
            before = found
    return table(
        [
            "phase",
            "arm",
            "test accuracy, % (95 % interval)",
            "10¹² operations",
            "weights",
        ],
        rows,
    )


def differences_table(runs: Sequence[dict]) -> "Markdown":
    """The differences in test accuracy that decide, paired by seed, and what their
    intervals allow to be said."""
    rows = []
    for phase, label in PHASES.items():
        for first, second in PAIRS:
            if {first, second} <= {*_arms(runs, phase)}:
                found = paired(
                    *(final_accuracy(runs, phase, arm) for arm in (first, second))
                )
                words = f"{ARMS[first]} − {ARMS[second]}"
                rows.append([label, words, found.percent(), verdict(found)])
    header = ["phase", "difference in points", "mean (95 % interval)", "the first is"]
    return table(header, rows)


def schedules_table(runs: Sequence[dict]) -> "Markdown":
    """What the early fall of the rate gave against the late one, for every arm; the
    teacher of a later phase is the reference of the one before it."""
    rows = []
    for phase, label in PHASES.items():
        for arm in _arms(runs, phase)[phase != "wider" :]:
            early, late = (
                [run["phases"][phase][arm][schedule]["test"] for run in runs]
                for schedule in SCHEDULES
            )
            found = paired(early, late)
            means = [f"{100 * fmean(each):.1f}" for each in (early, late)]
            rows.append([label, ARMS[arm], *means, found.percent(), verdict(found)])
    header = ["phase", "arm", "early, %", "late, %", "early − late (95 % interval)"]
    return table([*header, "early is"], rows)


def computation_table(runs: Sequence[dict]) -> "Markdown":
    """When each arm first reached what its teacher reached by going on, and what the
    network from scratch reached, in percent of the computation from scratch."""
    rows = []
    for phase, label in PHASES.items():
        for arm in _arms(runs, phase):
            if arm != "teacher":
                shares = [
                    ", ".join(_share(run, phase, arm, goal) for run in runs)
                    for goal in ("teacher", "scratch")
                ]
                rows.append([label, ARMS[arm], *shares])
    goals = (f"{ARMS[goal]}: reached after, %" for goal in ("teacher", "scratch"))
    return table(["phase", "arm", *goals], rows)


def _share(run: dict, phase: str, arm: str, goal: str) -> str:
    """The computation after which one seed's curve first reached the goal's end."""
    curve = _chosen(run, phase, arm)["curve"]
    if arm != "scratch":  # only what the larger network did counts
        steps = [row["step"] for row in curve]
        first = run["settings"]["first"]
        curve = curve[len(steps) - 1 - steps[::-1].index(first) :]
    end = _chosen(run, phase, goal)["curve"][-1]["test"]
    cost = cost_to_reach(curve, end)
    whole = _chosen(run, phase, "scratch")["flops"]
    return "–" if cost is None else f"{100 * cost / whole:.0f}"


def recorded_curves(runs: Sequence[dict]) -> "Figure":
    """Accuracy against computation, a panel a phase: a thin line a seed, a thick one
    their mean."""
    figure, panels = new_figure(3, 1, width=6.0, height=9.5)
    for axes, (phase, label) in zip(panels, PHASES.items(), strict=True):
        for arm in _arms(runs, phase):
            colour = COLOURS[[*ARMS].index(arm)]
            curves = [_chosen(run, phase, arm)["curve"] for run in runs]
            cost = [row["flops"] / 1e12 for row in curves[0]]
            heights = [[100 * row["test"] for row in curve] for curve in curves]
            for height in heights:
                axes.plot(cost, height, color=colour, linewidth=0.6, alpha=0.4)
            mean = [fmean(at) for at in zip(*heights, strict=True)]
            named = ARMS[arm] if phase == "wider" else None
            axes.plot(cost, mean, color=colour, linewidth=2, label=named)
        axes.set(title=label, ylabel="test accuracy (%)")
    panels[-1].set_xlabel("computation, 10¹² operations")
    figure.legend(loc="outside upper center", ncols=3)
    return figure
