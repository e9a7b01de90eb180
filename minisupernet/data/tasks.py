"""Binary tasks over the classes of an image set, and batches of images for many tasks
at once.

Experiment 1 asks "class i or class 100?" for every other class i; experiment 2 asks
"class i or class i + 50?" and then the same questions with the labels reversed, so that
no single network can serve them all. A side of a question may also be several classes,
and the answers to many questions name one class of many.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from numbers import Integral

import torch
from torch import Tensor
from torch.nn import functional as F

from minisupernet.data import ImageSet, augment, normalise
from minisupernet.data.images import held_back
from minisupernet.errors import TaskError
from minisupernet.seeds import step_generator

__all__ = [
    "BinaryTasks",
    "TaskImages",
    "all_pairs",
    "each_pair",
    "experiment_1",
    "experiment_2",
    "hold_out",
    "one_against_rest",
    "usable_folds",
    "which_class",
]

Side = int | tuple[int, ...]  # a class, or several: any of them


@dataclass(frozen=True)
class BinaryTasks:
    """T questions: does the image show `positive[t]` (label 1) or `negative[t]` (label
    0)? Each is a class number, or a tuple of them: any of these classes.

    Raises:
        TaskError: where the two differ in length, a class stands against itself, or a
            class number is below 0.
    """

    positive: tuple[Side, ...]
    negative: tuple[Side, ...]

    def __post_init__(self) -> None:
        if len(self.positive) != len(self.negative):
            raise TaskError(
                "every task needs a positive and a negative side, not"
                f" {len(self.positive)} and {len(self.negative)} of them."
            )
        for number, sides in enumerate(zip(self.positive, self.negative, strict=True)):
            _check_sides(number, *map(_classes_of, sides))

    def __len__(self) -> int:
        return len(self.positive)

    @property
    def classes(self) -> list[int]:
        """The numbers of all classes that are asked about, in order."""
        sides = (*self.positive, *self.negative)
        return sorted({number for side in sides for number in _classes_of(side)})

    def pairs(self) -> Tensor:
        """The class numbers of both sides, (2, T) int64: positive ones, then negative.

        Raises:
            TaskError: for a side of several classes.
        """
        if any(isinstance(side, tuple) for side in (*self.positive, *self.negative)):
            raise TaskError(
                "these tasks ask about several classes at once, where a pair of classes"
                " is needed; give each task a vector of its own (TaskVectors)."
            )
        return torch.tensor([self.positive, self.negative], dtype=torch.int64)

    def select(self, numbers: list[int]) -> "BinaryTasks":
        """The tasks with these numbers, in this order."""
        for number in numbers:
            if not 0 <= number < len(self):
                raise TaskError(
                    f"there is no task {number}; choose 0 to {len(self) - 1}."
                )
        return BinaryTasks(
            tuple(self.positive[n] for n in numbers),
            tuple(self.negative[n] for n in numbers),
        )

    def __add__(self, others: "BinaryTasks") -> "BinaryTasks":
        return BinaryTasks(
            self.positive + others.positive, self.negative + others.negative
        )

    def name(self, number: int, class_names: tuple[str, ...]) -> str:
        """For reading: "beaver or woman"; what has label 1 comes first, and several
        classes are "beaver/otter".
        """
        sides = self.positive[number], self.negative[number]
        yes, no = ("/".join(class_names[c] for c in _classes_of(s)) for s in sides)
        return f"{yes} or {no}"


def _classes_of(side: Side) -> tuple[int, ...]:
    return side if isinstance(side, tuple) else (side,)


def _check_sides(task: int, yes: tuple[int, ...], no: tuple[int, ...]) -> None:
    both = (*yes, *no)
    if not yes or not no or not all(isinstance(each, Integral) for each in both):
        raise TaskError(
            f"the sides of task {task} must be class numbers or tuples of them, not"
            f" {yes} and {no}."
        )
    if min(both) < 0:
        raise TaskError(
            f"class {min(both)} is out of range: classes are numbered from 0."
        )
    if len(set(both)) < len(both):
        raise TaskError(
            f"task {task} asks {yes} or {no}; no class can stand against itself."
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


def each_pair(classes: Sequence[int]) -> BinaryTasks:
    """Each two of these classes once, "a or b?": k (k - 1) / 2 tasks."""
    pairs = list(combinations(classes, 2))
    return BinaryTasks(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))


def one_against_rest(classes: Sequence[int]) -> BinaryTasks:
    """Each of these classes against all the others: k tasks."""
    others = [tuple(other for other in classes if other != own) for own in classes]
    return BinaryTasks(tuple(classes), tuple(others))


def all_pairs(tasks: BinaryTasks, but: BinaryTasks) -> BinaryTasks:
    """Every other question about the classes of `tasks`, "a or b?" in both orders,
    those of `but` left out.
    """
    known = {tuple(pair) for each in (tasks, but) for pair in each.pairs().T.tolist()}
    pairs = [pair for pair in permutations(tasks.classes, 2) if pair not in known]
    return BinaryTasks(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))


def which_class(tasks: BinaryTasks, logits: Tensor) -> Tensor:
    """Which of many classes the images show, from the answers to questions about them:
    logits (T, B) of the same B images, to class numbers (B,) int64.

    A class scores the mean log-probability of the answers that allow it, over the tasks
    that ask about it. For `one_against_rest` that is the largest logit, for `each_pair`
    the class that wins most surely.
    """
    place = {number: column for column, number in enumerate(tasks.classes)}
    allows = torch.zeros(2, len(tasks), len(place))  # (2, T, k)
    for answer, sides in enumerate((tasks.negative, tasks.positive)):
        for task, side in enumerate(sides):
            allows[answer, task, [place[number] for number in _classes_of(side)]] = 1
    log_p = F.logsigmoid(torch.stack([-logits, logits]).float())  # (2, T, B)
    allows = (allows / allows.sum((0, 1))).to(logits.device)
    scores = torch.einsum("atb,atk->bk", log_p, allows)
    return torch.tensor(tasks.classes, device=logits.device)[scores.argmax(1)]


def usable_folds(experiment: int, folds: int, classes: int) -> int:
    """As many folds as asked for, or so few that each holds out at least two tasks, in
    experiment 2 two pairs.
    """
    candidates = classes - 1 if experiment == 1 else classes // 2
    return max(min(folds, candidates // 2), 1)


def hold_out(
    experiment: int, fold: int, folds: int = 5, classes: int = 100, pairs: bool = False
) -> tuple[list[int], list[int]]:
    """Task numbers (trained, held out) of one fold; the folds together hold out every
    candidate once.

    Experiment 1 holds out any of its tasks. Experiment 2 holds out reversed tasks,
    whose twins are trained; with `pairs`, both orientations of a pair.

    Raises:
        TaskError: for an experiment or fold that does not exist, a fold that holds out
            nothing, and one that leaves nothing to train on.
    """
    if experiment not in (1, 2):
        raise TaskError(f"there is no experiment {experiment}; choose 1 or 2.")
    if not 0 <= fold < folds:
        raise TaskError(f"there is no fold {fold}; choose 0 to {folds - 1}.")
    total = len((experiment_1, experiment_2)[experiment - 1](classes))
    half = classes // 2
    count = total if experiment == 1 else half
    if fold >= count:
        raise TaskError(
            f"fold {fold} of {folds} holds out nothing with {classes} classes; choose 0"
            f" to {count - 1}."
        )
    candidates = torch.randperm(count, generator=step_generator(2018, experiment))
    held = sorted(candidates[fold::folds].tolist())
    if experiment == 2:
        held = [*(held if pairs else []), *(number + half for number in held)]
    trained = [number for number in range(total) if number not in held]
    if not trained:
        raise TaskError(
            f"fold {fold} of {folds} leaves no task to train on with {classes} classes;"
            " take more folds or classes."
        )
    return trained, held


def _at_least(classes: int, least: int) -> None:
    if classes < least:
        raise TaskError(
            f"binary tasks need at least {least} classes, this image set has {classes}."
        )


@dataclass(frozen=True)
class Split:
    """The images that each side of a question has in one split: `members` (sides, most)
    image numbers, padded; `counts` (sides,).
    """

    members: Tensor
    counts: Tensor

    @classmethod
    def of(cls, lists: list[Tensor], groups: list[tuple[int, ...]]) -> "Split":
        """From one list of image numbers for each class, and for each group of classes
        those of all of them.
        """
        lists = lists + [torch.cat([lists[c] for c in group]) for group in groups]
        members = torch.nn.utils.rnn.pad_sequence(lists, batch_first=True)
        counts = [len(numbers) for numbers in lists]
        return cls(members, torch.tensor(counts, device=members.device))


class TaskImages:
    """The images of T tasks, on the image set's device, split so that no training meets
    a held-out image.

    Args:
        images: the image set. Its training images are cut into "train" and
            "validation"; its test images are "test".
        tasks: the questions.
        per_class: training images of each class, the first so many; None for all but
            the validation images.
        validation: images of each class kept back from training, the last so many, and
            at most a fifth of them.
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
        _check_asked(images, tasks)
        sides = (*tasks.positive, *tasks.negative)
        groups = sorted({side for side in sides if isinstance(side, tuple)})
        lists = _split(images, per_class, validation)
        self._check_images(lists, validation)
        self.splits = {name: Split.of(each, groups) for name, each in lists.items()}
        # a row of a split is a class or, below the classes, a group of them
        row = {group: images.classes + place for place, group in enumerate(groups)}
        rows = [
            [row.get(side, side) for side in sides]
            for sides in (tasks.negative, tasks.positive)
        ]
        # (T, 2): label -> row
        self.classes = torch.tensor(rows, device=images.device).T

    def _check_images(self, lists: dict[str, list[Tensor]], validation: int) -> None:
        for number in self.tasks.classes:
            for name, members in lists.items():
                if not len(members[number]) and (name != "validation" or validation):
                    raise TaskError(
                        f"class {number} has no {name} images; give it five training"
                        " images and a test image at least."
                    )

    def describe(self) -> str:
        """How the images of the classes asked about are split, in one sentence."""
        words = []
        for name, purpose in (
            ("train", "to train on"),
            ("validation", "for validation"),
            ("test", "for tests"),
        ):
            counts = self.splits[name].counts[self.tasks.classes]
            least, most = int(counts.min()), int(counts.max())
            found = str(least) if least == most else f"{least} to {most}"
            words.append(f"{found} {purpose}")
        return f"Images of each class: {', '.join(words)}."

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
            order = torch.randperm(len(self.tasks), generator=random, device=device)
            numbers = order[:count]
        form = (len(numbers), size)  # (M, B)
        labels = torch.randint(2, form, generator=random, device=device)
        classes = self.classes[numbers].gather(1, labels)  # (M, B)
        split = self.splits["train"]
        share = torch.rand(form, generator=random, device=device)
        place = (share * split.counts[classes]).long()
        # (M, B, 3, 32, 32)
        pixels = self.images.train_images[split.members[classes, place]]
        pixels = augment(pixels, random, **self.augmentation)
        return numbers, self._to_float(pixels), labels.float()

    def chunks(
        self, name: str, size: int = 50
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All "validation" or "test" images of every task, in pieces of at most `size`
        images a task.

        Yields:
            images (T, b, 3, 32, 32) float, labels (T, b) float, and which of them are
            real, (T, b) bool: where sides differ in their number of images the shorter
            ones are padded.
        """
        split, source = self.splits[name], self._source(name)
        most, device = split.members.shape[1], split.members.device
        # (T, 2 * most): the images of label 0, then of label 1
        members = split.members[self.classes].flatten(1)
        counts = split.counts[self.classes].unsqueeze(2)
        real = (torch.arange(most, device=device) < counts).flatten(1)
        labels = torch.arange(2, device=device).repeat_interleave(most)
        labels = labels.expand_as(members)
        for start in range(0, 2 * most, size):
            piece = slice(start, start + size)
            yield (
                self._to_float(source[members[:, piece]]),
                labels[:, piece].float(),
                real[:, piece],
            )

    def shared(self, name: str, size: int = 50) -> Iterator[tuple[Tensor, Tensor]]:
        """All "validation" or "test" images of the classes asked about, the same for
        every task, in pieces of at most `size`: what `which_class` is judged on.

        Yields:
            images (T, b, 3, 32, 32) float, and their class numbers (b,).
        """
        split, source = self.splits[name], self._source(name)
        own = "test" if name == "test" else "train"
        labels = getattr(self.images, f"{own}_labels")
        members = torch.cat(
            [split.members[c, : split.counts[c]] for c in self.tasks.classes]
        )
        for piece in members.split(size):
            pixels = self._to_float(source[piece])
            yield pixels.expand(len(self.tasks), *pixels.shape), labels[piece]

    def _source(self, name: str) -> Tensor:
        return self.images.test_images if name == "test" else self.images.train_images

    def _to_float(self, pixels: Tensor) -> Tensor:
        if self.raw:
            return pixels.float()
        return normalise(pixels, self.images.mean, self.images.std)


def _check_asked(images: ImageSet, tasks: BinaryTasks) -> None:
    if not tasks.classes:
        raise TaskError("there is no task among these; ask at least one question.")
    if beyond := [number for number in tasks.classes if number >= images.classes]:
        raise TaskError(
            f"class {beyond[0]} is out of range: {images.name} has 0 to"
            f" {images.classes - 1}."
        )


def _split(
    images: ImageSet, per_class: int | None, validation: int
) -> dict[str, list[Tensor]]:
    """For each split the image numbers of each class, in the order of the set."""
    if validation < 0 or (per_class is not None and per_class < 1):
        raise TaskError(
            "per_class must be 1 or more and validation 0 or more, not"
            f" {per_class} and {validation}."
        )

    def by_class(labels: Tensor) -> list[Tensor]:
        return [(labels == c).nonzero().squeeze(1) for c in range(images.classes)]

    train = by_class(images.train_labels)
    keep = [len(own) - held_back(len(own), validation) for own in train]
    return {
        "train": [own[:k][:per_class] for own, k in zip(train, keep, strict=True)],
        "validation": [own[k:] for own, k in zip(train, keep, strict=True)],
        "test": by_class(images.test_labels),
    }
