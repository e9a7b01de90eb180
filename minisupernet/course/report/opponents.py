"""Tables of the recorded opponents of z: one shared network with a head for each task,
and ordinary training that is long enough."""

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from minisupernet.course.plots import table
from minisupernet.course.statistics import Interval, interval, verdict
from minisupernet.errors import ResultError

if TYPE_CHECKING:
    from IPython.display import Markdown

__all__ = [
    "OPPONENT_NAMES",
    "lead",
    "leads_table",
    "opponents_table",
    "reached",
    "target_sizes_table",
]

OPPONENT_NAMES = {
    "z_only": "z only, generator frozen",
    "z_prior": "z with a prior",
    "head": "head on one network",
    "head_32": "head on 32 directions of it",
    "nearest_mean": "nearest class mean on it",
    "protonet": "nearest mean, by episodes",
    "biases": "its biases and the head",
    "lora": "rank one and the head",
    "trunk_fine_tuned": "all of it, fine-tuned",
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
        runs: those of `07_opponents.json`.
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
        and arm in run["few"].get(name, {})
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
    if found.n < 3:
        return found.percent()
    return f"{100 * found.mean:.1f} ± {50 * (found.high - found.low):.1f}"


def leads_table(
    runs: Sequence[dict],
    experiment: int,
    ours: str = "z_only",
    sizes: Sequence[int | None] = (5, 20, None),
    **which: int | bool,
) -> "Markdown":
    """An arm minus each of the others, in points, paired by fold, and the verdict."""
    rows = []
    for arm, words in OPPONENT_NAMES.items():
        found = [_lead_or_none(runs, experiment, ours, arm, s, which) for s in sizes]
        if arm != ours and any(found):
            said = [
                f"{each.percent()}: {verdict(each)}" if each else "–" for each in found
            ]
            rows.append([words, *said])
    header = f"{OPPONENT_NAMES[ours]} − ..., points, images of a class:"
    return table([header, *(str(size or ALL_IMAGES) for size in sizes)], rows)


def _lead_or_none(
    runs: Sequence[dict], experiment: int, first: str, second: str, size, which: dict
) -> Interval | None:
    try:
        return lead(runs, experiment, first, second, size, **which)
    except ResultError:  # one of the two was not measured with so many images
        return None


def target_sizes_table(
    runs: Sequence[dict], ours: str = "z_prior", theirs: str = "head"
) -> "Markdown":
    """z and a head on targets of other sizes, on the pairs of experiment 2."""
    mine = [run for run in runs if run["of_experiment"] == 2 and run["steps"] == STEPS]
    rows = []
    for channels in sorted({run["channels"] for run in mine}):
        weights = next(r["weights"] for r in mine if r["channels"] == channels)
        found = [
            _lead_or_none(runs, 2, ours, theirs, size, {"channels": channels})
            for size in (5, 20, None)
        ]
        if any(found):
            said = [
                f"{each.percent()}: {verdict(each)}" if each else "–" for each in found
            ]
            rows.append([channels, f"{weights:,}", *said])
    words = (
        f"{OPPONENT_NAMES[ours]} − {OPPONENT_NAMES[theirs]}, points, images of a class:"
    )
    return table(["filters", "weights", f"{words} 5", "20", str(ALL_IMAGES)], rows)
