"""One ordinary network for all classes, its features, and small heads on them.

The network is the target's own body with an output for every trained class. It is
trained with the images and steps that the generator had: to tell all trained classes
apart; by the generator's own questions, each about two classes; or, by episodes, to put
images of one class near each other (Snell and others, 2017). On its 100 features a new
task is a logistic regression, or two class means.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minisupernet.course.records import rounded
from minisupernet.course.studies.arms import Fold
from minisupernet.course.studies.rates import best_rate
from minisupernet.data import ImageSet, augment, normalise
from minisupernet.data.tasks import TaskImages
from minisupernet.seeds import step_generator
from minisupernet.target import TaskClassifier
from minisupernet.training import History, one_cycle, train

__all__ = [
    "Lesson",
    "Logistic",
    "TaskFeatures",
    "Trunk",
    "fit_logistic",
    "measure_head",
    "measure_nearest_mean",
]

WAY, SHOT = 10, 5  # classes of an episode; support and query images of each


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a trunk learns from: the trained classes of a fold, `images` of them a
    step. By "classes" all of them are told apart, by "questions" the two of a question
    of the generator's, by "episodes" those of an episode.

    By episodes it may be another `body` than the target's, images to features (N, D).
    """

    fold: Fold
    data: TaskImages
    classes: tuple[int, ...]
    images: int
    by: str = "classes"
    body: Callable[[], nn.Module] | None = None

    @classmethod
    def of(
        cls,
        fold: Fold,
        images: int,
        by: str = "classes",
        body: Callable[[], nn.Module] | None = None,
    ) -> "Lesson":
        """The one that the generator's own questions make."""
        asked = fold.training_tasks()
        return cls(fold, fold.images_of(asked), tuple(asked.classes), images, by, body)

    @cached_property
    def questions(self) -> Tensor:
        """The places in `classes` of both sides of each question, (2, T)."""
        return torch.searchsorted(torch.tensor(self.classes), self.data.tasks.pairs())

    def train(
        self, rate: float, steps: int, checkpoint: Path | None = None
    ) -> tuple[nn.Module, History]:
        """A network trained at this rate; the History has its validation accuracy."""
        network = self._new_network()
        decay = self.fold.setup.training.decay
        history = train(
            network,
            torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=decay),
            lambda step: self._loss(network, step),
            steps,
            schedule=one_cycle,
            evaluate=lambda: {"validation_accuracy": self._validate(network)},
            every=max(steps // 4, 1),
            checkpoint=checkpoint,
        )
        return network.eval(), history

    def _new_network(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.fold.seed)
            if self.body is not None:
                parts = {"body": self.body(), "output": nn.Identity()}
                return nn.Sequential(OrderedDict(parts))
            network = TaskClassifier(self.fold.setup.channels)
            many = nn.Linear(network.output.in_features, len(self.classes))
        network.output = nn.Identity() if self.by == "episodes" else many
        return network

    def _loss(self, network: nn.Module, step: int) -> Tensor:
        random = step_generator(self.fold.seed, step)
        if self.by == "episodes":
            return self._episode_loss(network, random)
        if self.by == "questions":
            return self._question_loss(network, random)
        labels = torch.randint(len(self.classes), (self.images,), generator=random)
        return F.cross_entropy(network(self._pictures(labels, random)), labels)

    def _question_loss(self, network: nn.Module, random: torch.Generator) -> Tensor:
        """The logit of a question is the output of its one class minus that of the
        other, as a generator of the last layer alone would have it."""
        asked = torch.randint(self.questions.shape[1], (self.images,), generator=random)
        first, second = self.questions[:, asked]
        turned = torch.rand(self.images, generator=random) < 0.5
        own, other = (
            torch.where(turned, second, first),
            torch.where(turned, first, second),
        )
        outputs, row = network(self._pictures(own, random)), torch.arange(self.images)
        return F.softplus(outputs[row, other] - outputs[row, own]).mean()

    def _episode_loss(self, network: nn.Module, random: torch.Generator) -> Tensor:
        """Logits are minus the squared distances of query images from the means of the
        support images."""
        way, losses = min(WAY, len(self.classes)), []
        for _ in range(max(self.images // (way * 2 * SHOT), 1)):
            labels = torch.randperm(len(self.classes), generator=random)[:way]
            pixels = self._pictures(labels.repeat_interleave(2 * SHOT), random)
            support, query = network(pixels).view(way, 2, SHOT, -1).unbind(1)
            means, own = support.mean(1), torch.arange(way).repeat_interleave(SHOT)
            distances = torch.cdist(query.flatten(0, 1), means).square()
            losses.append(F.cross_entropy(-distances, own))
        return torch.stack(losses).mean()

    def _pictures(self, labels: Tensor, random: torch.Generator) -> Tensor:
        """A random training image (3, 32, 32) float of each of these places (N,) in
        `classes`, flipped and shifted as the generator's were."""
        split, images = self.data.splits["train"], self.data.images
        chosen = torch.tensor(self.classes)[labels]
        place = torch.rand(labels.shape, generator=random) * split.counts[chosen]
        pixels = images.train_images[split.members[chosen, place.long()]]
        pixels = augment(pixels, random, **self.data.augmentation)
        return normalise(pixels, images.mean, images.std)

    @torch.no_grad()
    def _validate(self, network: nn.Module) -> float:
        """Accuracy on validation images, of all classes or of the questions; after
        episodes by the nearest mean of half of them, on the other half."""
        split, images = self.data.splits["validation"], self.data.images
        members = split.members[list(self.classes)]  # (classes, n)
        shown = prepared(images, images.train_images[members.flatten()])
        outputs = torch.cat([network(part) for part in shown])
        grouped = outputs.view(*members.shape, -1)  # (classes, n, outputs)
        own, half = torch.arange(len(grouped))[:, None], members.shape[1] // 2
        if self.by == "classes":
            return (grouped.argmax(2) == own).float().mean().item()
        if self.by == "questions":
            (a, b), (c, d) = self.questions, self.questions.flip(0)
            ahead = [grouped[i, :, i] > grouped[i, :, j] for i, j in ((a, c), (b, d))]
            return torch.stack(ahead).float().mean().item()  # both of (T, n)
        means, asked = grouped[:, :half].mean(1), grouped[:, half:]
        nearest = torch.cdist(asked.flatten(0, 1), means).argmin(1)
        return (nearest.view(asked.shape[:2]) == own).float().mean().item()


def prepared(images: ImageSet, pixels: Tensor) -> list[Tensor]:
    """Images (N, 3, 32, 32) uint8 as a network reads them, 500 at a time."""
    return [normalise(part, images.mean, images.std) for part in pixels.split(500)]


class Trunk:
    """A trained network without its output: 100 features of an image, standardised by
    those of the trained classes' images, and their principal `directions` (D, D)."""

    def __init__(self, network: nn.Module, lesson: Lesson) -> None:
        self.network, self.images = network, lesson.data.images
        self.body = copy.deepcopy(network)
        self.body.output = nn.Identity()
        split = lesson.data.splits["train"]
        members = [
            split.members[c, : split.counts[c]] for c in lesson.classes
        ]  # no validation image
        raw = self._raw(self.images.train_images[torch.cat(members)])
        self.mean, self.std = raw.mean(0), raw.std(0) + 1e-6
        centred = (raw - self.mean) / self.std
        self.directions = torch.linalg.svd(centred, full_matrices=False)[2]

    @torch.no_grad()
    def _raw(self, pixels: Tensor) -> Tensor:
        """Features (N, D) of images (N, 3, 32, 32) uint8."""
        return torch.cat([self.body(part) for part in prepared(self.images, pixels)])

    def features(self, pixels: Tensor) -> Tensor:
        """Standardised features of images and of their mirror images, (2, N, D)."""
        both = torch.stack([self._raw(pixels), self._raw(pixels.flip(-1))])
        return (both - self.mean) / self.std

    def with_head(self, head: "Logistic") -> dict[str, Tensor]:
        """The whole network of each task, its output being the logistic regression:
        {name: (T, *shape)}."""
        tasks, weight = len(head.weight), head.weight / self.std  # of raw features
        bias = head.bias - (weight * self.mean).sum(1)
        body = {
            name: own.detach().expand(tasks, *own.shape)
            for name, own in self.body.named_parameters()
        }
        output = {"output.weight": weight[:, None], "output.bias": bias[:, None]}
        return body | {name: own.float() for name, own in output.items()}


@dataclass(frozen=True, eq=False)
class TaskFeatures:
    """Features of each task's images, (2, T, n, D) by mirror, and labels (T, n)."""

    train: Tensor
    train_labels: Tensor
    validation: Tensor
    validation_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @classmethod
    def of(cls, trunk: Trunk, data: TaskImages) -> "TaskFeatures":
        """Those of the tasks of `data`, its classes being of equal size."""
        parts: list[Tensor] = []
        for name in ("train", "validation", "test"):
            split, images = data.splits[name], trunk.images
            pixels = images.test_images if name == "test" else images.train_images
            members = split.members[data.classes]  # (T, 2, n)
            used, place = members.unique(return_inverse=True)
            found = trunk.features(pixels[used])[:, place].flatten(2, 3)
            each = torch.arange(2).repeat_interleave(members.shape[2])
            parts += [found, each.expand(len(members), -1)]
        return cls(*parts)

    def along(self, directions: Tensor) -> "TaskFeatures":
        """The same in fewer numbers: coordinates along `directions` (k, D)."""
        names = ("train", "validation", "test")
        shorter = {name: getattr(self, name) @ directions.T for name in names}
        return replace(self, **shorter)

    def to_train(self) -> tuple[Tensor, Tensor]:
        """Training features of images and mirror images alike, (T, 2 n, D) float64, and
        labels (T, 2 n)."""
        both = self.train.transpose(0, 1).flatten(1, 2).double()
        return both, self.train_labels.repeat(1, 2)

    def right(self, classify: Callable[[Tensor], Tensor], name: str) -> Tensor:
        """Accuracy of each task on "validation" or "test", (2, T): of an image alone,
        and by the mean logit of it and its mirror image."""
        features, labels = getattr(self, name), getattr(self, f"{name}_labels")
        alone, mirror = (classify(each.double()) for each in features)  # (T, n)
        logits = torch.stack([alone, (alone + mirror) / 2])
        return ((logits > 0) == (labels > 0)).double().mean(2)


@dataclass(frozen=True, eq=False)
class Logistic:
    """One logistic regression a task: weights (T, D) and biases (T,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Features (T, n, D) to logits (T, n)."""
        return torch.einsum("tnd,td->tn", features, self.weight) + self.bias[:, None]


def fit_logistic(features: Tensor, labels: Tensor, strength: float) -> Logistic:
    """The logistic regressions of T tasks, each the minimum of its mean loss plus
    strength / 2 |weight|^2.

    Args:
        features: (T, n, D); `labels` (T, n), 0 or 1.
    """
    tasks, _, size = features.shape
    features, labels = features.double(), labels.double()
    weight = torch.zeros(tasks, size, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(tasks, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=300, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        solver.zero_grad()
        logits = Logistic(weight, bias)(features)
        each = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        total = each.mean(1).sum() + strength / 2 * weight.square().sum()
        total.backward()
        return total

    solver.step(loss)
    return Logistic(weight.detach(), bias.detach())


def measure_head(
    features: TaskFeatures, strengths: tuple[float, ...], most: int
) -> tuple[dict, Logistic]:
    """The logistic regressions of the strength that is best on validation images, and
    what the record says of them."""
    shown, labels = features.to_train()

    def trial(strength: float) -> tuple[float, Logistic]:
        head = fit_logistic(shown, labels, strength)
        alone, _ = features.right(head, "validation")
        return round(fmean(rounded(alone)), 4), head

    chosen = best_rate(strengths, trial, most)
    alone, mirrored = features.right(chosen.result, "test")
    found = {"rate": chosen.rate, "test": rounded(alone)}
    found |= {"test_mirrored": rounded(mirrored), "tried": chosen.tried}
    return found, chosen.result


def measure_nearest_mean(features: TaskFeatures) -> dict:
    """The nearer of two class means by cosine: nothing is fitted or chosen."""
    shown, labels = features.to_train()
    side = torch.stack([labels == 0, labels == 1]).double()  # (2, T, 2 n)
    sums = torch.einsum("stn,tnd->std", side, shown)
    negative, positive = F.normalize(sums / side.sum(2, keepdim=True), dim=2)

    def classify(each: Tensor) -> Tensor:
        unit = F.normalize(each, dim=2)
        return torch.einsum("tnd,td->tn", unit, positive - negative)

    alone, mirrored = features.right(classify, "test")
    return {"test": rounded(alone), "test_mirrored": rounded(mirrored)}
