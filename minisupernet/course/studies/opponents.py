"""The opponents of a task vector, for experiments 1 and 2: one ordinary network for all
classes with a small head for each task, and ordinary training that is long enough.

That one network cannot answer a question and its reverse is true of a classifier, and
false of a network of features with a head for each task. A unit is one group of arms on
one fold, on a target of so many `channels`, its trunk or generator trained for so many
`steps`:

* `heads`: on a trunk trained to tell the trained classes apart, `head`, a logistic
  regression; `head_32`, one on 32 principal directions, as many numbers as z;
  `nearest_mean`, the cosine to class means.
* `questions`: the arms of `heads`, `question_head` and so on, with a trunk that was
  trained by the generator's own questions, each about two classes, in place of telling
  all classes apart: what the generator's labels are worth to one network.
* `prototypes`: a trunk trained by episodes and, on it, the nearest class mean.
* `from_trunk`: the trunk of `heads` with its `head`, from which are fitted `biases`,
  `lora` (each weight matrix plus a product of two vectors) and `trunk_fine_tuned`.
* `prior`: the generator, and z fitted from the mean of the trained ones, `z_only`, or
  with a `Prior`, `z_prior`: z = m + L e, and |e|^2 / 2 added to the summed loss. Of two
  new classes m is 0 and L L' twice the covariance of the class vectors.
* `begun`: z once more, `begun_z` and `begun_z_prior`, through a generator that starts
  as the trunk of `heads`: every network that it makes has that body, and training lets
  z move it. So it knows what the labels of all classes say, and not of two alone.
* `scratch`: all weights from PyTorch's start and from that of He and others (2015), in
  300, 1,000 and 3,000 steps; `scratch_longest` and `he_longest` in 10,000.
* `fine_tuned` and `fine_tuned_longest`: the same from the generator's mean z.

Every arm is recorded by "test", an image alone, and by "test_mirrored", the mean logit
of an image and its mirror image.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from minisupernet.course.records import fingerprint, rounded
from minisupernet.course.studies.arms import Fold, Trained
from minisupernet.course.studies.rates import best_rate
from minisupernet.course.studies.trunk import (
    Lesson,
    Logistic,
    TaskFeatures,
    Trunk,
    measure_head,
    measure_nearest_mean,
)
from minisupernet.course.studies.units import (
    Amount,
    Arms,
    FitAt,
    Plan,
    Prior,
    Unit,
    check_group,
    fit_task_vectors,
    fitted,
    measure_group,
)
from minisupernet.data.tasks import TaskImages
from minisupernet.fitting import Fit, fit_alone, fit_weights
from minisupernet.seeds import step_generator

__all__ = ["GROUPS", "SETTINGS", "Settings", "check_unit", "measure", "prototypes"]

Weights = dict[str, Tensor]
RANK = 32  # principal directions of `head_32`: as many numbers as z has


@dataclass(frozen=True)
class Settings(Amount):
    """How much is done: beside what every study says, `long_sizes` of the arms that
    take long to fit, `long_steps` and `longest` of those that train for longer, and how
    trunks and heads are chosen."""

    sizes: tuple[int | None, ...] = (5, 10, 20, 50, 100, None)
    fit_steps: int = 300
    most: int = 6
    long_sizes: tuple[int | None, ...] = (5, 20, None)
    long_steps: tuple[int, ...] = (300, 1_000, 3_000)
    longest: tuple[int, ...] = (10_000,)
    trial_steps: int = 200
    trunk_rates: tuple[float, ...] = (1e-3, 3e-3, 9e-3)
    strengths: tuple[float, ...] = (1e-3, 1e-2, 1e-1)


SETTINGS = {
    "quick": Settings((5, None), 20, 3, (5,), (10, 30), (60,), trial_steps=5),
    "full": Settings(),
}


def _heads(unit: Unit, by: str = "classes", name: str = "") -> Plan:
    trunk, about = _train_trunk(unit, _lesson(unit, by))
    settings = unit.settings

    def arms_of(data: TaskImages) -> Arms:
        features = TaskFeatures.of(trunk, data)
        short = features.along(trunk.directions[:RANK])
        return {
            f"{name}head": lambda: _head(features, settings)[0],
            f"{name}head_32": lambda: _head(short, settings)[0],
            f"{name}nearest_mean": lambda: measure_nearest_mean(features),
        }

    return Plan(settings.sizes, arms_of, lambda: {"trunk": about})


def _head(features: TaskFeatures, settings: Settings) -> tuple[dict, Logistic]:
    return measure_head(features, settings.strengths, settings.most)


def prototypes(unit: Unit, lesson: Lesson) -> Plan:
    """A network trained by the episodes of a lesson and, on it, the nearest class mean
    (Snell and others, 2017)."""
    trunk, about = _train_trunk(unit, lesson)

    def arms_of(data: TaskImages) -> Arms:
        features = TaskFeatures.of(trunk, data)
        return {"protonet": lambda: measure_nearest_mean(features)}

    return Plan(unit.settings.sizes, arms_of, lambda: {"trunk": about})


def _from_trunk(unit: Unit) -> Plan:
    trunk, about = _train_trunk(unit, _lesson(unit))
    spec = unit.fold.spec

    def arms_of(data: TaskImages) -> Arms:
        _, head = _head(TaskFeatures.of(trunk, data), unit.settings)
        start = spec.join(trunk.with_head(head))  # (T, P)
        biases = [each.name for each in spec.tensors if each.name.endswith("bias")]
        fit = partial(fitted, unit, data)
        return {
            "biases": lambda: fit(1e-3, _weights_fit(unit, data, start, biases)),
            "lora": lambda: fit(1e-3, partial(_fit_lora, unit.fold, data, start)),
            "trunk_fine_tuned": lambda: fit(1e-4, _weights_fit(unit, data, start)),
        }

    return Plan(unit.settings.sizes, arms_of, lambda: {"trunk": about})


def _prior(unit: Unit) -> Plan:
    return _task_vectors(unit, unit.fold.train(unit.checkpoint), "z_only", "z_prior")


def _begun(unit: Unit) -> Plan:
    unkept = replace(unit, checkpoint=None)
    trunk, about = _train_trunk(unkept, _lesson(unit))
    nothing = Logistic(torch.zeros(1, len(trunk.mean)), torch.zeros(1))
    generator = unit.fold.new_generator(unit.fold.seed)
    with torch.no_grad():
        generator.head_weight.zero_()  # z says nothing yet
        generator.head_bias.copy_(unit.fold.spec.join(trunk.with_head(nothing))[0])
    trained = unit.fold.train(unit.checkpoint, generator)
    plan = _task_vectors(unit, trained, "begun_z", "begun_z_prior")
    return plan._replace(about=lambda: plan.about() | {"trunk": about})


def _task_vectors(unit: Unit, trained: Trained, alone: str, with_prior: str) -> Plan:
    """z fitted through a trained generator: from the mean of the trained vectors, and
    with a prior."""
    before = fingerprint(trained.generator)
    prior = Prior.of(trained, unit.fold.tasks.select(unit.numbers))

    def arms_of(data: TaskImages) -> Arms:
        fit = partial(fitted, unit, data)
        plain = partial(fit_task_vectors, trained, data)
        return {
            alone: lambda: fit(3e-3, partial(plain, None)),
            with_prior: lambda: fit(3e-2, partial(plain, prior)),
        }

    def about() -> dict:
        return {
            "generator": {
                "sha256_before": before,
                "sha256_after": fingerprint(trained.generator),
            },
            "history": trained.history.rows,
            "prior": rounded(prior.root.square().sum(0).flip(0)),
        }

    return Plan(unit.settings.long_sizes, arms_of, about)


def _scratch(unit: Unit, starts: Sequence[str], steps: Sequence[int]) -> Plan:
    def arms_of(data: TaskImages) -> Arms:
        found = {}
        for name in starts:
            start = STARTS[name](unit.fold, len(data.tasks))
            found |= _trained_for(unit, data, start, name, steps)
        return found

    return Plan(unit.settings.long_sizes, arms_of)


def _fine_tuned(unit: Unit, steps: Sequence[int]) -> Plan:
    trained = unit.fold.train(unit.checkpoint)
    start = trained.shared_weights()

    def arms_of(data: TaskImages) -> Arms:
        return _trained_for(unit, data, start, "fine_tuned", steps)

    about = {"history": trained.history.rows}
    return Plan(unit.settings.long_sizes, arms_of, lambda: about)


def _trained_for(
    unit: Unit, data: TaskImages, start: Tensor, name: str, steps: Sequence[int]
) -> Arms:
    """Arms that fit all weights from `start`, each for so many steps."""
    fit_at, rate = _weights_fit(unit, data, start), 3e-4
    return {
        f"{name}_{count}": partial(fitted, unit, data, rate, fit_at, count)
        for count in steps
    }


def _he_start(fold: Fold, tasks: int) -> Tensor:
    """Normal weights that keep the length of a signal through leaky ReLU, and biases 0
    (He and others, 2015), (tasks, P)."""
    random = step_generator(fold.seed, -2)
    gain = math.sqrt(2 / (1 + 0.2**2))
    scales = [
        torch.full((each.size,), gain / math.sqrt(each.fan_in))
        if len(each.shape) > 1
        else torch.zeros(each.size)
        for each in fold.spec.tensors
    ]
    scale = torch.cat(scales)
    return torch.randn(tasks, len(scale), generator=random) * scale


def _weights_fit(
    unit: Unit, data: TaskImages, start: Tensor, only: Sequence[str] | None = None
) -> FitAt:
    fold = unit.fold

    def fit_at(fit: Fit) -> Weights:
        flat, _ = fit_weights(fold.spec, fold.target, data, fit, start, only)
        return fold.spec.split(flat)

    return fit_at


def _fit_lora(fold: Fold, data: TaskImages, start: Tensor, fit: Fit) -> Weights:
    """Each weight matrix, or kernel laid out as one, plus a b' (Hu and others, 2021):
    a starts at 0 and b at random."""
    fixed, random = fold.spec.split(start), step_generator(fit.seed, -3)
    matrices = {n: w.flatten(2) for n, w in fixed.items() if w.ndim > 2}  # (T, out, in)
    a = [nn.Parameter(torch.zeros(each.shape[:2])) for each in matrices.values()]
    b = [
        nn.Parameter(torch.randn(len(start), wide, generator=random) / math.sqrt(wide))
        for wide in (each.shape[2] for each in matrices.values())
    ]

    def weights() -> Weights:
        products = [
            torch.einsum("to,ti->toi", *each) for each in zip(a, b, strict=True)
        ]
        moved = {
            name: fixed[name] + product.view_as(fixed[name])
            for name, product in zip(matrices, products, strict=True)
        }
        return {**fixed, **moved}

    factors = nn.ParameterList([*a, *b])
    fit_alone(factors, weights, list(factors), [], fold.target, data, fit)
    return {name: own.detach() for name, own in weights().items()}


def _lesson(unit: Unit, by: str = "classes") -> Lesson:
    """One of as many images a step as the generator is shown."""
    fit = unit.fold.setup.training
    return Lesson.of(unit.fold, fit.images * fit.tasks, by)


def _train_trunk(unit: Unit, lesson: Lesson) -> tuple[Trunk, dict]:
    """The trunk at the rate that a short run found best, and what its training took."""
    steps, settings = unit.fold.setup.training.steps, unit.settings

    def trial(rate: float) -> tuple[float, None]:
        _, history = lesson.train(rate, settings.trial_steps)
        return round(history.last("validation_accuracy"), 4), None

    def choose() -> dict:
        chosen = best_rate(settings.trunk_rates, trial, settings.most)
        return {"rate": chosen.rate, "tried": chosen.tried}

    about = unit.once("trunk", choose)
    network, history = lesson.train(about["rate"], steps, unit.checkpoint)
    unit.report(f"trunk: {history.rows[-1]}")
    found = {"classes": len(lesson.classes), "history": history.rows}
    return Trunk(network, lesson), about | found | {"sha256": fingerprint(network)}


STARTS = {"scratch": Fold.ordinary_start, "he": _he_start}
GROUPS: dict[str, Callable[[Unit], Plan]] = {
    "heads": _heads,
    "questions": partial(_heads, by="questions", name="question_"),
    "prototypes": lambda unit: prototypes(unit, _lesson(unit, "episodes")),
    "from_trunk": _from_trunk,
    "prior": _prior,
    "begun": _begun,
    "scratch": lambda unit: _scratch(unit, tuple(STARTS), unit.settings.long_steps),
    "scratch_longest": lambda unit: _scratch(unit, ("scratch",), unit.settings.longest),
    "he_longest": lambda unit: _scratch(unit, ("he",), unit.settings.longest),
    "fine_tuned": lambda unit: _fine_tuned(unit, unit.settings.long_steps),
    "fine_tuned_longest": lambda unit: _fine_tuned(unit, unit.settings.longest),
}

# as `check_group` and `measure_group` take a unit
check_unit = partial(check_group, GROUPS)
measure = partial(measure_group, GROUPS, SETTINGS)
