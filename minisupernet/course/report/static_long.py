"""Chapter 3's answer at a size that counts, drawn from the runs of 03_static_long.json:
accuracy against the numbers that are stored and the multiplications that are done.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from minisupernet.course.plots import COLOURS, new_figure, table
from minisupernet.course.statistics import FEWEST, Interval, interval, paired, verdict
from minisupernet.errors import ResultError

if TYPE_CHECKING:
    from IPython.display import Markdown
    from matplotlib.figure import Figure

__all__ = [
    "LONG",
    "LONG_NAMES",
    "SHORT",
    "accuracy_figure",
    "accuracy_table",
    "costs_table",
    "lead",
    "reached",
    "leads_table",
    "verdict_in_words",
]

LONG, SHORT = 40.0, 5.0  # epochs of the final units, and of those that choose a rate
LONG_NAMES = {
    "generated": "WRN-40-1, generated",
    "direct": "WRN-40-1, direct",
    "as_many_numbers": "WRN-16 of 12, 24 and 48 channels",
    "smaller": "WRN-10-1, direct",
    "wider_generated": "WRN-28-2, generated",
    "as_many_as_wider": "WRN-16-1, direct",
}
PAIRS = (
    ("generated", "smaller"),
    ("generated", "as_many_numbers"),
    ("smaller", "as_many_numbers"),
    ("generated", "direct"),
    ("wider_generated", "as_many_as_wider"),
)


def reached(
    runs: Sequence[dict], arm: str, epochs: float, part: str = "test"
) -> dict[int, float]:
    """What an arm reached after so many epochs, at the rate of its units of `LONG`
    epochs: {seed: accuracy, or any other number of a run}.

    Raises:
        ResultError: where no unit of that length was recorded.
    """
    mine = [run for run in runs if run["arm"] == arm]
    rates = {run["rate"] for run in mine if run["epochs"] == LONG}
    found = {
        run["seed"]: run[part]
        for run in mine
        if run["epochs"] == epochs and run["rate"] in rates
    }
    if not found:
        raise ResultError(f"no recorded unit has the arm '{arm}' for {epochs} epochs.")
    return dict(sorted(found.items()))


def lead(
    runs: Sequence[dict], first: str, second: str, epochs: float = LONG
) -> Interval:
    """The difference in test accuracy after so many epochs, first arm minus second,
    over the seeds that both have."""
    ours, theirs = (reached(runs, arm, epochs) for arm in (first, second))
    both = sorted(ours.keys() & theirs.keys())
    return paired([ours[seed] for seed in both], [theirs[seed] for seed in both])


def costs_table(runs: Sequence[dict]) -> "Markdown":
    """What each network stores and does, and how long its training took."""
    rows = []
    for arm in _recorded(runs):
        units = [run for run in _final(runs) if run["arm"] == arm]
        millions = units[0]["multiply_adds"] / 1e6
        minutes = fmean(run["train_seconds"] for run in units) / 60
        numbers = f"{units[0]['parameters']:,}"
        row = [LONG_NAMES[arm], numbers, f"{millions:.1f} million", f"{minutes:.0f}"]
        rows.append(row)
    each = "multiplications an image"
    return table(["network", "numbers learned", each, "minutes of one core"], rows)


def accuracy_table(runs: Sequence[dict]) -> "Markdown":
    """Training loss and test accuracy of each network, short and long."""
    rows = []
    for arm in _recorded(runs):
        loss = fmean(reached(runs, arm, LONG, "train_loss").values())
        cells = [_cell(runs, arm, epochs) for epochs in (SHORT, LONG)]
        rows.append([LONG_NAMES[arm], *cells, f"{loss:.2f}"])
    tests = [f"test %, {epochs:.0f} epochs" for epochs in (SHORT, LONG)]
    return table(["network", *tests, "training loss at the end"], rows)


def leads_table(runs: Sequence[dict]) -> "Markdown":
    """One network minus another in points, short and long, paired by seed, and what the
    longer difference allows to be said."""
    rows = []
    for first, second in PAIRS:
        if {first, second} <= set(_recorded(runs)):
            long = lead(runs, first, second)
            words = f"{LONG_NAMES[first]} − {LONG_NAMES[second]}"
            short = lead(runs, first, second, SHORT)
            rows.append([words, short.percent(), long.percent(), verdict(long)])
    after = [f"points, {epochs:.0f} epochs" for epochs in (SHORT, LONG)]
    return table(["network − network", *after, "the first is"], rows)


def accuracy_figure(runs: Sequence[dict]) -> "Figure":
    """Test accuracy against numbers and against multiplications: hollow after the short
    training, filled after the long one, a dot a seed, with the 95 % interval of three
    or more."""
    figure, panels = new_figure(2, 1, width=4.6, height=5.4)
    measures = {"parameters": 1e3, "multiply_adds": 1e6}
    for axes, (measure, unit) in zip(panels, measures.items(), strict=True):
        for arm, colour in zip(_recorded(runs), COLOURS, strict=False):
            at = next(run[measure] for run in runs if run["arm"] == arm) / unit
            _draw_arm(axes, runs, arm, at, colour)
        axes.set_ylabel("test accuracy (%)")
        axes.margins(x=0.12)
    panels[0].set_xlabel("numbers learned (thousands)")
    panels[1].set(xlabel="multiplications an image (millions)", xlim=(0, None))
    panels[0].legend(loc="lower left", bbox_to_anchor=(-0.1, 1), fontsize=9)
    return figure


def verdict_in_words(runs: Sequence[dict]) -> str:
    """What the generated network and its two ordinary rivals of about its size reached,
    with the budget in the same sentence; Markdown."""
    (images,) = {run["images"] for run in _final(runs)}
    arms = ("generated", "smaller", "as_many_numbers")
    lines = [f"After {LONG:.0f} epochs of {images:,} images of 16 x 16 pixels:", ""]
    lines += [f"- {_end(runs, arm)}" for arm in arms]
    for first, second in PAIRS[:2]:
        found = lead(runs, first, second)
        lines.append(
            f"- generated against {LONG_NAMES[second]}: {100 * found.mean:+z.1f}"
            f" points, n = {found.n}, {verdict(found)}"
        )
    return "\n".join(lines)


def _end(runs: Sequence[dict], arm: str) -> str:
    values = reached(runs, arm, LONG).values()
    numbers = next(run["parameters"] for run in runs if run["arm"] == arm)
    name = f"{LONG_NAMES[arm]}, {numbers:,} numbers"
    return f"{name}: {100 * fmean(values):.1f} %, n = {len(values)}"


def _final(runs: Sequence[dict]) -> list[dict]:
    return [run for run in runs if run["epochs"] == LONG]


def _recorded(runs: Sequence[dict]) -> list[str]:
    """The arms that have a unit of the full length, in the order of their names."""
    have = {run["arm"] for run in _final(runs)}
    return [arm for arm in LONG_NAMES if arm in have]


def _cell(runs: Sequence[dict], arm: str, epochs: float) -> str:
    try:
        return interval(reached(runs, arm, epochs).values()).percent()
    except ResultError:  # this arm's rate is another's
        return "–"


def _draw_arm(axes, runs: Sequence[dict], arm: str, at: float, colour: str) -> None:
    for epochs, face in ((SHORT, "none"), (LONG, colour)):
        values = [100 * value for value in reached(runs, arm, epochs).values()]
        label = LONG_NAMES[arm] if epochs == LONG else None
        axes.plot([at] * len(values), values, "o", color=colour, mfc=face, label=label)
        found = interval(values)
        if found.n >= FEWEST:
            axes.errorbar(
                at,
                found.mean,
                found.mean - found.low,
                color="black",
                capsize=5,
                linewidth=1.2,
            )
