"""Tables and figures of the recorded experiments, drawn from the runs in `results/` and
from nothing else.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from minisupernet.course.plots import COLOURS, ladder, new_figure, table
from minisupernet.course.records import task_means, unit_means
from minisupernet.course.report.opponents import OPPONENT_NAMES, lead, with_experiment
from minisupernet.course.statistics import Interval, interval, verdict

if TYPE_CHECKING:
    from IPython.display import Markdown
    from matplotlib.figure import Figure

__all__ = [
    "ARM_NAMES",
    "aims_table",
    "arms_table",
    "compare",
    "cost_table",
    "differences_table",
    "few_images",
    "few_table",
    "geometry_table",
    "recorded_ladder",
    "recorded_walk",
    "search_gain",
    "search_table",
    "setups_in",
    "verdict",
]

ARM_NAMES = {
    "z_only": "z only, generator frozen",
    "random_generator": "z only, random generator",
    "other_z": "z of another new task",
    "no_adaptation": "no adaptation",
    "one_network": "one network for all tasks",
    "last_layer": "last layer alone",
    "biases": "biases alone",
    "from_scratch": "from scratch",
    "fine_tuned": "fine-tuned",
    "unfrozen": "z and generator, as coded",
    "right_z": "trained tasks, right z",
    "wrong_z": "trained tasks, wrong z",
}
SETUP_NAMES = {
    "original": "original set-up",
    "better": "better generator",
    "many_tasks": "many tasks",
    "unseen_pairs": "many tasks, unseen pairs",
}
ASIDE = (
    "unfrozen",
    "right_z",
    "wrong_z",
)  # arms that are not on the ladder: other tasks, or fewer
CURVES = ("z_only", "fine_tuned", "from_scratch")
ALL_IMAGES = 450  # of each class of CIFAR-100, 50 being kept for validation
# images of each class, the arm that z only is held against, by how much it may not fall
# short
AIMS = (
    (20, "from_scratch", 0.08),
    (20, "fine_tuned", 0.0),
    (None, "from_scratch", 0.0),
    (None, "fine_tuned", -0.01),
    (None, "fine_tuned", -0.005),
)
# the same against a head of as many numbers on one shared network
HEAD_AIMS = ((5, 0.0), (20, 0.0), (None, 0.0))


def setups_in(runs: Sequence[dict]) -> list[str]:
    """The set-ups that these runs were made with, in the order in which the course
    meets them.
    """
    return [name for name in SETUP_NAMES if any(run["setup"] == name for run in runs)]


def compare(
    runs: Sequence[dict], setup: str, first: str, second: str, size: int | None = None
) -> Interval:
    """The difference in test accuracy, first arm minus second, paired by task within
    each run; a run, one generator, is a unit of the interval."""
    return interval(unit_means(runs, setup, first, size, second).values())


def cost_table(runs: Sequence[dict]) -> "Markdown":
    """What was run: for each set-up its runs (a seed and a fold each), held-out tasks,
    sizes, time and machine.
    """
    rows = []
    for name in setups_in(runs):
        mine = [run for run in runs if run["setup"] == name]
        tasks = {task for run in mine for task in run["held_out"]}
        minutes = sum(run["seconds"] for run in mine) / len(mine) / 60
        size = mine[0]["parameters"]
        devices = ", ".join(sorted({run["device"] for run in mine}))
        rows.append(
            [
                SETUP_NAMES[name],
                len(mine),
                len(tasks),
                size["z"],
                f"{size['generator']:,}",
                f"{minutes:.0f}",
                devices,
            ]
        )
    return table(
        [
            "set-up",
            "runs",
            "held-out tasks",
            "numbers in z",
            "in the generator",
            "minutes a run",
            "run on",
        ],
        rows,
    )


def arms_table(runs: Sequence[dict]) -> "Markdown":
    """Mean test accuracy of every arm with its 95 % interval over generators, for
    every set-up."""
    names = setups_in(runs)
    rows = [
        [label, *(_cell(runs, name, arm) for name in names)]
        for arm, label in ARM_NAMES.items()
    ]
    header = [
        "test accuracy in %, mean (95 % interval)",
        *(SETUP_NAMES[name] for name in names),
    ]
    return table(header, [row for row in rows if set(row[1:]) != {"not run"}])


def _arms_in(runs: Sequence[dict], setup: str) -> list[str]:
    """The arms that the recorded runs of this set-up measured, in the order of their
    names here.
    """
    own = [run for run in runs if run["setup"] == setup]
    return [
        arm
        for arm in ARM_NAMES
        if any(arm in run["arms"] or arm in run["trained"] for run in own)
    ]


def _cell(runs: Sequence[dict], setup: str, arm: str) -> str:
    if arm not in _arms_in(runs, setup):
        return "not run"
    found = interval(unit_means(runs, setup, arm).values())
    return f"{found.percent()}, n\u00a0=\u00a0{found.n}"


def differences_table(runs: Sequence[dict]) -> "Markdown":
    """What z alone reaches against each control, paired by task within a run; and the
    right z against the wrong one."""
    rows = []
    for setup in setups_in(runs):
        controls = [
            arm for arm in _arms_in(runs, setup) if arm not in ("z_only", *ASIDE)
        ]
        for first, second in [
            *(("z_only", arm) for arm in controls),
            ("right_z", "wrong_z"),
        ]:
            found = compare(runs, setup, first, second)
            words = f"{ARM_NAMES[first]} − {ARM_NAMES[second]}"
            rows.append(
                [SETUP_NAMES[setup], words, found.percent(), found.n, verdict(found)]
            )
    return table(
        [
            "set-up",
            "difference in points",
            "mean (95 % interval)",
            "generators",
            "the first is",
        ],
        rows,
    )


def recorded_ladder(runs: Sequence[dict], setup: str) -> "Figure":
    """The ladder of one set-up: a dot a generator, which has tasks of its own, means
    and intervals."""
    order = [arm for arm in _arms_in(runs, setup) if arm not in ASIDE]
    values = {
        ARM_NAMES[arm]: list(unit_means(runs, setup, arm).values()) for arm in order
    }
    data = " and ".join(
        sorted({run["data"]["name"].upper().replace("CIFAR", "CIFAR-") for run in runs})
    )
    return ladder(values, f"test accuracy (%), {SETUP_NAMES[setup]}, {data}")


def _sizes(runs: Sequence[dict], setup: str) -> list[int | None]:
    """How many images of each class the recorded runs adapted to; None stands for
    all.
    """
    return [
        *sorted(
            {
                int(size)
                for run in runs
                if run["setup"] == setup
                for size in run.get("few", {})
            }
        ),
        None,
    ]


def few_images(runs: Sequence[dict], setups: Sequence[str]) -> "Figure":
    """Test accuracy against the number of images of each class that an arm is fitted
    to, with 95 % bands over generators.
    """
    figure, panels = new_figure(1, len(setups), width=3.6 * len(setups) + 0.4)
    for axes, setup in zip(
        [panels] if len(setups) == 1 else panels, setups, strict=True
    ):
        for arm, colour in zip(CURVES, COLOURS, strict=False):
            found = [
                interval(unit_means(runs, setup, arm, size).values())
                for size in _sizes(runs, setup)
            ]
            sizes = [size or ALL_IMAGES for size in _sizes(runs, setup)]
            low, mean, high = (
                [100 * getattr(each, name) for each in found]
                for name in ("low", "mean", "high")
            )
            axes.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(sizes, mean, marker="o", color=colour, label=ARM_NAMES[arm])
        axes.set_xscale("log")
        axes.set_xticks(sizes, sizes)
        axes.minorticks_off()
        axes.set(
            title=SETUP_NAMES[setup],
            xlabel="training images of each class",
            ylabel="test accuracy (%)",
        )
    axes.legend()
    return figure


def few_table(runs: Sequence[dict], setup: str) -> "Markdown":
    """z alone against fine-tuning and training from scratch, at every number of images,
    paired by task within a run."""
    rows = []
    for size in _sizes(runs, setup):
        found = [
            compare(runs, setup, "z_only", arm, size)
            for arm in ("from_scratch", "fine_tuned")
        ]
        means = [
            f"{100 * fmean(unit_means(runs, setup, arm, size).values()):.1f}"
            for arm in CURVES
        ]
        rows.append(
            [
                size or ALL_IMAGES,
                found[0].n,
                *means,
                *(each.percent() for each in found),
            ]
        )
    names = [ARM_NAMES[arm] for arm in CURVES]
    return table(
        [
            "images of a class",
            "generators",
            *names,
            "z only − from scratch",
            "z only − fine-tuned",
        ],
        rows,
    )


def aims_table(
    runs: Sequence[dict], setup: str, opponents: Sequence[dict] = ()
) -> "Markdown":
    """What the course set out to show for z alone, and whether the interval of the
    difference allows to say so.

    Args:
        opponents: the runs of `07_opponents.json`, for the aims against a head.
    """
    aims = [
        (size, ARM_NAMES[arm], least, compare(runs, setup, "z_only", arm, size))
        for size, arm, least in AIMS
    ]
    if opponents:
        number = next(run["experiment"] for run in runs)
        units, head = with_experiment(opponents, runs, setup), OPPONENT_NAMES["head_32"]
        aims += [
            (size, head, least, lead(units, number, "z_recorded", "head_32", size))
            for size, least in HEAD_AIMS
        ]
    rows = [
        [
            f"{size or ALL_IMAGES} images of a class",
            f"z only − {name} at least {100 * least:+.1f}",
            found.percent(),
            _kept(found, least),
        ]
        for size, name, least, found in aims
    ]
    return table(
        ["fitted to", "aim, in points", "measured, mean (95 % interval)", "the aim"],
        rows,
    )


def _kept(found: Interval, least: float) -> str:
    """Whether an aim holds: not by the mean, but by the whole interval."""
    if found.low >= least:
        return "holds"
    return "does not hold" if found.high < least else "open"


def recorded_walk(runs: Sequence[dict], setup: str) -> "Figure":
    """Accuracy along straight lines between two tasks' vectors, a mean over tasks; one
    thin line a run.
    """
    figure, axes = new_figure(width=5.5, height=3.0)
    walks = [run["geometry"]["line"] for run in runs if run["setup"] == setup]
    for end, name, colour in zip(
        ("start", "end"), ("where it starts", "where it ends"), COLOURS, strict=False
    ):
        values = [[100 * share for share in walk[end]] for walk in walks]
        places = [step / (len(values[0]) - 1) for step in range(len(values[0]))]
        for each in values:
            axes.plot(places, each, color=colour, linewidth=0.7, alpha=0.4)
        axes.plot(
            places,
            [fmean(column) for column in zip(*values, strict=True)],
            color=colour,
            label=f"task {name}",
        )
    axes.axhline(50, color=COLOURS[-1], linestyle="--", linewidth=1)
    axes.set(
        xlabel="place on the line between the two task vectors",
        ylabel="test accuracy (%)",
    )
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return figure


def geometry_table(runs: Sequence[dict]) -> "Markdown":
    """Where the task vectors of each recorded run lie, for the runs that measured
    it.
    """
    rows, measured = [], [run for run in runs if "geometry" in run]
    for run in measured:
        found, size = run["geometry"], run["parameters"]["z"]
        few = found["accuracy_in_few_directions"]
        cells = [
            SETUP_NAMES[run["setup"]],
            run["seed"],
            run["fold"],
            f"{found['dimensions_used']:.1f} of {size}",
        ]
        cells.append(
            " / ".join(
                f"{100 * few[count]:.0f}"
                for count in ("1", "4", "16", str(size))
                if count in few
            )
        )
        if "neighbours" in found:
            near = found["neighbours"]
            cells.append(
                f"{100 * near['share']:.0f} % against {100 * near['expected']:.0f} %, p"
                f" = {near['p']:.4f}"
            )
        else:
            cells.append(f"{found['twins']:+.2f}")
        rows.append(cells)
    superclasses = any("neighbours" in run["geometry"] for run in measured)
    last = (
        "same superclass as its nearest neighbour, against chance"
        if superclasses
        else "cosine of twins"
    )
    few_header = "accuracy (%) with 1 / 4 / 16 / all directions kept"
    return table(["set-up", "seed", "fold", "directions used", few_header, last], rows)


def search_gain(run: dict, start: dict, size: int | None = None) -> dict[int, float]:
    """What a run of the search gained over another for z alone, on the validation
    images of each pair: {number of the task: gain}.

    Either is one generator, so the gains describe these two and allow no verdict.
    """
    first, second = (
        task_means([each], each["setup"], "z_only", size, "validation_each")
        for each in (run, start)
    )
    return {task: first[task] - second[task] for task in first}


def search_table(runs: Sequence[dict]) -> "Markdown":
    """The search for a generator: what each run changed, and what z alone then reached
    on validation images.
    """
    (start,) = (run for run in runs if not run["overrides"])
    size = int(min(start["few"], key=int))
    rows = []
    for run in sorted(runs, key=lambda run: -run["arms"]["z_only"]["validation"]):
        changes = _changes(run["overrides"] or {})
        cells = [changes, f"{run['parameters']['generator']:,}"]
        for found, count in ((run["arms"], None), (run["few"][str(size)], size)):
            gains = list(search_gain(run, start, count).values())
            more = sum(gain > 0 for gain in gains)
            said = f"{100 * fmean(gains):+.1f}, {more} of {len(gains)}"
            cells.append(f"{100 * found['z_only']['validation']:.1f}")
            cells.append("–" if run is start else said)
        rows.append(cells)
    gain = "gain in points, pairs that gain"
    sizes = ("all images, %", gain, f"{size} of each class, %", gain)
    return table(["changed", "numbers in the generator", *sizes], rows)


def _changes(overrides: dict) -> str:
    """What a run changed, in words such as "training steps 2000"."""
    words = [
        f"{name.replace('.', ' ').replace('_', ' ')} {value}"
        for name, value in overrides.items()
    ]
    return ", ".join(words) or "**nothing**"
