"""The opponents of a task vector, for experiments 1 and 2: one ordinary network for all
classes with a small head for each task, and ordinary training that is long enough.

That one network cannot answer a question and its reverse is true of a classifier, and
false of a network of features with a head for each task. A unit is one group of arms on
one fold, on a target of so many `channels`, its trunk or generator trained for so many
`steps`:

* `heads`: on a trunk trained to tell the trained classes apart, `head`, a logistic
  regression; `head_32`, one on 32 principal directions, as many numbers as z;
  `nearest_mean`, the cosine to class means.
* `prototypes`: a trunk trained by episodes and, on it, the nearest class mean.
* `from_trunk`: the trunk of `heads` with its `head`, from which are fitted `biases`,
  `lora` (each weight matrix plus a product of two vectors) and `trunk_fine_tuned`.
* `prior`: the generator, and z fitted from the mean of the trained ones, `z_only`, or
  with a `Prior`, `z_prior`: z = m + L e, and |e|^2 / 2 added to the summed loss. Of two
  new classes m is 0 and L L' twice the covariance of the class vectors.
* `scratch`: all weights from PyTorch's start and from that of He and others (2015), in
  300, 1,000 and 3,000 steps; `scratch_longest` and `he_longest` in 10,000.
* `fine_tuned` and `fine_tuned_longest`: the same from the generator's mean z.

Every arm is recorded by "test", an image alone, and by "test_mirrored", the mean logit
of an image and its mirror image.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minisupernet.course.records import fingerprint, rounded
from minisupernet.course.studies.arms import Fold, Trained
from minisupernet.course.studies.rates import best_rate
from minisupernet.course.studies.setups import Setup, many_tasks, unseen_pairs
from minisupernet.course.studies.trunk import (
    Lesson,
    Logistic,
    TaskFeatures,
    Trunk,
    measure_head,
    measure_nearest_mean,
)
from minisupernet.data import ImageSet
from minisupernet.data.tasks import BinaryTasks, TaskImages
from minisupernet.errors import StudyError
from minisupernet.files import whole_file
from minisupernet.fitting import Fit, fit_alone, fit_weights
from minisupernet.seeds import step_generator
from minisupernet.target import run_tasks
from minisupernet.training import frozen

__all__ = ["GROUPS", "Prior", "Settings", "check_unit", "measure"]

Weights = dict[str, Tensor]
Report = Callable[[str], None]
FitAt = Callable[[Fit], Weights]
Arms = dict[str, Callable[[], dict]]  # each measures one arm, for the record
RANK = 32  # principal directions of `head_32`: as many numbers as z has


@dataclass(frozen=True)
class Settings:
    """How much is done.

    `sizes` are training images of a class, None for all but the validation images, and
    `fit_steps` how long an arm is fitted to them; `long_sizes`, `long_steps` and
    `longest` are those of the arms that train for longer.
    Every choice starts from three candidates, a factor 3 or 10 apart, and goes on where
    the best is at an edge, to `most` at the most.
    """

    sizes: tuple[int | None, ...] = (5, 10, 20, 50, 100, None)
    fit_steps: int = 300
    long_sizes: tuple[int | None, ...] = (5, 20, None)
    long_steps: tuple[int, ...] = (300, 1_000, 3_000)
    longest: tuple[int, ...] = (10_000,)
    trial_steps: int = 200
    trunk_rates: tuple[float, ...] = (1e-3, 3e-3, 9e-3)
    strengths: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    most: int = 6


FULL = Settings()
QUICK = Settings((5, None), 20, (5,), (10, 30), (60,), trial_steps=5, most=3)


@dataclass(frozen=True, eq=False)
class Unit:
    """One group of arms on one fold: the held-out tasks' `numbers`, how much is done,
    and the checkpoint from which a killed unit goes on."""

    fold: Fold
    numbers: list[int]
    settings: Settings
    report: Report
    checkpoint: Path | None

    def once(self, name: str, measure: Callable[[], dict]) -> dict:
        """What `measure` returns, kept beside the checkpoint so that a killed unit does
        not measure it again."""
        done = {}
        if self.checkpoint is None:
            return measure()
        if self._so_far.exists():
            done = json.loads(self._so_far.read_text(encoding="utf-8"))
        if name not in done:
            done[name] = measure()
            with whole_file(self._so_far) as part:
                part.write_text(json.dumps(done), encoding="utf-8")
        return done[name]

    def forget(self) -> None:
        """Remove what was kept for a unit that is killed."""
        if self.checkpoint is not None:
            self._so_far.unlink(missing_ok=True)

    @property
    def _so_far(self) -> Path:
        return self.checkpoint.with_suffix(".so_far")


class Prior(NamedTuple):
    """What is known of new tasks' z = u_a - u_b before their images are seen: normal,
    with this `mean` (T, z_dim) and covariance L L', L being the `root`.

    A class that training asked about has its vector; one that is new is drawn as the
    others were.
    """

    mean: Tensor
    root: Tensor

    @classmethod
    def of(cls, trained: Trained, tasks: BinaryTasks) -> "Prior":
        """That of these held-out tasks, each of which has as many new classes."""
        met = dict(zip(trained.fold.training_tasks().classes, trained.u, strict=True))
        others = torch.stack([u for c, u in met.items() if c not in tasks.classes])
        first, second = (
            torch.stack([met.get(c, others.mean(0)) for c in side])
            for side in (tasks.positive, tasks.negative)
        )
        new = sum(c not in met for c in (tasks.positive[0], tasks.negative[0]))
        values, directions = torch.linalg.eigh(new * torch.cov(others.T))
        return cls(first - second, directions * values.clamp(min=0).sqrt())


class Plan(NamedTuple):
    """What a group does: the arms to be measured on some tasks' images, at so many
    `sizes`, and what the record says at the end of what they stand on."""

    sizes: tuple[int | None, ...]
    arms_of: Callable[[TaskImages], dict[str, Callable[[], dict]]]
    about: Callable[[], dict] = dict


def check_unit(
    of_experiment: int, fold: int, group: str, channels: int, steps: int
) -> None:
    """Raise a StudyError where there is no such unit, or a SetupError for channels or
    steps that are out of their range."""
    if group not in GROUPS:
        raise StudyError(f"there is no group '{group}'; choose of {', '.join(GROUPS)}.")
    setup = _setup(of_experiment, "full", channels, steps)
    if not 0 <= fold < setup.folds:
        raise StudyError(f"there is no fold {fold}; choose 0 to {setup.folds - 1}.")


def _setup(of_experiment: int, profile: str, channels: int, steps: int) -> Setup:
    make = unseen_pairs if of_experiment == 2 else many_tasks
    setup = make(of_experiment, profile)
    training = replace(setup.training, steps=steps or setup.training.steps)
    setup = replace(setup, channels=channels, training=training)
    setup.check()
    return setup


def measure(
    images: ImageSet,
    seed: int,
    profile: str,
    report: Report,
    checkpoint: Path | None,
    of_experiment: int,
    fold: int,
    group: str,
    channels: int,
    steps: int,
) -> dict:
    """One group of arms on the held-out tasks of one fold; a dict ready for JSON.

    Args:
        of_experiment: 1, or 2 for pairs of classes that no question was about.
        group: a key of `GROUPS`.
        channels: of the target's convolutions.
        steps: of the training of the trunk or the generator; 0 for the set-up's.

    Raises:
        StudyError: for a unit that does not exist.
        SetupError: for channels or steps that are out of their range.
    """
    check_unit(of_experiment, fold, group, channels, steps)
    setup, first = _setup(of_experiment, profile, channels, steps), of_experiment == 1
    held = Fold.of(setup, images, seed, fold)
    half = len(held.tasks) // 2
    numbers = [number for number in held.held_out if first or number < half]
    settings = QUICK if profile == "quick" else FULL
    found = _carry_out(Unit(held, numbers, settings, report, checkpoint), GROUPS[group])
    return {
        "of_experiment": of_experiment,
        "fold": fold,
        "group": group,
        "channels": channels,
        "steps": setup.training.steps,
        "settings": asdict(settings),
        "weights": held.spec.size,
        "held_out": numbers,
        **found,
    }


def _carry_out(unit: Unit, group: Callable[[Unit], Plan]) -> dict:
    plan, few = group(unit), {}
    for size in plan.sizes:
        name = "all" if size is None else str(size)
        arms = plan.arms_of(unit.fold.data(unit.numbers, size))
        found = {arm: unit.once(f"{arm} {name}", run) for arm, run in arms.items()}
        few[name] = found
        said = [f"{arm} {fmean(each['test']):.3f}" for arm, each in found.items()]
        unit.report(f"{name} images a class: {', '.join(said)}")
    unit.forget()
    return {**plan.about(), "few": few}


def _heads(unit: Unit) -> Plan:
    trunk, about = _train_trunk(unit)
    settings = unit.settings

    def arms_of(data: TaskImages) -> Arms:
        features = TaskFeatures.of(trunk, data)
        short = features.along(trunk.directions[:RANK])
        return {
            "head": lambda: _head(features, settings)[0],
            "head_32": lambda: _head(short, settings)[0],
            "nearest_mean": lambda: measure_nearest_mean(features),
        }

    return Plan(settings.sizes, arms_of, lambda: {"trunk": about})


def _head(features: TaskFeatures, settings: Settings) -> tuple[dict, Logistic]:
    return measure_head(features, settings.strengths, settings.most)


def _prototypes(unit: Unit) -> Plan:
    trunk, about = _train_trunk(unit, episodes=True)

    def arms_of(data: TaskImages) -> Arms:
        features = TaskFeatures.of(trunk, data)
        return {"protonet": lambda: measure_nearest_mean(features)}

    return Plan(unit.settings.sizes, arms_of, lambda: {"trunk": about})


def _from_trunk(unit: Unit) -> Plan:
    trunk, about = _train_trunk(unit)
    spec = unit.fold.spec

    def arms_of(data: TaskImages) -> Arms:
        _, head = _head(TaskFeatures.of(trunk, data), unit.settings)
        start = spec.join(trunk.with_head(head))  # (T, P)
        biases = [each.name for each in spec.tensors if each.name.endswith("bias")]
        fitted = partial(_fitted, unit, data)
        return {
            "biases": lambda: fitted(1e-3, _weights_fit(unit, data, start, biases)),
            "lora": lambda: fitted(1e-3, partial(_fit_lora, unit.fold, data, start)),
            "trunk_fine_tuned": lambda: fitted(1e-4, _weights_fit(unit, data, start)),
        }

    return Plan(unit.settings.sizes, arms_of, lambda: {"trunk": about})


def _prior(unit: Unit) -> Plan:
    trained = unit.fold.train(unit.checkpoint)
    before = fingerprint(trained.generator)
    prior = Prior.of(trained, unit.fold.tasks.select(unit.numbers))

    def arms_of(data: TaskImages) -> Arms:
        fitted = partial(_fitted, unit, data)
        plain = partial(_fit_z, trained, data)
        return {
            "z_only": lambda: fitted(3e-3, partial(plain, None)),
            "z_prior": lambda: fitted(3e-2, partial(plain, prior)),
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

    return Plan(unit.settings.sizes, arms_of, about)


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
        f"{name}_{count}": partial(_fitted, unit, data, rate, fit_at, count)
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


def _fit_z(
    trained: Trained, data: TaskImages, prior: Prior | None, fit: Fit
) -> Weights:
    """Fit z itself, from the mean of the trained ones, or the e of z = mean + L e under
    a prior."""
    fold, generator = trained.fold, trained.generator
    start = trained.mean_z() if prior is None else torch.zeros(generator.z_dim)
    e = nn.Parameter(start.expand(len(data.tasks), -1).clone())
    counts = data.splits["train"].counts[data.classes].sum(1, keepdim=True)  # (T, 1)

    def weights() -> Weights:
        return generator(e if prior is None else prior.mean + e @ prior.root.T)

    def penalty() -> Tensor:
        return (e.square() / (2 * counts)).sum()  # the loss is a mean over the images

    state, added = nn.ParameterDict({"e": e}), None if prior is None else penalty
    with frozen(generator):
        fit_alone(state, weights, [], [e], fold.target, data, fit, penalty=added)
    with torch.no_grad():
        return weights()


def _fitted(
    unit: Unit, data: TaskImages, rate: float, fit_at: FitAt, steps: int | None = None
) -> dict:
    """An arm at the best of its rates, a factor 3 apart and the first one `rate`."""
    fold, steps = unit.fold, unit.settings.fit_steps if steps is None else steps

    def trial(rate: float) -> tuple[float, Weights]:
        weights = fit_at(replace(fold.fit_at(rate), steps=steps))
        alone, _ = _accuracies(fold.target, weights, data, "validation")
        return round(fmean(rounded(alone)), 4), weights

    chosen = best_rate((rate, 3 * rate, 9 * rate), trial, unit.settings.most)
    alone, mirrored = _accuracies(fold.target, chosen.result, data, "test")
    found = {"rate": chosen.rate, "test": rounded(alone)}
    return found | {"test_mirrored": rounded(mirrored), "tried": chosen.tried}


@torch.no_grad()
def _accuracies(
    target: nn.Module, weights: Weights, data: TaskImages, split: str
) -> Tensor:
    """Accuracy of each task, (2, T): of an image alone, and by the mean logit of it and
    its mirror image."""
    right = count = 0
    for images, labels, real in data.chunks(split):
        alone = run_tasks(target, weights, images)  # (T, b)
        mirror = run_tasks(target, weights, images.flip(-1))
        logits = torch.stack([alone, (alone + mirror) / 2])
        right = right + (((logits > 0) == (labels > 0)) & real).sum(2)
        count = count + real.sum(1)
    return right / count


def _train_trunk(unit: Unit, episodes: bool = False) -> tuple[Trunk, dict]:
    """The trunk at the rate that a short run found best, and what its training took."""
    settings, fit = unit.settings, unit.fold.setup.training
    lesson = Lesson.of(unit.fold, fit.images * fit.tasks, episodes)

    def trial(rate: float) -> tuple[float, None]:
        _, history = lesson.train(rate, settings.trial_steps)
        return round(history.last("validation_accuracy"), 4), None

    def choose() -> dict:
        chosen = best_rate(settings.trunk_rates, trial, settings.most)
        return {"rate": chosen.rate, "tried": chosen.tried}

    about = unit.once("trunk", choose)
    network, history = lesson.train(about["rate"], fit.steps, unit.checkpoint)
    unit.report(f"trunk: {history.rows[-1]}")
    found = {"classes": len(lesson.classes), "history": history.rows}
    return Trunk(network, lesson), about | found | {"sha256": fingerprint(network)}


STARTS = {"scratch": Fold.ordinary_start, "he": _he_start}
GROUPS: dict[str, Callable[[Unit], Plan]] = {
    "heads": _heads,
    "prototypes": _prototypes,
    "from_trunk": _from_trunk,
    "prior": _prior,
    "scratch": lambda unit: _scratch(unit, tuple(STARTS), unit.settings.long_steps),
    "scratch_longest": lambda unit: _scratch(unit, ("scratch",), unit.settings.longest),
    "he_longest": lambda unit: _scratch(unit, ("he",), unit.settings.longest),
    "fine_tuned": lambda unit: _fine_tuned(unit, unit.settings.long_steps),
    "fine_tuned_longest": lambda unit: _fine_tuned(unit, unit.settings.longest),
}
