"""The settings of experiments 1 and 2: the original's, a better generator's, and one
trained on many more tasks.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from math import inf

from minisupernet.data.tasks import usable_folds
from minisupernet.errors import SetupError
from minisupernet.fitting import Fit

__all__ = [
    "SETUPS",
    "Setup",
    "better",
    "make_setup",
    "many_tasks",
    "original",
    "search",
    "unseen_pairs",
]

Rates = dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Setup:
    """All settings of one experiment.

    `rates` lists, for each arm that is fitted, the learning rates to try; the one with
    the best mean validation accuracy over the held-out tasks counts. `few_rates` does
    so for the arms measured again with few images a class, as many as `sizes` says.
    `unfrozen` is how many held-out tasks also run the original's unfrozen code.
    """

    name: str
    experiment: int
    training: Fit
    adaptation: Fit
    rates: Rates
    z_dim: int = 16
    hidden: tuple[int, ...] = (64,)
    faithful: bool = False  # the original's generator, classifier and start
    one_hot: bool = False  # z of a trained task is a unit vector, none is learned
    raw: bool = False  # pixels from 0 to 255, not normalised
    bound: float | None = None  # the largest absolute weight, by tanh
    z_share: float = 0.2  # of the variance at the start
    channels: int = 16  # of the classifier's convolutions
    # train on every pair of the trained tasks' classes, z being a difference of class
    # vectors
    many_tasks: bool = False
    # with many tasks: the share of the drawn ones that are the experiment's own, not
    # pairs
    own_share: float = 0.0
    augmentation: dict[str, int] = field(default_factory=dict)
    unfrozen: int = 0
    # experiment 2: hold out both orientations of a pair, not only the reversed one
    pairs: bool = False
    # disjoint sets of held-out tasks, which together are all that can be held out
    folds: int = 5
    sizes: tuple[int, ...] = ()
    few_rates: Rates = field(default_factory=dict)

    def check(self) -> None:
        """Raise a SetupError for the first number that is out of its range, for an arm
        without a rate, and for an optimiser that does not exist."""
        for name, value in _numbers(asdict(self)):
            known = [part for part in name.split(".") if part in RANGES]
            low, high = RANGES[known[-1]]
            if not (value > 0 if high == inf else low <= value <= high):
                wanted = "above 0" if high == inf else f"from {low:,} to {high:,}"
                raise SetupError(f"{name} must be {wanted}, not {value}.")
        for arm, tried in (self.rates | self.few_rates).items():
            if not tried:
                raise SetupError(f"rates.{arm} needs at least one rate.")
        for fit in (self.training, self.adaptation):
            if fit.optimizer not in OPTIMIZERS:
                raise SetupError(
                    f"there is no optimiser '{fit.optimizer}'; use"
                    f" {' or '.join(OPTIMIZERS)}."
                )

    def for_classes(self, classes: int) -> "Setup":
        """The same, with as few folds as let each hold out two of the tasks that so
        many classes make."""
        folds = usable_folds(self.experiment, self.folds, classes)
        return replace(self, folds=folds)


RANGES: dict[str, tuple[float, float]] = {  # of each number: the least and the most
    "experiment": (1, 2),
    "seed": (0, 2**31 - 1),
    "steps": (1, 10**8),
    "every": (1, 10**8),
    "images": (1, 10**5),
    "tasks": (1, 10**5),
    "rate": (0, inf),
    "z_rate": (0, inf),
    "rates": (0, inf),
    "few_rates": (0, inf),
    "decay": (0, 10**6),
    "z_decay": (0, 10**6),
    "z_dim": (1, 10**4),
    "hidden": (1, 10**5),
    "channels": (1, 10**4),
    "bound": (0, inf),
    "z_share": (0, 1),
    "own_share": (0, 0.99),
    "flip": (0, 1),
    "crop": (0, 31),
    "cutout": (0, 32),
    "unfrozen": (0, 10**5),
    "folds": (2, 10**4),
    "sizes": (1, 10**6),
}
OPTIMIZERS = ("adamw", "tensorflow-rmsprop")


def _numbers(settings: dict, before: str = "") -> Iterator[tuple[str, float]]:
    """Every number among settings, with dots where they lie inside others."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{before}{name}.")
        for each in value if isinstance(value, tuple) else [value]:
            if type(each) in (int, float):
                yield before + name, each


def original(experiment: int, profile: str = "full") -> Setup:
    """The original's set-up: one-hot z, bare tanh heads, raw pixels, TensorFlow's
    RMSProp at 1e-4, one task a step.

    Full: 50,000 steps of 20 images, then 1,000 steps on each new task. Its new z is the
    sum of two equal vectors, which RMSProp moves by the same step each: one vector at
    twice the rate.
    """
    full = _is_full(experiment, profile)
    training = Fit(
        50_000 if full else 2_000,
        1e-4,
        images=20,
        tasks=1,
        optimizer="tensorflow-rmsprop",
        cycle=False,
        every=5_000,
    )
    adaptation = replace(
        training, steps=1_000 if full else 200, tasks=None, every=1_000
    )
    rates = {
        "z_only": (2e-4,),
        "random_generator": (2e-4,),
        "from_scratch": (1e-4,),
        "fine_tuned": (1e-4,),
    }
    return Setup(
        "original",
        experiment,
        training,
        adaptation,
        rates,
        100,
        (),
        faithful=True,
        one_hot=True,
        raw=True,
        unfrozen=4 if full else 0,
        folds=_small_folds(experiment),
    )


def better(experiment: int, profile: str = "full") -> Setup:
    """A better generator: 16 learned numbers a task, one hidden layer, ordinary
    starting scale, normalised images.
    """
    full, folds = _is_full(experiment, profile), _small_folds(experiment)
    if not full:  # no augmentation: too short to overfit
        training, adaptation = (
            Fit(240, 2e-3, tasks=24, images=16, every=60),
            Fit(80, images=16, every=1_000),
        )
        rates = {
            "z_only": (1e-1,),
            "random_generator": (1e-1,),
            "from_scratch": (3e-3,),
            "fine_tuned": (1e-3,),
        }
        return Setup("better", experiment, training, adaptation, rates, folds=folds)
    rates = {
        "z_only": (3e-2, 1e-1, 3e-1),
        "random_generator": (3e-2, 1e-1, 3e-1),
        "from_scratch": (3e-4, 1e-3, 3e-3),
        "fine_tuned": (1e-4, 3e-4, 1e-3),
    }
    augmentation = {"flip": 1, "crop": 4, "cutout": 10 if experiment == 1 else 0}
    adaptation = Fit(300, every=1_000)
    return Setup(
        "better",
        experiment,
        Fit(700, 1e-3, tasks=40),
        adaptation,
        rates,
        augmentation=augmentation,
        folds=folds,
    )


def many_tasks(experiment: int, profile: str = "full") -> Setup:
    """The better generator, trained on every question its images can ask: "a or b?" for
    any two classes of the trained tasks, held-out tasks excepted. z is a difference of
    class vectors, 32 numbers."""
    setup = better(experiment, profile)
    if profile == "quick":
        return replace(setup, name="many_tasks", many_tasks=True, z_dim=32, folds=5)
    first = experiment == 1
    # a single rate was the best of three on the validation images of fold 0, with
    # smaller and larger ones
    rates = {
        "z_only": (1e-2 if first else 3e-2,),
        "random_generator": (3e-2, 1e-1),
        "from_scratch": (1e-3, 3e-3) if first else (3e-3,),
        "fine_tuned": (1e-3, 3e-3, 1e-2),
        "last_layer": (3e-2, 1e-1, 3e-1),
        "biases": (3e-2, 1e-1, 3e-1),
    }
    few_rates = {
        "z_only": (1e-2,),
        "fine_tuned": (3e-4 if first else 3e-3,),
        "from_scratch": (3e-3, 1e-2) if first else (1e-3,),
    }
    if first:  # in experiment 2 one network is at chance by construction
        rates["one_network"] = (1e-3,)
    return replace(
        setup,
        name="many_tasks",
        many_tasks=True,
        own_share=0.5 if first else 0.0,
        z_dim=32,
        folds=5,
        training=replace(setup.training, steps=2_000, every=500),
        rates=rates,
        few_rates=few_rates,
        sizes=(5, 10, 20, 50, 100),
    )


def unseen_pairs(experiment: int = 2, profile: str = "full") -> Setup:
    """Experiment 2 by `many_tasks`, on pairs whose two classes it never met, in either
    orientation.
    """
    if experiment != 2:
        raise SetupError(
            "only experiment 2 has pairs; use 'better' or 'many_tasks' for"
            " experiment 1."
        )
    return replace(many_tasks(2, profile), name="unseen_pairs", pairs=True)


def search(experiment: int = 2, profile: str = "full") -> Setup:
    """What the search for a generator varies: that of many tasks, trained a third as
    long, and z alone fitted.
    """
    setup = (many_tasks if experiment == 1 else unseen_pairs)(experiment, profile)
    z_only = {"z_only": (1e-2, 3e-2)}
    training = replace(setup.training, steps=min(setup.training.steps, 700))
    return replace(
        setup,
        name="search",
        training=training,
        rates=z_only,
        few_rates=z_only,
        sizes=(20,),
    )


SETUPS = {
    "original": original,
    "better": better,
    "many_tasks": many_tasks,
    "unseen_pairs": unseen_pairs,
    "search": search,
}


def make_setup(name: str, experiment: int, profile: str = "full") -> Setup:
    """The set-up of this name.

    Raises:
        SetupError: where there is no such set-up, experiment or profile.
    """
    if name not in SETUPS:
        raise SetupError(
            f"there is no set-up '{name}'; use one of {', '.join(SETUPS)}."
        )
    return SETUPS[name](experiment, profile)


def _is_full(experiment: int, profile: str) -> bool:
    if experiment not in (1, 2):
        raise SetupError(f"there is no experiment {experiment}; choose 1 or 2.")
    if profile not in ("quick", "full"):
        raise SetupError(f"there is no profile '{profile}'; use 'quick' or 'full'.")
    return profile == "full"


def _small_folds(experiment: int) -> int:
    """9 folds of 11 tasks in experiment 1, 5 of 10 reversed tasks in experiment 2."""
    return {1: 9, 2: 5}[experiment]
