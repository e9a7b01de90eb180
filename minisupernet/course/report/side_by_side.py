"""What chapter 10 says of the recorded runs of all chapters: each system against its
controls, and the same tasks asked of several systems."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minisupernet.course.plots import COLOURS, new_figure, table
from minisupernet.course.records import load_runs, results_file, unit_means
from minisupernet.course.report.opponents import lead, reached, with_experiment
from minisupernet.course.report.pudnet import on_episodes, on_pairs
from minisupernet.course.report.static_long import LONG, SHORT
from minisupernet.course.report.static_long import reached as static_reached
from minisupernet.course.statistics import Interval, difference, interval, verdict

if TYPE_CHECKING:
    from IPython.display import Markdown
    from matplotlib.figure import Figure

__all__ = [
    "Comparison",
    "bits_table",
    "comparisons",
    "comparisons_figure",
    "comparisons_table",
    "heads_table",
    "read_records",
    "same_pairs",
    "same_pairs_differences",
    "same_pairs_table",
]

Records = Mapping[str, Sequence[dict]]
FILES = {
    "net2net": "02_net2net.json",
    "static": "03_static_hypernetworks.json",
    "static_long": "03_static_long.json",
    "dynamic": "04_dynamic_hypernetworks.json",
    "experiment_1": "06_experiment_1.json",
    "experiment_2": "07_experiment_2.json",
    "opponents": "07_opponents.json",
    "pudnet": "08_pudnet.json",
    "labelled": "09_labelled.json",
}
SETUPS = {1: "many_tasks", 2: "unseen_pairs"}  # those that the opponents met
SIZES = (5, 10, 20, 50, 100, None)  # images of a class, None for all
ALL_IMAGES = 450
FEW = 5  # labelled examples of a class
CONTROLS = {  # of chapter 3's networks, trained for longer
    "smaller": "a smaller one, directly",
    "as_many_numbers": "one of as many numbers",
}
UNSEEN = "unseen, 5-way, 5 a class"
ON_PAIRS = (  # what is asked about unseen pairs, and the numbers fitted to one of them
    ("SuperNet, z fitted", "z_only", 32),
    ("all weights, from scratch, 300 steps", "from_scratch", 37_165),
    ("all weights, fine-tuned, 300 steps", "fine_tuned", 37_165),
    ("a head on one shared network", "head", 101),
    ("the nearer class mean on that network", "nearest_mean", 0),
    ("PudNet, one look", "pudnet", 0),
    ("the nearer class mean on PudNet's control", "one_network", 0),
)


@dataclass(frozen=True)
class Comparison:
    """A system minus one of its controls: a difference in test accuracy for each
    unit, as shares."""

    system: str
    control: str
    values: tuple[float, ...]

    @property
    def found(self) -> Interval:
        """Mean and t interval over the units."""
        return interval(self.values)


def read_records() -> dict[str, list[dict]]:
    """The full runs of every chapter, by the name of what was studied; the opponents
    with what z reached in the experiments' own runs beside them."""
    read = {name: load_runs(results_file(file)) for name, file in FILES.items()}
    found = {
        name: [run for run in runs if run.get("profile", "full") == "full"]
        for name, runs in read.items()
    }
    for number, setup in SETUPS.items():
        own = found[f"experiment_{number}"]
        found["opponents"] = with_experiment(found["opponents"], own, setup)
    return found


def comparisons(records: Records) -> list[Comparison]:
    """Each system minus the controls of its chapter, in the order of the chapters."""
    found = []
    for part in (_grown, _static, _dynamic, _supernet, _pudnet, _labelled):
        found += [Comparison(*line) for line in part(records)]
    return found


def _grown(records: Records) -> list[tuple]:
    def test(run: dict, phase: str, arm: str) -> float:
        """By the schedule that is better on validation images."""
        tried = run["phases"][phase][arm].values()
        return max(tried, key=lambda each: each["validation"])["test"]

    asked = [
        ("Net2Net, wider", "wider", "random units", "random"),
        ("Net2Net, to 20 layers", "deeper_20", "random layers", "random"),
        ("Net2Net, to 20 layers", "deeper_20", "from scratch", "scratch"),
        ("Net2Net, to 20 layers", "deeper_20", "the teacher goes on", "teacher"),
    ]
    return [
        (
            system,
            control,
            tuple(
                test(run, phase, "net2net") - test(run, phase, arm)
                for run in records["net2net"]
            ),
        )
        for system, phase, control, arm in asked
    ]


def _static(records: Records) -> list[tuple]:
    short = {
        arm: {
            run["seed"]: row["test"]
            for run in records["static"]
            for row in run["networks"]
            if row["arm"] == arm
        }
        for arm in ("generated", "direct", "smaller")
    }
    rows = [
        ("static WRN-16-1, 7 epochs", "the same, trained directly", short, "direct"),
        ("static WRN-16-1, 7 epochs", "a smaller one, directly", short, "smaller"),
    ]
    runs = records["static_long"]
    for epochs, arms in ((SHORT, ["smaller"]), (LONG, ["smaller", "as_many_numbers"])):
        long = {arm: static_reached(runs, arm, epochs) for arm in ("generated", *arms)}
        system = f"static WRN-40-1, {epochs:.0f} epochs"
        rows += [(system, CONTROLS[arm], long, arm) for arm in arms]
    return [(system, control, _less(arms, arm)) for system, control, arms, arm in rows]


def _less(arms: dict[str, dict[int, float]], arm: str) -> tuple[float, ...]:
    """Generated minus another arm, over the seeds that measured both."""
    ours, theirs = arms["generated"], arms[arm]
    return tuple(ours[seed] - theirs[seed] for seed in ours if seed in theirs)


def _dynamic(records: Records) -> list[tuple]:
    controls = {"an LSTM": "lstm", "an LSTM, layer norm": "layer_norm_lstm"}
    return [
        (
            "HyperLSTM, images by rows",
            control,
            tuple(
                run["images"]["hyperlstm"]["test"] - run["images"][arm]["test"]
                for run in records["dynamic"]
            ),
        )
        for control, arm in controls.items()
    ]


def _supernet(records: Records) -> list[tuple]:
    arms = {"from scratch, 300 steps": "from_scratch", "fine-tuned": "fine_tuned"}
    found = []
    for setup in ("better", "many tasks"):
        for experiment in (1, 2):
            runs = records[f"experiment_{experiment}"]
            name = SETUPS[experiment] if setup == "many tasks" else setup
            system = f"z, experiment {experiment}, {setup}"
            for control, arm in arms.items():
                values = unit_means(runs, name, "z_only", None, arm).values()
                found.append((system, control, tuple(values)))
            if setup == "many tasks":
                values = _z_less_head(records, experiment)
                found.append((system, "a head on one network", values))
    return found


def _z_less_head(records: Records, experiment: int) -> tuple[float, ...]:
    ours, theirs = (
        reached(records["opponents"], experiment, arm) for arm in ("z_recorded", "head")
    )
    return tuple(ours[unit] - theirs[unit] for unit in ours if unit in theirs)


def _pudnet(records: Records) -> list[tuple]:
    asked = [
        ("PudNet, unseen classes", UNSEEN, "itself, wrong dataset", "wrong_sketch"),
        ("PudNet, unseen classes", UNSEEN, "one network", "one_network"),
        ("PudNet, CIFAR-10", "cifar10, 5-way, 5 a class", "one network", "one_network"),
    ]
    found = []
    for system, place, control, arm in asked:
        ours, theirs = (
            on_episodes(records["pudnet"], place, each) for each in ("pudnet", arm)
        )
        values = tuple(a - b for a, b in zip(ours, theirs, strict=True))
        found.append((system, control, values))
    return found


def _labelled(records: Records) -> list[tuple]:
    runs = [*records["labelled"], *records["opponents"]]
    controls = {"itself, labels shuffled": "shuffled", "a head on one network": "head"}
    found = []
    for control, arm in controls.items():
        ours, theirs = (reached(runs, 2, each, FEW) for each in ("look", arm))
        values = tuple(ours[unit] - theirs[unit] for unit in ours if unit in theirs)
        found.append((f"one look, {FEW} examples of new classes", control, values))
    return found


def comparisons_table(rows: Sequence[Comparison]) -> "Markdown":
    """One line a comparison: mean and interval in points, the units, the verdict."""
    header = ["system", "minus", "points (95 % interval)", "units", "the system is"]
    return table(
        header,
        [
            [
                row.system,
                row.control,
                row.found.percent(),
                row.found.n,
                verdict(row.found),
            ]
            for row in rows
        ],
    )


def comparisons_figure(rows: Sequence[Comparison]) -> "Figure":
    """A row a comparison: a faint dot a unit, the mean, and the interval where there is
    one."""
    figure, axes = new_figure(width=6.5, height=0.9 + 0.27 * len(rows))
    for place, row in enumerate(rows):
        found = row.found
        points = [100 * value for value in row.values]
        axes.plot(points, [place] * len(points), "o", color=COLOURS[0], alpha=0.3)
        if found.n >= 3:
            ends = [100 * found.low, 100 * found.high]
            axes.plot(ends, [place, place], color=COLOURS[1], linewidth=3)
        marks = {"color": COLOURS[1], "markeredgecolor": "white", "markersize": 8}
        axes.plot(100 * found.mean, place, "D", **marks)
    axes.axvline(0, color=COLOURS[-1], linestyle="--", linewidth=1)
    names = [f"{row.system} − {row.control}" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("points above the control")
    return figure


def heads_table(records: Records) -> "Markdown":
    """z minus a head on one shared network, of its 100 features and of 32 directions,
    at every number of images, and the verdict on z; and where one class is known, z
    minus the mean z, with nothing fitted."""
    asked = {
        "experiment 1: z − a head": (1, "head"),
        "z − one of 33 numbers": (1, "head_32"),
        "z − nothing fitted": (1, "no_adaptation"),
        "experiment 2: z − a head": (2, "head"),
        "z − one of 33 numbers ": (2, "head_32"),
    }
    rows = []
    for size in SIZES:
        found = [
            lead(records["opponents"], experiment, "z_recorded", arm, size)
            for experiment, arm in asked.values()
        ]
        said = [f"{each.percent()}: {verdict(each)}" for each in found]
        rows.append([size or ALL_IMAGES, *said])
    return table(["images of a class", *asked], rows)


def same_pairs(records: Records) -> dict[str, dict[tuple[int, int], float]]:
    """Test accuracy on the unseen pairs that all systems were asked about, with all
    images: {who: {(fold, seed): a mean over the fold's ten pairs}}."""
    runs = records["experiment_2"]
    found = {}
    for name, arm, _ in ON_PAIRS:
        if arm in ("pudnet", "one_network"):
            found[name] = on_pairs(records["pudnet"], arm)
        elif arm in ("head", "nearest_mean"):
            found[name] = reached(records["opponents"], 2, arm)
        else:
            found[name] = unit_means(runs, SETUPS[2], arm)
    common = set.intersection(*(set(means) for means in found.values()))
    return {
        name: {unit: means[unit] for unit in sorted(common)}
        for name, means in found.items()
    }


def same_pairs_table(records: Records) -> "Markdown":
    """One line for each who was asked: what is fitted to a pair, and the accuracy with
    its interval over folds."""
    rows = []
    numbers = {name: count for name, _, count in ON_PAIRS}
    for name, means in same_pairs(records).items():
        found = interval(means.values())
        rows.append([name, f"{numbers[name]:,}", found.percent(), found.n])
    fitted = "numbers fitted to a pair"
    header = ["on the same unseen pairs", fitted, "test accuracy in % (95 %)", "folds"]
    return table(header, rows)


def same_pairs_differences(
    records: Records, pairs: Sequence[tuple[str, str]]
) -> "Markdown":
    """The first of each two minus the second, paired by fold, and the verdict.

    Args:
        pairs: keys of `same_pairs`.
    """
    arms, rows = same_pairs(records), []
    for first, second in pairs:
        found = difference(arms[first], arms[second])
        said = [found.percent(), found.n, verdict(found)]
        rows.append([f"{first} − {second}", *said])
    return table(["in points", "mean (95 % interval)", "folds", "the first is"], rows)


def bits_table(records: Records) -> "Markdown":
    """The HyperLSTM minus each control on text, in bits per character, where less is
    better."""
    controls = {
        "an LSTM": "lstm",
        "an LSTM, layer norm": "layer_norm_lstm",
        "an LSTM, trained for as many seconds": "lstm_equal_seconds",
    }
    rows = []
    for control, arm in controls.items():
        texts = [run["text"] for run in records["dynamic"]]
        found = interval([t["hyperlstm"]["test"] - t[arm]["test"] for t in texts])
        ends = f"{found.mean:z.3f} ({found.low:z.3f} to {found.high:z.3f})"
        rows.append([f"HyperLSTM − {control}", ends, found.n, verdict(found)])
    header = ["bits per character", "mean (95 % interval)", "seeds", "the HyperLSTM's"]
    return table(header, rows)
