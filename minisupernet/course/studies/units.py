"""Units of a long study of experiments 1 and 2: one group of arms on one fold, which
goes on after a kill, and the fits that such arms are made of.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minisupernet.course.records import once, rounded
from minisupernet.course.studies.arms import Fold, Trained
from minisupernet.course.studies.rates import best_rate
from minisupernet.course.studies.setups import Setup, many_tasks, unseen_pairs
from minisupernet.data import ImageSet
from minisupernet.data.tasks import BinaryTasks, TaskImages
from minisupernet.errors import StudyError
from minisupernet.fitting import Fit, fit_alone
from minisupernet.target import run_tasks
from minisupernet.training import frozen

__all__ = [
    "Amount",
    "Arms",
    "FitAt",
    "Plan",
    "Prior",
    "Report",
    "Unit",
    "accuracies",
    "check_group",
    "fit_task_vectors",
    "fitted",
    "measure_group",
]

Weights = dict[str, Tensor]
Report = Callable[[str], None]
FitAt = Callable[[Fit], Weights]
Arms = dict[str, Callable[[], dict]]  # each measures one arm, for the record


@dataclass(frozen=True)
class Amount:
    """How much is done.

    `sizes` are training images of a class, None for all but the validation images, and
    `fit_steps` how long an arm is fitted to them. Every choice starts from three
    candidates, a factor 3 or 10 apart, and goes on where the best is at an edge, to
    `most` at the most.
    """

    sizes: tuple[int | None, ...]
    fit_steps: int
    most: int


@dataclass(frozen=True, eq=False)
class Unit:
    """One group of arms on one fold: the held-out tasks' `numbers`, how much is done,
    and the checkpoint from which a killed unit goes on."""

    fold: Fold
    numbers: list[int]
    settings: Amount
    report: Report
    checkpoint: Path | None

    def once(self, name: str, measure: Callable[[], dict]) -> dict:
        """What `measure` returns, kept beside the checkpoint so that a killed unit does
        not measure it again."""
        return once(self._so_far, name, measure)

    def forget(self) -> None:
        """Remove what was kept for a unit that is killed."""
        if self._so_far:
            self._so_far.unlink(missing_ok=True)

    @property
    def _so_far(self) -> Path | None:
        return self.checkpoint and self.checkpoint.with_suffix(".so_far")


class Plan(NamedTuple):
    """What a group does: the arms to be measured on some tasks' images, at so many
    `sizes`, and what the record says at the end of what they stand on."""

    sizes: tuple[int | None, ...]
    arms_of: Callable[[TaskImages], dict[str, Callable[[], dict]]]
    about: Callable[[], dict] = dict


Group = Callable[[Unit], Plan]


def check_group(
    groups: Mapping[str, Group],
    of_experiment: int,
    fold: int,
    group: str,
    channels: int,
    steps: int,
) -> None:
    """Raise a StudyError where there is no such unit, or a SetupError for channels or
    steps that are out of their range."""
    if group not in groups:
        raise StudyError(f"there is no group '{group}'; choose of {', '.join(groups)}.")
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


def measure_group(
    groups: Mapping[str, Group],
    settings: Mapping[str, Amount],
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
        groups: name to what each does.
        settings: profile to how much is done.
        of_experiment: 1, or 2 for pairs of classes that no question was about.
        channels: of the target's convolutions.
        steps: of the training of the trunk or the generator; 0 for the set-up's.

    Raises:
        StudyError: for a unit that does not exist.
        SetupError: for channels or steps that are out of their range.
    """
    check_group(groups, of_experiment, fold, group, channels, steps)
    setup, first = _setup(of_experiment, profile, channels, steps), of_experiment == 1
    held = Fold.of(setup, images, seed, fold)
    half = len(held.tasks) // 2
    numbers = [number for number in held.held_out if first or number < half]
    unit = Unit(held, numbers, settings[profile], report, checkpoint)
    found = _carry_out(unit, groups[group])
    return {
        "of_experiment": of_experiment,
        "fold": fold,
        "group": group,
        "channels": channels,
        "steps": setup.training.steps,
        "settings": asdict(unit.settings),
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


def fitted(
    unit: Unit, data: TaskImages, rate: float, fit_at: FitAt, steps: int | None = None
) -> dict:
    """An arm at the best of its rates, a factor 3 apart and the first one `rate`."""
    fold, steps = unit.fold, unit.settings.fit_steps if steps is None else steps

    def trial(rate: float) -> tuple[float, Weights]:
        weights = fit_at(replace(fold.fit_at(rate), steps=steps))
        alone, _ = accuracies(fold.target, weights, data, "validation")
        return round(fmean(rounded(alone)), 4), weights

    chosen = best_rate((rate, 3 * rate, 9 * rate), trial, unit.settings.most)
    alone, mirrored = accuracies(fold.target, chosen.result, data, "test")
    found = {"rate": chosen.rate, "test": rounded(alone)}
    return found | {"test_mirrored": rounded(mirrored), "tried": chosen.tried}


@torch.no_grad()
def accuracies(
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


def fit_task_vectors(
    trained: Trained,
    data: TaskImages,
    prior: Prior | None,
    fit: Fit,
    start: Tensor | None = None,
) -> Weights:
    """Fit z itself, from the mean of the trained ones or another `start`, or the e of z
    = mean + L e under a prior."""
    fold, generator = trained.fold, trained.generator
    if prior is not None:
        start = torch.zeros(generator.z_dim)
    elif start is None:
        start = trained.mean_z()
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
