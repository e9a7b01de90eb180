"""Binary tasks over the classes of an image set, and batches of images for many tasks
at once.

Experiment 1 asks "class i or class 100?" for every other class i; experiment 2 asks
"class i or class i + 50?" and then the same questions with the labels reversed, so that
no single network can serve them all.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from minisupernet.data import ImageSet, augment, normalise
from minisupernet.errors import TaskError
from minisupernet.seeds import step_generator

__all__ = [
    "BinaryTasks",
    "TaskImages",
    "all_pairs",
    "experiment_1",
    "experiment_2",
    "hold_out",
]


@dataclass(frozen=True)
class BinaryTasks:
    """T questions: does the image show class `positive[t]` (label 1) or class
    `negative[t]` (label 0)?
    """

    positive: tuple[int, ...]
    negative: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.positive)

    def select(self, numbers: list[int]) -> "BinaryTasks":
        """The tasks with these numbers, in this order."""
        return BinaryTasks(
            tuple(self.positive[n] for n in numbers),
            tuple(self.negative[n] for n in numbers),
        )

    def __add__(self, others: "BinaryTasks") -> "BinaryTasks":
        return BinaryTasks(
            self.positive + others.positive, self.negative + others.negative
        )

    def name(self, number: int, class_names: tuple[str, ...]) -> str:
        """For reading: "beaver or woman"; the class with label 1 comes first."""
        return (
            f"{class_names[self.positive[number]]} or"
            f" {class_names[self.negative[number]]}"
        )


def experiment_1(classes: int = 100) -> BinaryTasks:
    """Class i against the last class, for each of the others: 99 tasks on CIFAR-100."""
    _at_least(classes, 2)
    return BinaryTasks(tuple(range(classes - 1)), (classes - 1,) * (classes - 1))


def experiment_2(classes: int = 100) -> BinaryTasks:
    """Class i against class i + 50, then the same pairs with labels reversed: task t +
    50 is task t reversed.

    With another number of classes, 50 is half of it (an odd last class is left out).
    """
    _at_least(classes, 2)
    half = classes // 2
    first, second = tuple(range(half)), tuple(range(half, 2 * half))
    return BinaryTasks(first + second, second + first)


def all_pairs(tasks: BinaryTasks, but: BinaryTasks) -> BinaryTasks:
    """Every other question about the classes of `tasks`, "a or b?" in both orders,
    those of `but` left out.
    """
    known = {
        *zip(tasks.positive, tasks.negative, strict=True),
        *zip(but.positive, but.negative, strict=True),
    }
    pairs = [
        pair
        for pair in permutations(sorted({*tasks.positive, *tasks.negative}), 2)
        if pair not in known
    ]
    return BinaryTasks(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))


def hold_out(
    experiment: int, fold: int, folds: int = 5, classes: int = 100, pairs: bool = False
) -> tuple[list, list]:
    """Task numbers (trained, held out) of one fold; the folds together hold out every
    candidate once.

    Experiment 1 holds out any of its tasks. Experiment 2 holds out reversed tasks,
    whose twins are trained; with `pairs`, both orientations of a pair.

    Raises:
        TaskError: for an experiment or fold that does not exist.
    """
    if experiment not in (1, 2):
        raise TaskError(f"there is no experiment {experiment}; choose 1 or 2.")
    if not 0 <= fold < folds:
        raise TaskError(f"there is no fold {fold}; choose 0 to {folds - 1}.")
    total, half = (
        len((experiment_1, experiment_2)[experiment - 1](classes)),
        classes // 2,
    )
    candidates = torch.randperm(
        total if experiment == 1 else half, generator=step_generator(2018, experiment)
    )
    held = sorted(candidates[fold::folds].tolist())
    if experiment == 2:
        held = [*(held if pairs else []), *(number + half for number in held)]
    return [number for number in range(total) if number not in held], held


def _at_least(classes: int, least: int) -> None:
    if classes < least:
        raise TaskError(
            f"binary tasks need at least {least} classes, this image set has {classes}."
        )


@dataclass(frozen=True)
class Split:
    """The images each class has in one split: `members` (classes, most) image numbers,
    padded; `counts` (classes,).
    """

    members: Tensor
    counts: Tensor

    @classmethod
    def of(cls, lists: list[Tensor]) -> "Split":
        """From one list of image numbers for each class."""
        members = torch.nn.utils.rnn.pad_sequence(lists, batch_first=True)
        return cls(
            members,
            torch.tensor([len(numbers) for numbers in lists], device=members.device),
        )


class TaskImages:
    """The images of T tasks, on the image set's device, split so that no training meets
    a held-out image.

    Args:
        images: the image set. Its training images are cut into "train" and
            "validation"; its test images are "test".
        tasks: the questions.
        per_class: training images of each class, the first so many; None for all but
            the validation images.
        validation: images of each class kept back from training, the last so many.
        raw: give pixels as 0 to 255, as the original did, not normalised by the
            training set's mean and spread.
        flip, crop, cutout: augmentation of training batches, as in
            `minisupernet.data.augment`.

    Raises:
        TaskError: for a class the image set does not have, or one left without images.
    """

    def __init__(
        self,
        images: ImageSet,
        tasks: BinaryTasks,
        *,
        per_class: int | None = None,
        validation: int = 50,
        raw: bool = False,
        flip: bool = False,
        crop: int = 0,
        cutout: int = 0,
    ) -> None:
        self.images, self.tasks, self.raw = images, tasks, raw
        self.augmentation = {"flip": flip, "crop": crop, "cutout": cutout}
        train = _by_class(images.train_labels, images.classes)
        kept = [numbers[: max(len(numbers) - validation, 0)] for numbers in train]
        self.splits = {
            "train": Split.of([numbers[:per_class] for numbers in kept]),
            "validation": Split.of(
                [numbers[len(few) :] for numbers, few in zip(train, kept, strict=True)]
            ),
            "test": Split.of(_by_class(images.test_labels, images.classes)),
        }
        self._check_classes(validation)
        self.classes = torch.tensor(
            [tasks.negative, tasks.positive], device=images.device
        ).T  # (T, 2): label -> class

    def _check_classes(self, validation: int) -> None:
        for number in sorted({*self.tasks.positive, *self.tasks.negative}):
            if not 0 <= number < self.images.classes:
                raise TaskError(
                    f"class {number} is out of range: {self.images.name} has 0 to"
                    f" {self.images.classes - 1}."
                )
            for name, split in self.splits.items():
                if split.counts[number] == 0 and (name != "validation" or validation):
                    raise TaskError(
                        f"class {number} has no {name} images; give more, or keep fewer"
                        " for validation."
                    )

    def batch(
        self, step: int, seed: int, size: int, count: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The training batch of one step, for many tasks at once; a function of `seed`
        and `step` alone.

        Args:
            size: images B a task, drawn with replacement, each label as likely.
            count: how many tasks M, drawn without replacement; None for all of them, in
                order.

        Returns:
            Task numbers (M,), images (M, B, 3, 32, 32) float, labels (M, B) float.
        """
        device = self.images.device
        random = step_generator(seed, step, device)
        numbers = torch.arange(len(self.tasks), device=device)
        if count is not None:
            numbers = torch.randperm(len(self.tasks), generator=random, device=device)[
                :count
            ]
        labels = torch.randint(
            2, (len(numbers), size), generator=random, device=device
        )  # (M, B)
        classes = self.classes[numbers].gather(1, labels)  # (M, B)
        split = self.splits["train"]
        place = (
            torch.rand(classes.shape, generator=random, device=device)
            * split.counts[classes]
        )
        pixels = self.images.train_images[
            split.members[classes, place.long()]
        ]  # (M, B, 3, 32, 32)
        return (
            numbers,
            self._to_float(augment(pixels, random, **self.augmentation)),
            labels.float(),
        )

    def chunks(
        self, name: str, size: int = 50
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All "validation" or "test" images of every task, in pieces of at most `size`
        images a task.

        Yields:
            images (T, b, 3, 32, 32) float, labels (T, b) float, and which of them are
            real, (T, b) bool: where classes differ in their number of images the
            shorter ones are padded.
        """
        split, source = (
            self.splits[name],
            self.images.test_images if name == "test" else self.images.train_images,
        )
        most = split.members.shape[1]
        members = split.members[self.classes].flatten(
            1
        )  # (T, 2 * most): the images of label 0, then of label 1
        real = (
            torch.arange(most, device=members.device)
            < split.counts[self.classes].unsqueeze(2)
        ).flatten(1)
        labels = (
            torch.arange(2, device=members.device)
            .repeat_interleave(most)
            .expand_as(members)
        )
        for start in range(0, 2 * most, size):
            piece = slice(start, start + size)
            yield (
                self._to_float(source[members[:, piece]]),
                labels[:, piece].float(),
                real[:, piece],
            )

    def _to_float(self, pixels: Tensor) -> Tensor:
        return (
            pixels.float()
            if self.raw
            else normalise(pixels, self.images.mean, self.images.std)
        )


def _by_class(labels: Tensor, classes: int) -> list[Tensor]:
    """For each class the numbers of its images, in the order of the set."""
    return [(labels == number).nonzero().squeeze(1) for number in range(classes)]
