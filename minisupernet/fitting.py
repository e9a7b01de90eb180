"""Fitting many networks side by side: how a fit is done, ordinary weights as the thing
fitted, and accuracy.

What is fitted differs from arm to arm of an experiment (all weights, some of them, a
task vector); images, steps and batch order do not.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minisupernet.data.tasks import BinaryTasks, TaskImages, which_class
from minisupernet.errors import FitError
from minisupernet.optimizers import TensorFlowRMSprop
from minisupernet.supernet import SuperNet, TaskVectors
from minisupernet.target import WeightSpec, run_tasks
from minisupernet.training import History, constant, frozen, one_cycle, train

__all__ = [
    "Fit",
    "accuracy",
    "answers",
    "class_accuracy",
    "fit_alone",
    "fit_shared",
    "fit_weights",
    "fit_z",
    "for_each_task",
    "minimise",
    "train_generator",
]

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Fit:
    """How a network, a z or a generator is fitted; the same for every arm of an
    experiment but for the rate.

    `images` a task and step; `tasks` at each step (None: all); `rate` of the weights,
    `z_rate` of task vectors, and their weight decays `decay` and `z_decay`; `optimizer`
    "adamw" or "tensorflow-rmsprop"; `cycle`: one-cycle schedule, else a constant rate.
    """

    steps: int
    rate: float = 1e-3
    z_rate: float = 1e-2
    images: int = 20
    tasks: int | None = None
    seed: int = 0
    optimizer: str = "adamw"
    decay: float = 1e-2
    z_decay: float = 0.0
    cycle: bool = True
    every: int = 100

    @property
    def schedule(self) -> Callable[[float], float]:
        """How the rates move, as `train` takes it."""
        return one_cycle if self.cycle else constant

    def make_optimizer(
        self, weights: list[Tensor], z: list[Tensor]
    ) -> torch.optim.Optimizer:
        """An optimiser over weights and task vectors, each with its own rate and weight
        decay.
        """
        groups = [
            {"params": weights, "lr": self.rate, "weight_decay": self.decay},
            {"params": z, "lr": self.z_rate, "weight_decay": self.z_decay},
        ]
        groups = [group for group in groups if group["params"]]
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, fused=True)
        if self.optimizer == "tensorflow-rmsprop":
            return TensorFlowRMSprop(
                [
                    {k: v for k, v in group.items() if k != "weight_decay"}
                    for group in groups
                ]
            )
        raise FitError(
            f"there is no optimiser '{self.optimizer}'; choose 'adamw' or"
            " 'tensorflow-rmsprop'."
        )


def minimise(
    state: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_at: Callable[[int], Tensor],
    fit: Fit,
    measure: Callable[[], Tensor],
    checkpoint: Path | None = None,
    run: dict[str, str] | None = None,
) -> History:
    """Run the training loop as `fit` says; `measure` gives the validation accuracies of
    a look, one a task.

    `run` is what else tells this run from another that finds its checkpoint.
    """
    return train(
        state,
        optimizer,
        loss_at,
        fit.steps,
        schedule=fit.schedule,
        every=fit.every,
        evaluate=lambda: {"validation_accuracy": measure().mean().item()},
        checkpoint=checkpoint,
        run=run,
    )


def answers(target: nn.Module, weights: Weights, images: Tensor) -> Tensor:
    """The logits of T networks that each answer one question, (T, B): `run_tasks` on
    images (T, B, ...).

    Raises:
        FitError: where the target does not give one number an image.
    """
    logits = run_tasks(target, weights, images)
    if not isinstance(logits, Tensor) or logits.shape != images.shape[:2]:
        found = tuple(getattr(logits, "shape", ())) or type(logits).__name__
        raise FitError(
            f"{type(target).__name__} must give one number an image,"
            f" {tuple(images.shape[:2])} in all, not {found}; end it with one output"
            " and squeeze(1)."
        )
    return logits


def for_each_task(start: Tensor, tasks: int, width: int) -> Tensor:
    """A copy of what each task starts from, (tasks, width), of one row for all of them,
    (width,), or of one row for each.

    Raises:
        FitError: for another shape.
    """
    fits = start.shape in ((width,), (1, width), (tasks, width))
    if not fits or not start.is_floating_point():
        raise FitError(
            f"start must be ({width},) for all tasks or ({tasks}, {width}) floats, not"
            f" {tuple(start.shape)} of {start.dtype}."
        )
    return start.expand(tasks, width).clone()


def fit_alone(
    state: nn.Module,
    make_weights: Callable[[], Weights],
    weights: list[Tensor],
    z: list[Tensor],
    target: nn.Module,
    data: TaskImages,
    fit: Fit,
    penalty: Callable[[], Tensor] | None = None,
) -> History:
    """Fit T networks side by side, none knowing of the others.

    The loss is summed over tasks, so each task's fit is what it would be alone; the
    `penalty`, where there is one, is summed over tasks too.
    """

    def loss_at(step: int) -> Tensor:
        _, images, labels = data.batch(step, fit.seed, fit.images)  # (T, B, ...)
        logits = answers(target, make_weights(), images)  # (T, B)
        each = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        loss = each.mean(1).sum()
        return loss if penalty is None else loss + penalty()

    def measure() -> Tensor:
        return accuracy(target, make_weights(), data, "validation")

    return minimise(state, fit.make_optimizer(weights, z), loss_at, fit, measure)


def fit_weights(
    spec: WeightSpec,
    target: nn.Module,
    data: TaskImages,
    fit: Fit,
    start: Tensor,
    only: Sequence[str] | None = None,
) -> tuple[Tensor, History]:
    """Fit the weights of one ordinary network for each task: fine-tuning or training
    from scratch, as `start` says.

    Args:
        start: the weights to begin from, (P,) for all tasks or (T, P).
        only: names of the tensors to fit, such as the last layer's; the others stay as
            they start. None: all.

    Returns:
        The weights (T, P) and the History.

    Raises:
        FitError: for a name the target does not have, or a start of another shape.
    """
    whole = for_each_task(start, len(data.tasks), spec.size)
    columns = _columns(spec, only).to(whole.device)
    fitted = nn.Parameter(whole[:, columns])

    def flat() -> Tensor:
        return fitted if only is None else whole.index_copy(1, columns, fitted)

    state = nn.ParameterDict({"weights": fitted})
    history = fit_alone(
        state, lambda: spec.split(flat()), [fitted], [], target, data, fit
    )
    return flat().detach(), history


def _columns(spec: WeightSpec, only: Sequence[str] | None) -> Tensor:
    """Where the tensors of these names lie among the P weights."""
    names = [tensor.name for tensor in spec.tensors]
    if unknown := [name for name in only or () if name not in names]:
        raise FitError(f"the target has no weights {unknown}; it has {names}.")
    wanted = torch.tensor([only is None or name in only for name in names])
    return (
        wanted.repeat_interleave(torch.tensor([tensor.size for tensor in spec.tensors]))
        .nonzero()
        .squeeze(1)
    )


def fit_shared(
    spec: WeightSpec,
    target: nn.Module,
    data: TaskImages,
    fit: Fit,
    start: Tensor,
    watch: TaskImages | None = None,
) -> tuple[Tensor, History]:
    """Train one ordinary network (P,) on all tasks at once, nothing telling it which
    task an image belongs to.

    Args:
        watch: the tasks whose validation accuracy is measured; None for all.

    Raises:
        FitError: for a start of another shape.
    """
    flat = nn.Parameter(for_each_task(start, 1, spec.size)[0])

    def loss_at(step: int) -> Tensor:
        _, images, labels = data.batch(
            step, fit.seed, fit.images, fit.tasks
        )  # (M, B, ...), (M, B)
        logits = answers(
            target, spec.split(flat.unsqueeze(0)), images.flatten(0, 1).unsqueeze(0)
        )
        return F.binary_cross_entropy_with_logits(logits, labels.reshape(1, -1))

    def measure() -> Tensor:
        seen = watch or data
        return accuracy(
            target, spec.split(flat.expand(len(seen.tasks), -1)), seen, "validation"
        )

    state = nn.ParameterDict({"weights": flat})
    history = minimise(state, fit.make_optimizer([flat], []), loss_at, fit, measure)
    return flat.detach(), history


@torch.no_grad()
def accuracy(
    target: nn.Module, weights: Weights, data: TaskImages, split: str = "test"
) -> Tensor:
    """The share of each task's "test" or "validation" images that its network gets
    right, (T,); chance is 0.5.
    """
    right = count = 0
    for images, labels, real in data.chunks(split):
        guesses = (answers(target, weights, images) > 0).float()  # (T, b)
        right, count = right + ((guesses == labels) & real).sum(1), count + real.sum(1)
    return right / count


@torch.no_grad()
def class_accuracy(
    target: nn.Module, weights: Weights, data: TaskImages, split: str = "test"
) -> float:
    """The share of "test" or "validation" images whose class the T networks find
    together, one of all that the tasks of `data` ask about (`which_class`).
    """
    right = []
    for images, classes in data.shared(split):
        guesses = which_class(data.tasks, answers(target, weights, images))
        right.append(guesses == classes)
    return torch.cat(right).float().mean().item()


def train_generator(
    generator: SuperNet,
    target: nn.Module,
    data: TaskImages,
    fit: Fit,
    vectors: nn.Module | None = None,
    *,
    one_hot: bool = False,
    watch: TaskImages | None = None,
    checkpoint: Path | None = None,
) -> tuple[Tensor, History]:
    """Train a generator, in place, and a task vector for each of its T tasks: min over
    phi and z of the mean loss.

    Args:
        vectors: task numbers (M,) to task vectors (M, z_dim), trained too; by default
            `TaskVectors`.
        one_hot: give task t the t-th unit vector, as the original does, and learn none.
        watch: the tasks whose validation accuracy is measured, which must be the first
            of `data`'s; None for all.
        checkpoint: a safetensors file to go on from after a kill, by the same run only:
            the same images, tasks, target and fit.

    Returns:
        The task vectors (T, z_dim) and the History, with the mean validation accuracy.

    Raises:
        FitError: for vectors or watched tasks that are not those of `data`.
    """
    _check_tasks(generator, data.tasks, vectors, one_hot, watch)
    device, watch = generator.head_bias.device, watch or data
    state = nn.ModuleDict({"generator": generator})
    if one_hot:
        unit = torch.eye(generator.z_dim, device=device)
        vectors = unit.__getitem__
    else:
        vectors = (
            vectors or TaskVectors(len(data.tasks), generator.z_dim, fit.seed)
        ).to(device)
        state["task_vectors"] = vectors

    def loss_at(step: int) -> Tensor:
        numbers, images, labels = data.batch(
            step, fit.seed, fit.images, fit.tasks
        )  # (M,), (M, B, 3, 32, 32), (M, B)
        weights = generator(numbers if one_hot else vectors(numbers))
        logits = answers(target, weights, images)
        return F.binary_cross_entropy_with_logits(logits, labels)

    def vectors_of(tasks: TaskImages) -> Tensor:
        return vectors(torch.arange(len(tasks.tasks), device=device))

    def measure() -> Tensor:
        return accuracy(target, generator(vectors_of(watch)), watch, "validation")

    learned = [] if one_hot else list(vectors.parameters())
    optimizer = fit.make_optimizer(list(generator.parameters()), learned)
    run = _identity(target, data, watch, fit, one_hot) if checkpoint else None
    history = minimise(state, optimizer, loss_at, fit, measure, checkpoint, run)
    return vectors_of(data).detach(), history


def _check_tasks(
    generator: SuperNet,
    tasks: BinaryTasks,
    vectors: nn.Module | None,
    one_hot: bool,
    watch: TaskImages | None,
) -> None:
    if one_hot and len(tasks) > generator.z_dim:
        raise FitError(
            f"{len(tasks)} tasks need one-hot vectors of as many numbers, and z_dim is"
            f" {generator.z_dim}; make a generator with z_dim={len(tasks)}."
        )
    if isinstance(vectors, TaskVectors) and len(vectors.z) != len(tasks):
        raise FitError(f"{len(vectors.z)} task vectors do not fit {len(tasks)} tasks.")
    own = getattr(vectors, "pairs", None)  # of class vectors
    known = own is not None and not own.is_meta
    if known and not torch.equal(own.cpu(), tasks.pairs()):
        raise FitError(
            "these class vectors belong to other tasks; make them of the tasks that are"
            " trained."
        )
    if watch and watch.tasks != tasks.select([*range(len(watch.tasks))]):
        raise FitError("the tasks to watch must be the first of those trained.")


def _identity(
    target: nn.Module, data: TaskImages, watch: TaskImages, fit: Fit, one_hot: bool
) -> dict[str, str]:
    """What tells one training of a generator from another, beside its weights."""
    about = {f"fit.{name}": value for name, value in asdict(fit).items()} | {
        "images": data.images.checksum(),
        "images of each class": {n: s.counts.tolist() for n, s in data.splits.items()},
        "pixels": {"raw": data.raw, **data.augmentation},
        "tasks": data.tasks,
        "watched tasks": watch.tasks,
        "target": target,
        "one_hot": one_hot,
    }
    return {name: str(value) for name, value in about.items()}


def fit_z(
    generator: SuperNet,
    target: nn.Module,
    data: TaskImages,
    fit: Fit,
    start: Tensor,
    *,
    freeze: bool = True,
) -> tuple[Tensor, History]:
    """Fit one task vector for each task, z_dim numbers each, with the generator frozen:
    min over z of the task's loss.

    The loss is summed over tasks, so each task's fit is what it would be alone.

    Args:
        start: where z begins, (z_dim,) for all tasks or (T, z_dim).
        freeze: False trains the generator too, in place: the flaw of the original's
            code, kept as a control.

    Returns:
        The task vectors (T, z_dim) and the History.

    Raises:
        FitError: for a start of another shape.
    """
    z = nn.Parameter(for_each_task(start, len(data.tasks), generator.z_dim))
    if not freeze:
        state = nn.ModuleDict(
            {"generator": generator, "task_vectors": nn.ParameterDict({"z": z})}
        )
        return z.detach(), fit_alone(
            state,
            lambda: generator(z),
            list(generator.parameters()),
            [z],
            target,
            data,
            fit,
        )
    with frozen(generator):
        history = fit_alone(
            nn.ParameterDict({"z": z}), lambda: generator(z), [], [z], target, data, fit
        )
    return z.detach(), history
