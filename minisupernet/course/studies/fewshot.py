"""The field's own few-shot benchmarks, CIFAR-FS and FC100, whose figures are published.

Both cut CIFAR-100's classes in three, and all 600 images of a class belong to it. Every
arm learns from the same episodes and is judged by the published protocol: five classes
never met, one or five examples of each, 15 questions a class. `protonet` is the
published prototypical network, which proves the set-up; `one_network` and `pudnet` are
chapter 8's, with its target and its cosine to the class means. A step of training has
four episodes of ten classes, five examples and five questions each. A unit is one arm
of one size on one benchmark.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minisupernet.course.records import rounded_rows
from minisupernet.course.statistics import interval
from minisupernet.course.studies import pudnet_family
from minisupernet.course.studies.pudnet_family import Changes, Family, Settings
from minisupernet.data import ImageSet
from minisupernet.data.episodes import Batch, Episodes, Shape
from minisupernet.errors import StudyError

__all__ = [
    "ARMS",
    "BENCHMARKS",
    "PrototypicalNetwork",
    "benchmark_split",
    "check_unit",
    "measure",
    "pooled",
]

ARMS = ("protonet", "one_network", "pudnet")
BENCHMARKS = ("cifar_fs", "fc100")
CIFAR_FS = {  # Bertinetto and others, 2018, arXiv 1805.08136
    "test": (
        "whale poppy rose sweet_pepper telephone bed table wardrobe leopard plain"
        " chimpanzee fox snail worm baby man woman bicycle pickup_truck rocket"
    ),
    "validation": (
        "beaver otter flatfish shark lamp television beetle butterfly sea camel cattle"
        " crab crocodile maple_tree motorcycle tractor"
    ),
}
FC100 = {  # by superclass: Oreshkin and others, 2018, arXiv 1805.10123
    "test": "aquatic_mammals insects medium_mammals people",
    "validation": (
        "large_carnivores large_omnivores_and_herbivores non-insect_invertebrates"
        " small_mammals"
    ),
}
QUESTIONS = 15  # query images of each class in a test episode

FULL = Settings(
    tasks=4, shape=Shape(10, 5, 5), trial=60, episodes=1_000, checks=60, looks=5
)
QUICK = replace(pudnet_family.QUICK, supports=(1,))


class PrototypicalNetwork(nn.Module):
    """Four blocks of a 3x3 convolution, batch normalisation, ReLU and max pooling; a
    query image's logits are minus its squared distances to the class means (Snell and
    others, 2017, equation 2).

    It is trained and judged as a `Learner` is.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = [3, *[channels] * 4]
        blocks = [
            nn.Sequential(
                nn.Conv2d(*pair, 3, padding=1),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                nn.MaxPool2d(2),
            )
            for pair in zip(widths, widths[1:], strict=False)
        ]
        self.body = nn.Sequential(*blocks, nn.Flatten())  # (N, 4 * channels)

    def logits(self, batch: Batch) -> Tensor:
        """Logits (T, way * query, way)."""
        images = torch.cat([batch.support, batch.query], dim=1)
        features = self.body(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        known = batch.support.shape[1]
        means = features[:, :known].unflatten(1, (batch.way, -1)).mean(2)
        return -torch.cdist(features[:, known:], means).square()

    def loss(self, batch: Batch) -> Tensor:
        """The mean loss over all query images."""
        logits = self.logits(batch)
        labels = batch.labels.repeat(len(logits))
        return F.cross_entropy(logits.flatten(0, 1), labels)

    @torch.no_grad()
    def accuracy(self, batch: Batch, datasets: Tensor | None = None) -> Tensor:
        """The share of each episode's query images that it gets right, (T,)."""
        training = self.training
        right = self.eval().logits(batch).argmax(2) == batch.labels
        self.train(training)
        return right.float().mean(1)


def pooled(images: ImageSet) -> ImageSet:
    """The same set with its test images among its training images, as the benchmarks
    have it."""
    pixels = torch.cat([images.train_images, images.test_images])
    labels = torch.cat([images.train_labels, images.test_labels])
    return replace(images, train_images=pixels, train_labels=labels)


def benchmark_split(benchmark: str, images: ImageSet) -> dict[str, list[int]]:
    """The class numbers of a benchmark's "training", "validation" and "test".

    Raises:
        StudyError: for a benchmark that does not exist, or images that lack one of its
            classes.
    """
    if benchmark not in BENCHMARKS:
        raise StudyError(
            f"there is no benchmark '{benchmark}'; choose one of"
            f" {', '.join(BENCHMARKS)}."
        )
    named = CIFAR_FS if benchmark == "cifar_fs" else FC100
    if benchmark == "cifar_fs":
        name_of = list(images.class_names)
    else:
        parents = [] if images.superclass_of is None else images.superclass_of.tolist()
        name_of = [images.superclass_names[parent] for parent in parents]
    found = {part: names.split() for part, names in named.items()}
    if missing := {*found["test"], *found["validation"]} - set(name_of):
        raise StudyError(
            f"{benchmark} is made of CIFAR-100; {images.name} has no"
            f" {min(missing)}. Use data=cifar100."
        )
    numbers = {
        part: [number for number, name in enumerate(name_of) if name in names]
        for part, names in found.items()
    }
    held = {*numbers["test"], *numbers["validation"]}
    return {"training": sorted({*range(images.classes)} - held), **numbers}


class _Unit(pudnet_family.Unit):
    """A unit whose learner may also be a prototypical network, and whose data sets
    have no changes."""

    def new_learner(self) -> nn.Module:
        if self.arm != "protonet":
            return super().new_learner()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return PrototypicalNetwork(self.channels).to(self.images.device)

    def shown(self, batch: Batch, changes: Changes) -> dict[str, Tensor | None]:
        if self.arm != "pudnet":
            return {"own": None}
        return {"own": None, "wrong": batch.support.roll(1, 0)}


def check_unit(benchmark: str, arm: str, channels: int, steps: int) -> None:
    """Raise a StudyError where there is no such unit."""
    pudnet_family.check_choice("benchmark", benchmark, BENCHMARKS)
    pudnet_family.check_choice("arm", arm, ARMS)
    pudnet_family.check_size(channels, steps)


def measure(
    images: ImageSet,
    seed: int,
    profile: str,
    report: Callable[[str], None],
    checkpoint: Path | None,
    benchmark: str,
    arm: str,
    channels: int,
    steps: int,
) -> dict:
    """Choose a rate, train one arm and test it by the benchmark's protocol; a dict
    ready for JSON, its intervals over episodes, as in the published tables.

    Args:
        profile: "full", or "quick" to try it.
        checkpoint: a safetensors file from which a killed run goes on.
        benchmark: one of `BENCHMARKS`.
        arm: one of `ARMS`.
        channels: of `protonet`'s layers, or of the target's first layer.

    Raises:
        StudyError: for a unit that does not exist, or images without its classes.
    """
    check_unit(benchmark, arm, channels, steps)
    settings, images = (QUICK if profile == "quick" else FULL), pooled(images)
    classes = benchmark_split(benchmark, images)
    training = Episodes(images, classes["training"], flip=True, crop=4)
    families = (
        Family(training, "none", seed),
        Family(Episodes(images, classes["validation"]), "none", seed + 7_000),
    )
    unit = _Unit(arm, channels, steps, images, seed, settings, *families, checkpoint)
    chosen = unit.choose()
    learner, history = unit.train(chosen["rate"], steps, checkpoint)
    asked = replace(unit, settings=replace(settings, shape=Shape(5, 5, QUESTIONS)))
    test = Family(Episodes(images, classes["test"]), "none", seed + 5_000)
    tested = {str(k): _as_published(asked, learner, test, k) for k in settings.supports}
    report(f"{benchmark}, {arm}, {channels} channels, seed {seed}: {tested}")
    unit.forget()
    numbers = sum(each.numel() for each in learner.parameters())
    return {
        "benchmark": benchmark,
        "arm": arm,
        "channels": channels,
        "steps": steps,
        "settings": asdict(settings),
        "classes": classes,
        "parameters": numbers,
        **chosen,
        "test": tested,
        "train_loss": round(history.last("loss"), 4),
        "train_seconds": round(history.last("seconds"), 1),
        "history": rounded_rows(history.rows),
    }


def _as_published(
    unit: _Unit, learner: nn.Module, test: Family, support: int
) -> dict[str, dict[str, float]]:
    """Mean accuracy and half its 95 % interval, over episodes, by what is shown."""
    found = {}
    for shown, values in unit.on_episodes(learner, test, support).items():
        over = interval(values)
        half = (over.high - over.low) / 2
        found[shown] = {"mean": round(over.mean, 4), "half": round(half, 4)}
    return found
