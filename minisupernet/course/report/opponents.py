"""Tables and figures of the recorded opponents of z: one shared network with a head for
each task, and ordinary training that is long enough."""

import re
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from minisupernet.course.plots import COLOURS, new_figure, table
from minisupernet.course.statistics import FEWEST, Interval, interval, verdict
from minisupernet.errors import ResultError
from minisupernet.target import TaskClassifier, WeightSpec

if TYPE_CHECKING:
    from IPython.display import Markdown
    from matplotlib.figure import Figure

__all__ = [
    "OPPONENT_NAMES",
    "by_chance",
    "lead",
    "leads_figure",
    "leads_table",
    "opponents_figure",
    "opponents_table",
    "reached",
    "sizes_figure",
    "target_sizes_table",
    "with_experiment",
]

OWN = {  # arms of an experiment's own runs, under names of their own here
    "z_only": "z_recorded",
    "fine_tuned": "fine_tuned_recorded",
    "from_scratch": "scratch_recorded",
}
UNADAPTED = "no_adaptation"  # the same whatever the number of images
OPPONENT_NAMES = {
    "z_recorded": "z only, this chapter's runs",
    "z_only": "z only, fitted anew",
    "z_prior": "z with a prior",
    "begun_z": "z, generator begun from the one network",
    "begun_z_prior": "the same, z with a prior",
    UNADAPTED: "nothing fitted: the mean z",
    "head": "head on one network",
    "head_32": "head on 32 directions of it",
    "nearest_mean": "nearest class mean on it",
    "question_head": "head on one trained by questions",
    "question_head_32": "head on 32 directions of that",
    "question_nearest_mean": "nearest class mean on that",
    "protonet": "nearest mean, by episodes",
    "biases": "its biases and the head",
    "lora": "rank one and the head",
    "trunk_fine_tuned": "all of it, fine-tuned",
    "fine_tuned_recorded": "fine-tuned, this chapter's runs",
    "scratch_recorded": "from scratch, this chapter's runs",
    **{
        f"{arm}_{steps}": f"{words}, {steps:,} steps"
        for arm, words in (
            ("scratch", "from scratch"),
            ("he", "from scratch, He's start"),
            ("fine_tuned", "fine-tuned from the mean z"),
        )
        for steps in (300, 1_000, 3_000, 10_000)
    },
}
CHANNELS, STEPS = 16, 2_000  # of the target and the training of chapters 6 and 7
SIZES = (5, 10, 20, 50, 100, None)  # images of a class, None for all
ALL_IMAGES = 450
DRAWN = ("z_recorded", "head", "fine_tuned_recorded", "scratch_recorded")
ENDS = re.compile(r"\(-?[\d.]+ to -?[\d.]+\)")  # of an interval, as a table has them


def with_experiment(
    opponents: Sequence[dict], runs: Sequence[dict], setup: str
) -> list[dict]:
    """The units of `07_opponents.json` and, in their form, what an experiment's own
    runs of one set-up measured: z alone, fine-tuning, and training from scratch."""
    own = [run for run in runs if run["setup"] == setup]
    return [*opponents, *(_as_unit(run) for run in own)]


def _as_unit(run: dict) -> dict:
    unadapted = {UNADAPTED: run["arms"][UNADAPTED]}
    few = {
        size: {own: arms[arm] for arm, own in OWN.items() if arm in arms} | unadapted
        for size, arms in [*run["few"].items(), ("all", run["arms"])]
    }
    return {
        "of_experiment": run["experiment"],
        "fold": run["fold"],
        "seed": run["seed"],
        "group": run["setup"],
        "channels": run["settings"].get("channels", CHANNELS),
        "steps": run["settings"]["training"]["steps"],
        "few": few,
    }


def reached(
    runs: Sequence[dict],
    experiment: int,
    arm: str,
    size: int | None = None,
    *,
    mirrored: bool = False,
    channels: int = CHANNELS,
    steps: int = STEPS,
) -> dict[tuple[int, int], float]:
    """The test accuracy of one arm on each fold, a mean over its tasks: {(fold, seed):
    accuracy}, the units of an interval.

    Args:
        runs: those of `07_opponents.json`, or more by `with_experiment`.
        size: training images of each class; None for all.
        mirrored: by the mean logit of an image and its mirror image.
        channels, steps: of the target, and of the training of generator and trunk.

    Raises:
        ResultError: where no run has it.
    """
    key, name = "test_mirrored" if mirrored else "test", str(size or "all")
    asked = (experiment, channels, steps)
    found = {
        (run["fold"], run["seed"]): fmean(run["few"][name][arm][key])
        for run in runs
        if (run["of_experiment"], run["channels"], run["steps"]) == asked
        and key in run["few"].get(name, {}).get(arm, {})
    }
    if not found:
        raise ResultError(
            f"no recorded unit of experiment {experiment} has the arm '{arm}' with"
            f" {size or 'all'} images a class, {channels} channels and {steps} steps."
        )
    return found


def lead(
    runs: Sequence[dict],
    experiment: int,
    first: str,
    second: str,
    size: int | None = None,
    **which: int | bool,
) -> Interval:
    """The difference in test accuracy, first arm minus second, paired by fold; `which`
    as `reached` takes it."""
    ours, theirs = (
        reached(runs, experiment, arm, size, **which) for arm in (first, second)
    )
    both = sorted(ours.keys() & theirs.keys())
    return interval([ours[unit] - theirs[unit] for unit in both])


def opponents_table(
    runs: Sequence[dict], experiment: int, **which: int | bool
) -> "Markdown":
    """Mean test accuracy of every arm at every number of images, with half the width of
    its 95 % interval over folds."""
    rows = []
    for arm, words in OPPONENT_NAMES.items():
        cells = [_cell(runs, experiment, arm, size, which) for size in SIZES]
        if set(cells) != {"–"}:
            rows.append([words, *cells])
    sizes = [str(size or ALL_IMAGES) for size in SIZES]
    return table(["test accuracy in %, images of a class:", *sizes], rows)


def _cell(
    runs: Sequence[dict], experiment: int, arm: str, size: int | None, which: dict
) -> str:
    try:
        found = interval(reached(runs, experiment, arm, size, **which).values())
    except ResultError:
        return "–"
    if found.n < FEWEST:
        return found.percent()
    return f"{100 * found.mean:.1f} ± {50 * (found.high - found.low):.1f}"


def leads_table(
    runs: Sequence[dict],
    experiment: int,
    ours: str = "z_recorded",
    sizes: Sequence[int | None] = (5, 20, None),
    theirs: Sequence[str] = tuple(OPPONENT_NAMES),
    **which: int | bool,
) -> "Markdown":
    """An arm minus each of the others, in points, paired by fold, and the verdict."""
    rows = []
    for arm, words in ((arm, OPPONENT_NAMES[arm]) for arm in theirs):
        found = [_lead_or_none(runs, experiment, ours, arm, s, which) for s in sizes]
        if arm != ours and any(found):
            rows.append([words, *map(_said, found)])
    header = f"{OPPONENT_NAMES[ours]} − ..., points, images of a class:"
    return table([header, *(str(size or ALL_IMAGES) for size in sizes)], rows)


def _said(found: Interval | None) -> str:
    return f"{found.percent()}: {verdict(found)}" if found else "–"


def _lead_or_none(
    runs: Sequence[dict], experiment: int, first: str, second: str, size, which: dict
) -> Interval | None:
    try:
        return lead(runs, experiment, first, second, size, **which)
    except ResultError:  # one of the two was not measured with so many images
        return None


def target_sizes_table(
    runs: Sequence[dict],
    ours: str = "z_only",
    theirs: Sequence[str] = ("head", "question_head"),
) -> "Markdown":
    """z and a head on targets of several sizes, on the pairs of experiment 2: ours
    minus each of theirs, in points, and the verdict."""
    rows = []
    for channels in _channels(runs):
        weights = WeightSpec.of(TaskClassifier(channels)).size
        for arm in theirs:
            found = [
                _lead_or_none(runs, 2, ours, arm, size, {"channels": channels})
                for size in (5, 20, None)
            ]
            if any(found):
                said = map(_said, found)
                rows.append([channels, f"{weights:,}", OPPONENT_NAMES[arm], *said])
    words = f"{OPPONENT_NAMES[ours]} − ..."
    return table(["filters", "weights", words, "5 images", "20", str(ALL_IMAGES)], rows)


def _channels(runs: Sequence[dict]) -> list[int]:
    """The sizes of targets that are recorded for experiment 2."""
    mine = [run for run in runs if run["of_experiment"] == 2 and run["steps"] == STEPS]
    return sorted({run["channels"] for run in mine})


def sizes_figure(
    runs: Sequence[dict],
    ours: str = "z_only",
    theirs: Sequence[str] = ("head", "question_head"),
    size: int | None = 20,
) -> "Figure":
    """One arm minus others in experiment 2, in points, against the number of filters
    in the target's layers, with 95 % intervals over folds.

    Args:
        size: training images of each class; None for all.
    """
    figure, axes = new_figure(width=5.5, height=3.0)
    for number, arm in enumerate(theirs):
        found = {
            channels: _lead_or_none(runs, 2, ours, arm, size, {"channels": channels})
            for channels in _channels(runs)
        }
        drawn = {c: each for c, each in found.items() if each and each.n >= FEWEST}
        places = [channels * 1.06 ** (2 * number - 1) for channels in drawn]
        means = [100 * each.mean for each in drawn.values()]
        reach = [100 * (each.high - each.mean) for each in drawn.values()]
        style = {"fmt": f"{'os'[number]}-", "color": COLOURS[number], "capsize": 3}
        axes.errorbar(places, means, reach, label=OPPONENT_NAMES[arm], **style)
    axes.axhline(0, color=COLOURS[-1], linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(_channels(runs), _channels(runs))
    axes.minorticks_off()
    axes.set(xlabel="filters in each layer of the network", ylabel="z − it (points)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=1)
    return figure


def by_chance(*tables: "Markdown") -> str:
    """How many intervals of a difference these tables hold, and how many of them would
    leave 0 out by chance alone, in one sentence."""
    count = sum(len(ENDS.findall(each.data)) for each in tables)
    said = f"about {count / 20:.0f} would still be called higher or lower."
    if 0 < count < 20:
        said = f"about one such table in {20 / count:.0f} would still call one so."
    return (
        f"{count} differences are judged here, each at 95 %. If there were none at all,"
        f" {said}"
    )


def opponents_figure(runs: Sequence[dict], experiment: int) -> "Figure":
    """Test accuracy against the number of images of each class, for z, a head on one
    network and all weights, with 95 % bands over folds; the dashed line is what the
    mean z reaches with nothing fitted.

    Args:
        runs: made by `with_experiment`.
    """
    figure, axes = new_figure(width=5.5, height=3.4)
    for arm, colour in zip(DRAWN, COLOURS, strict=False):
        found = [interval(reached(runs, experiment, arm, s).values()) for s in SIZES]
        low, mean, high = (
            [100 * getattr(each, name) for each in found]
            for name in ("low", "mean", "high")
        )
        words = OPPONENT_NAMES[arm].partition(",")[0]
        axes.fill_between(_places(), low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(_places(), mean, marker="o", color=colour, label=words)
    nothing = fmean(reached(runs, experiment, UNADAPTED).values())
    axes.axhline(100 * nothing, color=COLOURS[-1], linestyle="--", linewidth=1)
    _count_images(axes, "test accuracy (%)")
    return figure


def leads_figure(
    runs: Sequence[dict], ours: str = "z_recorded", theirs: str = "head"
) -> "Figure":
    """One arm minus another in both experiments, in points, against the number of
    images of each class, with 95 % intervals over folds.

    Args:
        runs: made by `with_experiment`, of both experiments.
    """
    figure, axes = new_figure(width=5.5, height=3.0)
    for experiment, colour, marker in zip((1, 2), COLOURS, "os", strict=False):
        found = [lead(runs, experiment, ours, theirs, size) for size in SIZES]
        means = [100 * each.mean for each in found]
        reach = [100 * (each.high - each.mean) for each in found]
        places = [place * 1.04 ** (2 * experiment - 3) for place in _places()]
        words = f"experiment {experiment}"
        axes.errorbar(
            places, means, reach, fmt=f"{marker}-", color=colour, capsize=3, label=words
        )
    axes.axhline(0, color=COLOURS[-1], linestyle="--", linewidth=1)
    _count_images(axes, f"z − {OPPONENT_NAMES[theirs].partition(' on ')[0]} (points)")
    return figure


def _places() -> list[int]:
    return [size or ALL_IMAGES for size in SIZES]


def _count_images(axes: object, label: str) -> None:
    """An axis of images of each class, the measured numbers being its ticks."""
    axes.set_xscale("log")
    axes.set_xticks(_places(), _places())
    axes.minorticks_off()
    axes.set(xlabel="training images of each class", ylabel=label)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
