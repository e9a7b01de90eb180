"""A network from labelled examples: a generator that looks at a few images with their
labels and makes, in one forward pass, the classifier that tells them apart.

An encoder e turns each image into a few numbers. Their mean over the examples of a
class is the vector u of that class, and the question "a or b?" has z = u_a - u_b, from
which SuperNet's generator makes all weights. Everything is trained as one network, on
many questions about other classes; a new question costs no gradient step.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minisupernet.data import augment, normalise
from minisupernet.data.tasks import TaskImages
from minisupernet.errors import LabelledError
from minisupernet.fitting import Fit, accuracy, answers, minimise
from minisupernet.seeds import step_generator
from minisupernet.supernet import SuperNet
from minisupernet.target import MakesWeights, WeightSpec
from minisupernet.training import History, train

__all__ = [
    "ExampleEncoder",
    "LabelledNet",
    "Lesson",
    "Lessons",
    "difference",
    "examples",
    "train_encoder",
    "train_labelled",
]

Weights = dict[str, Tensor]  # name -> (T, *shape)
SHARPNESS = 10.0  # of the encoder's own training: e has length 1


class ExampleEncoder(nn.Module):
    """Images (N, 3, 32, 32) to what is kept of each, e(x) (N, width), of mean 0 and
    length 1.

    Four 3x3 convolutions, the first three of stride 2, each normalised within its
    image, and a linear layer.
    """

    def __init__(self, width: int, channels: int = 32) -> None:
        super().__init__()
        widths = [3, channels, 2 * channels, 2 * channels, 2 * channels]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(*pair, 3, stride=2 if layer < 3 else 1, padding=1)
            for layer, pair in enumerate(zip(widths, widths[1:], strict=False))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for width in widths[1:])
        self.output = nn.Linear(16 * widths[-1], width)
        # without it e can shrink to nothing before the generator has learned to use it
        self.last_norm = nn.LayerNorm(width, elementwise_affine=False)

    def forward(self, images: Tensor) -> Tensor:
        x = images  # (N, 3, 32, 32)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.leaky_relu(norm(convolution(x)), 0.2)  # 32x16x16, 64x8x8, 64x4x4
        e = self.last_norm(self.output(x.flatten(1)))  # (N, width)
        return e / math.sqrt(e.shape[1])


class LabelledNet(MakesWeights):
    """Labelled examples of T tasks in, the weights of T networks {name: (T, *shape)}
    out, in one forward pass.

    With n_a examples of label 1 and n_b of label 0, any number of each:

        u_a = sum of e(x) / n_a over label 1,   u_b likewise over label 0,
        z = u_a - u_b,   theta = g(z), g being SuperNet.

    At the start z has no share in the weights: the networks of all tasks are one
    ordinary network, and the look earns its influence. With a share of its own, what an
    untrained encoder says would be noise on every weight.

    Args:
        spec: the target's weights.
        z_dim: numbers in a class vector.
        hidden: widths of SuperNet's trunk.
        channels: of the encoder's first convolution.
        z_share: the share of the starting variance that comes from z, as in SuperNet.

    Raises:
        LabelledError: for channels that are no multiple of 4 from 4, or a z_dim below
            2.
    """

    def __init__(
        self,
        spec: WeightSpec,
        z_dim: int = 32,
        hidden: tuple[int, ...] = (64,),
        channels: int = 32,
        z_share: float = 0.0,
    ) -> None:
        super().__init__()
        if channels < 4 or channels % 4 or z_dim < 2:
            raise LabelledError(
                "channels must be a multiple of 4 from 4, and z_dim 2 or more, not"
                f" {channels} and {z_dim}."
            )
        self.spec = spec
        self.supernet = SuperNet(spec, z_dim, hidden, z_share=z_share)
        self.encoder = ExampleEncoder(z_dim, channels)

    def forward(self, images: Tensor, labels: Tensor) -> Weights:
        """Make the weights of T networks from the examples of T tasks.

        Args:
            images: (T, S, 3, 32, 32) float, S examples a task in any order.
            labels: (T, S), 1 or 0, each at least once a task.

        Raises:
            LabelledError: for other shapes, images that are no floats, a label that is
                neither 0 nor 1, and a task without examples of both.
        """
        return self.supernet(self.task_vectors(images, labels))

    def task_vectors(self, images: Tensor, labels: Tensor) -> Tensor:
        """z = u_a - u_b of each task, (T, z_dim), from examples as `forward` has."""
        _check(images, labels)
        e = self.encoder(images.flatten(0, 1))  # (T * S, z_dim)
        return difference(e.unflatten(0, labels.shape), labels)

    def class_vectors(self, images: Tensor) -> Tensor:
        """u of each class, (C, z_dim), from n examples of each, (C, n, 3, 32, 32)."""
        return _class_means(self.encoder, images)


def _class_means(encoder: nn.Module, images: Tensor) -> Tensor:
    """Images (C, n, 3, 32, 32) to the mean of e(x) over each class, (C, width)."""
    return encoder(images.flatten(0, 1)).unflatten(0, images.shape[:2]).mean(1)


def difference(e: Tensor, labels: Tensor) -> Tensor:
    """z = u_a - u_b (T, z_dim), the mean of e over label 1 minus that over label 0,
    from e (T, S, z_dim) and labels (T, S)."""
    yes = labels.unsqueeze(2).to(e.dtype)  # (T, S, 1)
    u_a = (yes * e).sum(1) / yes.sum(1)  # (T, z_dim)
    u_b = ((1 - yes) * e).sum(1) / (1 - yes).sum(1)
    return u_a - u_b


def _check(images: Tensor, labels: Tensor) -> None:
    if images.ndim != 5 or images.shape[2:] != (3, 32, 32):
        raise LabelledError(
            f"examples must be (T, S, 3, 32, 32), not {tuple(images.shape)}."
        )
    if not images.is_floating_point():
        raise LabelledError(
            "examples must be normalised floats; use minisupernet.data.normalise on"
            " uint8 images."
        )
    if labels.shape != images.shape[:2]:
        raise LabelledError(
            f"every example needs a label: {tuple(images.shape[:2])} of them, not"
            f" {tuple(labels.shape)}."
        )
    if not ((labels == 0) | (labels == 1)).all():
        raise LabelledError("the labels of examples must be 0 or 1.")
    yes = labels.sum(1)
    if ((yes < 1) | (yes > labels.shape[1] - 1)).any():
        raise LabelledError("each task needs an example of label 1 and one of label 0.")


@dataclass(frozen=True, eq=False)
class Lesson:
    """One step of training: `examples` of C classes, (C, n, 3, 32, 32); M questions
    about two of these classes each, `pairs` (2, M), the one of label 1 first; and for
    each question B other `images` of the two, (M, B, 3, 32, 32), with `labels` (M, B)
    and, of the C, the class that each shows, `shows` (M, B).
    """

    examples: Tensor
    pairs: Tensor
    images: Tensor
    labels: Tensor
    shows: Tensor


class Lessons:
    """Draws the lessons of a training: a few classes, some examples of each, encoded
    once, and many questions about pairs of them.

    Args:
        data: the images; its tasks name the classes.
        classes: how many of them make a lesson, at most.
        most: examples of a class at most; how many is drawn log-uniformly from 1.

    Raises:
        LabelledError: where there are not two classes, or two images of each.
    """

    def __init__(self, data: TaskImages, classes: int = 16, most: int = 50) -> None:
        split, known = data.splits["train"], data.tasks.classes
        self.data, self.classes = data, classes
        self.members = split.members[known]  # (K, most images), padded at the end
        self.counts = split.counts[known]  # (K,)
        least = int(self.counts.min())
        if min(classes, len(known), least) < 2 or most < 1:
            raise LabelledError(
                "a lesson needs two classes, two images of each and one example:"
                f" classes is {classes} of {len(known)}, images at least {least}, most"
                f" {most}."
            )
        self.most = min(most, least - 1)  # one image at least is left to ask about

    def draw(self, step: int, fit: Fit) -> Lesson:
        """The lesson of one step, a function of `fit.seed` and `step` alone:
        `fit.tasks` questions (None: one for every pair) of `fit.images` images."""
        device = self.members.device
        random = step_generator(fit.seed, step, device)
        # how many are shown is drawn on the CPU, so that a GPU waits for no number
        part = torch.rand((), generator=step_generator(fit.seed, step)).item()
        shown = int(math.exp(part * math.log(self.most + 1)))
        order = torch.rand(len(self.counts), generator=random, device=device)
        chosen = order.argsort()[: self.classes]  # (C,)
        counts, members = self.counts[chosen], self._shuffled(chosen, random)
        pairs = _pairs(len(chosen), fit.tasks, random)  # (2, M)
        form = (pairs.shape[1], fit.images)  # (M, B)
        labels = torch.randint(2, form, generator=random, device=device)
        shows = pairs.flip(0).T.gather(1, labels)  # (M, B): label 0 is the second
        share = torch.rand(form, generator=random, device=device)
        place = shown + (share * (counts[shows] - shown)).long()  # none of those shown
        asked = self._pictures(members[shows, place], random)
        examples = self._pictures(members[:, :shown], random)
        return Lesson(examples, pairs, asked, labels.float(), shows)

    def _shuffled(self, chosen: Tensor, random: torch.Generator) -> Tensor:
        """The image numbers of these classes, each class's in a random order."""
        members, counts = self.members[chosen], self.counts[chosen, None]
        order = torch.rand(members.shape, generator=random, device=members.device)
        padded = torch.arange(members.shape[1], device=members.device) >= counts
        return members.gather(1, order.masked_fill(padded, 2.0).argsort(1))

    def _pictures(self, numbers: Tensor, random: torch.Generator) -> Tensor:
        """Training images of these numbers (...), augmented, as floats (..., 3, 32,
        32)."""
        images = self.data.images
        pixels = augment(images.train_images[numbers], random, **self.data.augmentation)
        return normalise(pixels, images.mean, images.std)


def _pairs(classes: int, count: int | None, random: torch.Generator) -> Tensor:
    """`count` pairs of different places below `classes`, (2, count), all different, in
    either order; None for as many as there are."""
    device = random.device
    pairs = torch.triu_indices(classes, classes, 1, device=device)  # (2, C (C - 1) / 2)
    order = torch.randperm(pairs.shape[1], generator=random, device=device)
    pairs = pairs[:, order[:count]]
    turned = torch.rand(pairs.shape[1], generator=random, device=device) < 0.5
    return torch.where(turned, pairs.flip(0), pairs)


def examples(data: TaskImages, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` training images of both sides of every task, as a generator
    reads them.

    Returns:
        images (T, 2 * count, 3, 32, 32) float, and labels (T, 2 * count).

    Raises:
        LabelledError: where a class has fewer training images.
    """
    split, images = data.splits["train"], data.images
    least = int(split.counts[data.classes].min())
    if not 1 <= count <= least:
        raise LabelledError(
            f"there are 1 to {least} examples of each class, not {count}."
        )
    members = split.members[data.classes][:, :, :count]  # (T, 2, count): label 0 first
    pixels = images.train_images[members.flatten(1)]
    labels = torch.arange(2, device=images.device).repeat_interleave(count)
    return normalise(pixels, images.mean, images.std), labels.repeat(len(members), 1)


def train_encoder(
    encoder: ExampleEncoder,
    data: TaskImages,
    fit: Fit,
    *,
    classes: int = 16,
    most: int = 50,
) -> History:
    """Train the encoder alone, in place: an image should lie nearest to the vector of
    its own class, as in prototypical networks (Snell and others, 2017).

    A generator can use z from its first step on when z already says something. The
    images of a lesson's questions are classified among all classes of the lesson.

    Raises:
        LabelledError: where no lesson can be drawn.
    """
    lessons = Lessons(data, classes, most)

    def loss_at(step: int) -> Tensor:
        lesson = lessons.draw(step, fit)
        u = _class_means(encoder, lesson.examples)  # (C, width)
        e = encoder(lesson.images.flatten(0, 1))  # (M * B, width)
        logits = -SHARPNESS * torch.cdist(e, u).square()  # (M * B, C)
        return F.cross_entropy(logits, lesson.shows.flatten())

    state, optimizer = nn.ModuleDict({"encoder": encoder}), fit.make_optimizer
    return train(
        state,
        optimizer([*encoder.parameters()], []),
        loss_at,
        fit.steps,
        schedule=fit.schedule,
        every=fit.every,
    )


def train_labelled(
    generator: LabelledNet,
    target: nn.Module,
    data: TaskImages,
    fit: Fit,
    *,
    classes: int = 16,
    most: int = 50,
    watch: TaskImages | None = None,
    checkpoint: Path | None = None,
) -> History:
    """Train encoder and SuperNet, in place and as one network, on questions about any
    two of the classes that `data` asks about; the encoder at the rate `fit.z_rate`.

    With an encoder at its random start this takes long to begin; see `train_encoder`.

    Args:
        classes, most: of a lesson, as `Lessons` takes them.
        watch: the tasks whose validation accuracy is measured, after one look at 5
            examples of each class; None for those of `data`.
        checkpoint: a safetensors file to go on from after a kill, by the same run only.

    Returns:
        The History, with the mean validation accuracy.

    Raises:
        LabelledError: where no lesson can be drawn.
    """
    lessons, watch = Lessons(data, classes, most), watch or data
    shown = examples(watch, min(5, int(watch.splits["train"].counts.min())))

    def loss_at(step: int) -> Tensor:
        lesson = lessons.draw(step, fit)
        u = generator.class_vectors(lesson.examples)  # (C, z_dim)
        a, b = lesson.pairs  # (M,) each
        weights = generator.supernet(u[a] - u[b])
        logits = answers(target, weights, lesson.images)  # (M, B)
        return F.binary_cross_entropy_with_logits(logits, lesson.labels)

    def measure() -> Tensor:
        return accuracy(target, generator(*shown), watch, "validation")

    parts = [
        list(part.parameters()) for part in (generator.supernet, generator.encoder)
    ]
    run = _identity(lessons, target, fit, watch) if checkpoint else None
    return minimise(
        nn.ModuleDict({"generator": generator}),
        fit.make_optimizer(*parts),
        loss_at,
        fit,
        measure,
        checkpoint,
        run,
    )


def _identity(
    lessons: Lessons, target: nn.Module, fit: Fit, watch: TaskImages
) -> dict[str, str]:
    """What tells one training from another, beside its weights."""
    data = lessons.data
    about = {f"fit.{name}": value for name, value in asdict(fit).items()} | {
        "images": data.images.checksum(),
        "images of each class": lessons.counts.tolist(),
        "pixels": data.augmentation,
        "classes": data.tasks.classes,
        "lessons": (lessons.classes, lessons.most),
        "watched tasks": watch.tasks,
        "target": target,
    }
    return {name: str(value) for name, value in about.items()}
