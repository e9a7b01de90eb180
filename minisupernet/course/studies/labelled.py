"""The study of chapter 9: one look at labelled examples of classes never seen, and its
controls, on the held-out tasks of experiments 1 and 2.

A unit is one group of arms on one fold, in the form of `opponents`:

* `look`: the generator, trained on the trained classes, its encoder first alone.
  `look`, one look at the examples and their mirror images; `look_fitted`, z fitted from
  where the look put it; `z_only` and `z_prior`, z fitted through the same generator
  from the mean z of the trained tasks, and under a prior. Its controls: `shuffled`, the
  mean over some random orders of each task's labels; `other_task`, the examples of the
  next task; `untrained`, a generator at an ordinary start; `nearest_vector`, the
  encoder alone, an image having the class whose vector is nearer.
* `protonet`: prototypical networks, nothing generated: the same encoder trained by
  episodes with as much arithmetic, and the nearest class mean.

A head and a class mean on one shared network are those of `opponents`, on the same
folds and seeds.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from minisupernet.course.records import fingerprint, rounded
from minisupernet.course.studies.arms import Fold, Trained
from minisupernet.course.studies.opponents import prototypes
from minisupernet.course.studies.trunk import (
    Lesson,
    TaskFeatures,
    measure_nearest_mean,
)
from minisupernet.course.studies.units import (
    Amount,
    Arms,
    Plan,
    Prior,
    Unit,
    accuracies,
    check_group,
    fit_task_vectors,
    fitted,
    measure_group,
)
from minisupernet.data import ImageSet, normalise
from minisupernet.data.tasks import TaskImages
from minisupernet.labelled import (
    ExampleEncoder,
    LabelledNet,
    difference,
    examples,
    train_encoder,
    train_labelled,
)
from minisupernet.seeds import step_generator
from minisupernet.training import History

__all__ = ["GROUPS", "PROTONET_IMAGES", "SETTINGS", "Settings", "check_unit", "measure"]

Weights = dict[str, Tensor]
MEAN_OF = 50  # images of each trained class whose mean is its vector
FEATURES = 100  # numbers in a feature of `protonet`, as many as the target's
# of a lesson of the encoder alone: 8 questions of 10 images, of classes that are seldom
# twice among them
LESSON_TASKS, LESSON_SIZE = 8, 10
# images a step of `protonet`: as much arithmetic as a lesson of 40 questions on 20
# images, on average 12 examples of each of 16 classes, and half a lesson of the encoder
# alone
PROTONET_IMAGES = 600


@dataclass(frozen=True)
class Settings(Amount):
    """How much is done: beside what every study says, the `fit_sizes` at which z is
    fitted too; the encoder's own training, `encoder_steps` at `encoder_rate`, and its
    rate with the rest, a share of the generator's; how many `shuffles` the mean of that
    arm is over; and how the rate of `protonet` is chosen."""

    sizes: tuple[int | None, ...] = (1, 5, 10, 20, 50)
    fit_steps: int = 300
    most: int = 6
    fit_sizes: tuple[int, ...] = (1, 5, 20)
    encoder_steps: int = 1_000
    encoder_rate: float = 3e-3
    encoder_share: float = 0.1
    shuffles: int = 20
    trunk_rates: tuple[float, ...] = (1e-3, 3e-3, 9e-3)
    trial_steps: int = 200


SETTINGS = {
    "quick": Settings((1, 5), 20, 3, (5,), 20, shuffles=4, trial_steps=5),
    "full": Settings(),
}


def _look(unit: Unit) -> Plan:
    generator, about = _train(unit)
    before = fingerprint(generator)
    trained = _as_trained(unit.fold, generator)
    prior = Prior.of(trained, unit.fold.tasks.select(unit.numbers))
    untrained = _new_generator(unit.fold, 1_000, unit.fold.setup.z_share)

    def arms_of(data: TaskImages) -> Arms:
        shown = _with_mirrors(data)
        fit_at = partial(fit_task_vectors, trained, data)
        look = partial(_measure_look, unit, data)

        def fit_from_look() -> dict:
            with torch.no_grad():
                z = generator.task_vectors(*shown)
            return fitted(unit, data, 3e-3, lambda fit: fit_at(None, fit, z))

        other = shown[0].roll(-1, 0), shown[1]
        looks = {
            "look": lambda: look(generator, shown),
            "nearest_vector": lambda: _nearest_vector(unit, data, generator),
            "shuffled": lambda: _measure_shuffled(unit, data, generator, shown),
            "other_task": lambda: look(generator, other),
            "untrained": lambda: look(untrained, shown),
        }
        fits = {
            "look_fitted": fit_from_look,
            "z_only": lambda: fitted(unit, data, 3e-3, partial(fit_at, None)),
            "z_prior": lambda: fitted(unit, data, 3e-2, partial(fit_at, prior)),
        }
        return looks | (fits if _images_each(data) in unit.settings.fit_sizes else {})

    def end() -> dict:
        after = {"sha256_before": before, "sha256_after": fingerprint(generator)}
        return {**about, "generator": after}

    return Plan(unit.settings.sizes, arms_of, end)


def _train(unit: Unit) -> tuple[LabelledNet, dict]:
    """The generator, and what its training took."""
    fold, settings = unit.fold, unit.settings
    data, watch = fold.images_of(fold.training_tasks()), fold.data(fold.trained)
    generator, fit = _new_generator(fold), replace(fold.setup.training, seed=fold.seed)
    steps, rate = settings.encoder_steps, settings.encoder_rate
    alone = replace(fit, steps=steps, rate=rate, tasks=LESSON_TASKS, images=LESSON_SIZE)
    first = train_encoder(generator.encoder, data, alone)
    unit.report(f"encoder: {first.rows[-1]}")
    fit = replace(fit, z_rate=settings.encoder_share * fit.rate, z_decay=fit.decay)
    kept = {"watch": watch, "checkpoint": unit.checkpoint}
    history = train_labelled(generator, fold.target, data, fit, **kept)
    unit.report(f"generator: {history.rows[-1]}")
    sizes = {
        name: sum(each.numel() for each in part.parameters())
        for name, part in generator.named_children()
    }
    found = {"classes": len(data.tasks.classes), "parameters": sizes}
    found |= {"encoder": first.rows, "history": history.rows}
    return generator, {"training": found}


def _new_generator(fold: Fold, shift: int = 0, z_share: float = 0.0) -> LabelledNet:
    setup = fold.setup
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold.seed + shift)
        shape = (setup.z_dim, setup.hidden)
        return LabelledNet(fold.spec, *shape, z_share=z_share).to(fold.images.device)


@torch.no_grad()
def _as_trained(fold: Fold, generator: LabelledNet) -> Trained:
    """The generator as one of chapters 6 and 7, its class vectors being what it says
    of the first training images of each trained class."""
    data = fold.images_of(fold.training_tasks())
    split, images, known = data.splits["train"], fold.images, data.tasks.classes
    u = []
    for number in known:
        own = split.members[number, : split.counts[number]][:MEAN_OF]
        pixels = normalise(images.train_images[own], images.mean, images.std)
        u.append(generator.class_vectors(pixels[None])[0])
    place = {number: n for n, number in enumerate(known)}
    u, tasks = torch.stack(u), fold.tasks.select(fold.trained)
    a, b = ([place[n] for n in side] for side in (tasks.positive, tasks.negative))
    return Trained(fold, generator.supernet, u[a] - u[b], u, History())


def _images_each(data: TaskImages) -> int:
    """The training images that every class has."""
    return int(data.splits["train"].counts[data.classes].min())


def _with_mirrors(data: TaskImages) -> tuple[Tensor, Tensor]:
    """All training images of `data` and their mirror images, and the labels of both."""
    images, labels = examples(data, _images_each(data))
    return torch.cat([images, images.flip(-1)], 1), torch.cat([labels, labels], 1)


def _measure_look(
    unit: Unit, data: TaskImages, generator: LabelledNet, shown: tuple[Tensor, Tensor]
) -> dict:
    began = time.perf_counter()
    with torch.no_grad():
        weights = generator(*shown)
    seconds = (time.perf_counter() - began) / len(data.tasks)
    found = accuracies(unit.fold.target, weights, data, "test")
    return _tested(found) | {"seconds": round(seconds, 5)}


def _tested(found: Tensor) -> dict:
    alone, mirrored = found
    return {"test": rounded(alone), "test_mirrored": rounded(mirrored)}


@torch.no_grad()
def _measure_shuffled(
    unit: Unit, data: TaskImages, generator: LabelledNet, shown: tuple[Tensor, Tensor]
) -> dict:
    """Every look at the same examples, their labels in another random order for each
    task; the mean over looks. An image and its mirror image keep one label."""
    images, labels = shown
    half, total = labels.shape[1] // 2, 0
    e = generator.encoder(images.flatten(0, 1)).unflatten(0, labels.shape)
    random = step_generator(unit.fold.seed, -4, labels.device)
    for _ in range(unit.settings.shuffles):
        order = torch.rand(
            len(labels), half, generator=random, device=labels.device
        ).argsort(1)
        mixed = labels[:, :half].gather(1, order).repeat(1, 2)
        weights = generator.supernet(difference(e, mixed))
        total = total + accuracies(unit.fold.target, weights, data, "test")
    return _tested(total / unit.settings.shuffles)


class _AsTrunk:
    """The encoder where a trunk is expected: what it says of an image and of its mirror
    image are the features."""

    def __init__(self, encoder: ExampleEncoder, images: ImageSet) -> None:
        self.encoder, self.images = encoder, images

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        def of(each: Tensor) -> Tensor:
            shown = (
                normalise(part, self.images.mean, self.images.std)
                for part in each.split(500)
            )
            return torch.cat([self.encoder(part) for part in shown])

        return torch.stack([of(pixels), of(pixels.flip(-1))])


def _nearest_vector(unit: Unit, data: TaskImages, generator: LabelledNet) -> dict:
    trunk = _AsTrunk(generator.encoder, unit.fold.images)
    return measure_nearest_mean(TaskFeatures.of(trunk, data))


def _protonet(unit: Unit) -> Plan:
    body = partial(ExampleEncoder, FEATURES)
    lesson = Lesson.of(unit.fold, PROTONET_IMAGES, "episodes", body)
    return prototypes(unit, lesson)


GROUPS: dict[str, Callable[[Unit], Plan]] = {"look": _look, "protonet": _protonet}

# as `check_group` and `measure_group` take a unit
check_unit = partial(check_group, GROUPS)
measure = partial(measure_group, GROUPS, SETTINGS)
