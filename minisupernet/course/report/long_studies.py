"""Tables of the studies in units: what is recorded so far, arm by arm.

A unit is one arm and one seed. An interval is over seeds, and a difference is paired by
seed; below three there is a mean and no verdict.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from minisupernet.course.plots import COLOURS, new_figure, table
from minisupernet.course.statistics import (
    FEWEST,
    Interval,
    interval,
    paired,
    verdict,
)
from minisupernet.errors import ResultError

if TYPE_CHECKING:
    from IPython.display import Markdown
    from matplotlib.figure import Figure

__all__ = [
    "BENCHMARK_NAMES",
    "FAMILY_NAMES",
    "GROWTH_NAMES",
    "TEXT_NAMES",
    "family_leads_table",
    "family_table",
    "fewshot_table",
    "growth_figure",
    "growth_table",
    "lead",
    "text_table",
    "units",
]

FAMILY_NAMES = {
    "one_network": "one network",
    "aligned": "one network, colours turned by hand",
    "pudnet": "PudNet",
    "pudnet_labels": "PudNet, sketch with labels",
    "pudnet_share_01": "PudNet, code share 0.01",
    "pudnet_share_30": "PudNet, code share 0.3",
}
SHOWN_NAMES = {
    "wrong": "PudNet shown another data set",
    "other_classes": "PudNet shown other classes, its own change",
    "other_change": "PudNet shown its own classes, another change",
}
CHANGE_NAMES = {
    "none": "no change",
    "colours": "colours mixed",
    "all": "colours mixed, blurred, blocks shuffled",
}
GROWTH_NAMES = {
    "copies": "Net2Net's copies",
    "unequal": "copies, unequal shares",
    "zero": "random, zero outgoing weights",
    "random": "random",
    "teacher_steps": "teacher goes on, equal steps",
    "teacher_operations": "teacher goes on, equal operations",
    "scratch_steps": "from scratch, equal steps",
    "scratch_operations": "from scratch, equal operations",
    "scratch_thrice": "from scratch, three times the operations",
}
BENCHMARK_NAMES = {"cifar_fs": "CIFAR-FS", "fc100": "FC100"}
# method and layers, then % right with 1 and 5 examples: CIFAR-FS, FC100. Table 2 of Lee
# and others, 2019, arXiv 1904.03758, which takes them from the papers of the methods.
PUBLISHED = (
    ("MAML", "conv 32-32-32-32", "58.9 ± 1.9", "71.5 ± 1.0", "–", "–"),
    (
        "prototypical network",
        "conv 64-64-64-64",
        "55.5 ± 0.7",
        "72.0 ± 0.6",
        "35.3 ± 0.6",
        "48.6 ± 0.6",
    ),
    ("R2D2", "conv 96-192-384-512", "65.3 ± 0.2", "79.4 ± 0.1", "–", "–"),
    (
        "MetaOptNet",
        "ResNet-12",
        "72.0 ± 0.7",
        "84.2 ± 0.5",
        "41.1 ± 0.6",
        "55.5 ± 0.6",
    ),
)
FEWSHOT_NAMES = {
    "protonet": "prototypical network",
    "one_network": "one network",
    "pudnet": "PudNet",
}
TEXT_NAMES = {
    "lstm": "LSTM",
    "layer_norm_lstm": "layer-norm LSTM",
    "hyperlstm_plain": "HyperLSTM without layer norm",
    "hyperlstm": "HyperLSTM",
    "hyperlstm_spread": "HyperLSTM, z started apart",
}


def units(
    runs: Sequence[dict], measure: str, **which: str | int | float
) -> dict[int, float]:
    """One measure, such as "test" or "test.5.own", of the units with these values:
    {seed: value}.

    Raises:
        ResultError: where no such unit is recorded, or two of one seed.
    """
    mine = [run for run in runs if all(run[key] == v for key, v in which.items())]
    found = {run["seed"]: _value(run, measure) for run in mine}
    if not found or len(found) < len(mine):
        asked = ", ".join(f"{key} {value}" for key, value in which.items())
        many = "several units of one seed have" if mine else "no recorded unit has"
        raise ResultError(f"{many} {asked}.")
    return found


def _value(run: dict, measure: str) -> float:
    value = run
    for part in measure.split("."):
        if part not in value:
            raise ResultError(f"a unit of the arm '{run['arm']}' has no {measure}.")
        value = value[part]
    return value


def lead(
    runs: Sequence[dict],
    first: Mapping[str, str | int | float],
    second: Mapping[str, str | int | float],
    measure: str = "test",
    theirs: str | None = None,
) -> Interval:
    """The first kind of unit minus the second, paired by seed.

    Args:
        first, second: the values that single them out, such as {"arm": "pudnet"}.
        theirs: the second's measure where it is another.

    Raises:
        ResultError: where they have no seed in common.
    """
    ours, others = (
        units(runs, measure, **first),
        units(runs, theirs or measure, **second),
    )
    both = sorted(ours.keys() & others.keys())
    return paired([ours[seed] for seed in both], [others[seed] for seed in both])


def family_table(
    runs: Sequence[dict], channels: int = 8, steps: int = 6_000, support: int = 5
) -> "Markdown":
    """Chapter 8's data sets with changes of their own: test accuracy of each arm, and
    of PudNet shown the wrong thing, for each kind of change."""
    rows = []
    asked = [(arm, "own", words) for arm, words in FAMILY_NAMES.items()]
    asked += [("pudnet", shown, words) for shown, words in SHOWN_NAMES.items()]
    for arm, shown, words in asked:
        which, measure = (
            {"channels": channels, "steps": steps},
            f"test.{support}.{shown}",
        )
        cells = [
            _percent(runs, measure, arm=arm, changes=kind, **which)
            for kind in _changes(runs)
        ]
        if set(cells) != {"–"}:
            rows.append([words, *cells])
    return table(["test accuracy in % (splits)", *_changes(runs).values()], rows)


def _changes(runs: Sequence[dict]) -> dict[str, str]:
    """The kinds of changes that are recorded, in words."""
    recorded = {run["changes"] for run in runs}
    return {kind: words for kind, words in CHANGE_NAMES.items() if kind in recorded}


def family_leads_table(
    runs: Sequence[dict], channels: int = 8, steps: int = 6_000, support: int = 5
) -> "Markdown":
    """PudNet minus each of the others, in points, paired by split, and the verdict."""
    which, rows = {"channels": channels, "steps": steps}, []
    asked = [(arm, "own", words) for arm, words in FAMILY_NAMES.items()]
    asked += [("pudnet", shown, words) for shown, words in SHOWN_NAMES.items()]
    for arm, shown, words in asked[:2] + asked[3:]:  # all but PudNet itself
        said = []
        for kind in _changes(runs):
            ours, theirs = ({"arm": a, "changes": kind} for a in ("pudnet", arm))
            measures = f"test.{support}.own", f"test.{support}.{shown}"
            said.append(_said(runs, which | ours, which | theirs, *measures))
        if set(said) != {"–"}:
            rows.append([words, *said])
    return table(["PudNet − ..., points", *_changes(runs).values()], rows)


def fewshot_table(runs: Sequence[dict]) -> "Markdown":
    """The public benchmarks: what is recorded here, above the published rows, % right
    of five ways with the 95 % interval over episodes."""
    rows = []
    for channels, arm in sorted({(run["channels"], run["arm"]) for run in runs}):
        cells = [
            _over_episodes(runs, benchmark, arm, channels, shots)
            for benchmark in BENCHMARK_NAMES
            for shots in ("1", "5")
        ]
        layers = f"conv {'-'.join([str(channels)] * 4)}"
        if arm != "protonet":
            layers = f"conv {'-'.join(str(n * channels) for n in (1, 2, 4, 4))}"
        rows.append([f"{FEWSHOT_NAMES[arm]}, here", layers, *cells])
    columns = [f"{name}, {k} shot" for name in BENCHMARK_NAMES.values() for k in (1, 5)]
    published = [[f"{method}, published", *rest] for method, *rest in PUBLISHED]
    return table(["% right", "layers", *columns], rows + published)


def _over_episodes(
    runs: Sequence[dict], benchmark: str, arm: str, channels: int, shots: str
) -> str:
    asked = (benchmark, arm, channels)
    for run in runs:
        if (run["benchmark"], run["arm"], run["channels"]) == asked:
            found = run["test"][shots]["own"]
            return f"{100 * found['mean']:.1f} ± {100 * found['half']:.1f}"
    return "–"


def growth_table(runs: Sequence[dict], phase: str) -> "Markdown":
    """Chapter 2's arms: steps, operations as a share of what teacher and grown network
    cost together, training loss, test accuracy, and Net2Net's copies minus each."""
    rows, copies = [], {"phase": phase, "arm": "copies"}
    for arm, words in GROWTH_NAMES.items():
        own = [run for run in runs if (run["phase"], run["arm"]) == (phase, arm)]
        if not own:
            continue
        which = {"phase": phase, "arm": arm}
        said = "" if arm == "copies" else _said(runs, copies, which, "test", "test")
        share = _share(runs, own[0])
        loss = f"{fmean(run['train_loss'] for run in own):.2f}"
        cell = _percent(runs, "test", **which)
        rows.append([words, f"{own[0]['steps']:,}", share, loss, cell, said])
    header = [
        "arm",
        "steps",
        "operations",
        "training loss",
        "test accuracy in % (seeds)",
    ]
    return table([*header, "Net2Net's copies − it, points"], rows)


def _share(runs: Sequence[dict], run: dict) -> str:
    """Operations of a unit as a multiple of those of a grown one of its phase."""
    grown = [
        each["operations"]
        for each in runs
        if each["phase"] == run["phase"] and each["arm"] in ("copies", "random")
    ]
    return f"{run['operations'] / grown[0]:.2f}" if grown else "–"


def growth_figure(runs: Sequence[dict], phase: str) -> "Figure":
    """Test accuracy at the end of each arm's training, over what it had cost."""
    figure, axes = new_figure(height=3.4)
    for number, (arm, words) in enumerate(GROWTH_NAMES.items()):
        own = [run for run in runs if (run["phase"], run["arm"]) == (phase, arm)]
        cost = [run["operations"] / 1e12 for run in own]
        marker = "s" if arm.startswith("scratch") else "o"
        style = {"color": COLOURS[number % len(COLOURS)], "linestyle": ""}
        style |= {"marker": "^" if arm.startswith("teacher") else marker}
        if own:
            axes.plot(cost, [100 * run["test"] for run in own], label=words, **style)
    axes.set(
        xlabel="operations, 10¹², the teacher's included", ylabel="test accuracy (%)"
    )
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def text_table(runs: Sequence[dict]) -> "Markdown":
    """Chapter 4's arms: the characters read, seconds, bits a character on training and
    test text, and each minus the layer-norm LSTM that read as many."""
    rows = []
    for characters, arm in sorted({(run["characters"], run["arm"]) for run in runs}):
        which = {"characters": characters, "arm": arm}
        own = [run for run in runs if all(run[key] == v for key, v in which.items())]
        said = _bits_apart(runs, which, which | {"arm": "layer_norm_lstm"})
        train, seconds = (
            fmean(run[part] for run in own) for part in ("train_bits", "train_seconds")
        )
        found = interval(units(runs, "test", **which).values())
        cells = [f"{characters:,}", f"{own[0]['parameters']:,}", f"{seconds:.0f}"]
        cells += [f"{train:.3f}", _bits(found), "" if "norm" in arm else said]
        rows.append([TEXT_NAMES[arm], *cells])
    header = ["arm", "characters", "numbers", "seconds", "training bits"]
    return table([*header, "test bits (seeds)", "− layer-norm LSTM"], rows)


def _bits_apart(runs: Sequence[dict], first: dict, second: dict) -> str:
    try:
        found = lead(runs, first, second)
    except ResultError:
        return "–"
    return f"{_bits(found)}: {verdict(found)}"


def _bits(found: Interval) -> str:
    if found.n < FEWEST:
        return f"{found.mean:z.3f} (n = {found.n}: no interval)"
    return f"{found.mean:z.3f} ({found.low:z.3f} to {found.high:z.3f})"


def _percent(runs: Sequence[dict], measure: str, **which: str | int) -> str:
    try:
        found = interval(units(runs, measure, **which).values())
    except ResultError:
        return "–"
    return f"{found.percent()}{f', n = {found.n}' if found.n >= FEWEST else ''}"


def _said(
    runs: Sequence[dict], first: dict, second: dict, measure: str, theirs: str
) -> str:
    try:
        found = lead(runs, first, second, measure, theirs)
    except ResultError:
        return "–"
    return f"{found.percent()}: {verdict(found)}"
