"""Episodes: small datasets drawn from the classes of an image set, which are the
training examples of PudNet.

An episode is a few classes, some support images of each (the dataset that the generator
sees) and some query images (on which the network it makes is judged).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minisupernet.data import ImageSet, augment, normalise
from minisupernet.errors import EpisodeError
from minisupernet.seeds import step_generator

__all__ = ["Batch", "Episodes", "Shape"]


@dataclass(frozen=True)
class Shape:
    """The form of an episode: `way` classes, `support` and `query` images of each."""

    way: int = 5
    support: int = 5
    query: int = 5


@dataclass(frozen=True)
class Batch:
    """T episodes: class numbers (T, way), and images (T, way * k, 3, 32, 32) float that
    lie class by class.
    """

    classes: Tensor
    support: Tensor
    query: Tensor

    @property
    def way(self) -> int:
        """Classes in an episode."""
        return self.classes.shape[1]

    @property
    def labels(self) -> Tensor:
        """The place of each query image's class in its episode, (way * query,), the
        same for all T.
        """
        each = self.query.shape[1] // self.way
        return torch.arange(self.way, device=self.query.device).repeat_interleave(each)


class Episodes:
    """Draws episodes from some classes of an image set; every image set normalised by
    its own mean and spread.

    Support images are training images. Query images are training images not in the
    support, or test images.

    Args:
        images: the image set.
        classes: the class numbers to draw from.
        test: take the query images from the test images.
        flip: mirror each image with chance one half.
        crop: shift each image by up to so many pixels.

    Raises:
        EpisodeError: for no class, a class the image set does not have, or one that is
            given twice.
    """

    def __init__(
        self,
        images: ImageSet,
        classes: Sequence[int],
        test: bool = False,
        flip: bool = False,
        crop: int = 0,
    ) -> None:
        known = set(range(images.classes))
        if not classes or not set(classes) <= known or len(set(classes)) < len(classes):
            raise EpisodeError(
                f"classes must be different numbers from 0 to {images.classes - 1}, at"
                " least one of them."
            )
        self.images, self.test, self.flip, self.crop = images, test, flip, crop
        # episodes are drawn on the CPU, so that a GPU waits for no number
        self.classes = torch.tensor(classes)
        self.train_members = _by_class(images.train_labels.cpu(), classes)
        self.test_members = _by_class(images.test_labels.cpu(), classes)

    def check(self, shape: Shape) -> None:
        """See, before anything is trained, that episodes of this form can be drawn.

        Raises:
            EpisodeError: where there are too few classes, or too few images of a class.
        """
        if shape.query < 1:
            raise EpisodeError("an episode needs at least 1 query image of each class.")
        self._check(shape)

    def draw(self, step: int, seed: int, shape: Shape, count: int) -> Batch:
        """`count` random episodes, a function of `seed` and `step` alone.

        Raises:
            EpisodeError: where there are too few classes, or too few images of a class.
        """
        self.check(shape)
        if count < 1:
            raise EpisodeError(f"at least 1 episode can be drawn, not {count}.")
        random = step_generator(seed, step)
        orders = (
            torch.randperm(len(self.classes), generator=random) for _ in range(count)
        )
        places = torch.stack([order[: shape.way] for order in orders])  # (T, way)
        support, query = [], []
        for place in places.flatten().tolist():
            own = self.train_members[place]
            own = own[torch.randperm(len(own), generator=random)]
            other = own[shape.support :]
            if self.test:
                other = self.test_members[place]
                other = other[torch.randperm(len(other), generator=random)]
            support.append(own[: shape.support])
            query.append(other[: shape.query])
        moved = random if self.flip or self.crop else None
        return self._batch(places, support, query, moved)

    def whole(self, datasets: Sequence[Sequence[int]], support: int) -> Batch:
        """Given datasets, each a list of classes: the first `support` train images and
        all test images of each class.

        Raises:
            EpisodeError: for no dataset, datasets of different size, a class that is
                twice in one or not among these, or one with too few images.
        """
        sizes = {(len(each), len(set(each))) for each in datasets}
        if len(sizes) != 1 or len(set(*sizes)) != 1:
            raise EpisodeError(
                "datasets must be lists of equally many classes, no class twice in one."
            )
        place_of = {number: place for place, number in enumerate(self.classes.tolist())}
        asked = {number for each in datasets for number in each}
        if missing := asked - place_of.keys():
            raise EpisodeError(
                f"classes {sorted(missing)} are not among these episodes' classes."
            )
        least = min(len(members) for members in self.test_members)
        self._check(Shape(len(datasets[0]), support, least if self.test else 0))
        places = torch.tensor(
            [[place_of[number] for number in each] for each in datasets]
        )
        chosen = places.flatten().tolist()
        support_lists = [self.train_members[place][:support] for place in chosen]
        query_lists = [self.test_members[place][:least] for place in chosen]
        return self._batch(places, support_lists, query_lists, test=True)

    def _batch(
        self,
        places: Tensor,
        support: list[Tensor],
        query: list[Tensor],
        random: torch.Generator | None = None,
        test: bool = False,
    ) -> Batch:
        tasks, images = len(places), self.images
        source = images.test_images if self.test or test else images.train_images
        pixels = [
            images.train_images[torch.cat(support).to(images.device)],
            source[torch.cat(query).to(images.device)],
        ]
        if random is not None:
            pixels = [augment(each, random, self.flip, self.crop) for each in pixels]
        support, query = (
            normalise(each, images.mean, images.std).unflatten(0, (tasks, -1))
            for each in pixels
        )
        return Batch(self.classes[places].to(images.device), support, query)

    def _check(self, shape: Shape) -> None:
        if not 2 <= shape.way <= len(self.classes):
            raise EpisodeError(
                f"an episode needs 2 to {len(self.classes)} of these classes, not"
                f" {shape.way}."
            )
        if shape.support < 1:
            raise EpisodeError(
                "an episode needs at least 1 support image of each class."
            )
        train = min(len(members) for members in self.train_members)
        test = min(len(members) for members in self.test_members)
        wanted = shape.support + (0 if self.test else shape.query)
        if wanted > train or (self.test and shape.query > test):
            raise EpisodeError(
                f"the smallest class has {train} train and {test} test images, too few"
                f" for {shape.support} support and {shape.query} query images."
            )


def _by_class(labels: Tensor, classes: Sequence[int]) -> list[Tensor]:
    """For each of these classes the numbers of its images, in the order of the set."""
    return [(labels == number).nonzero().squeeze(1) for number in classes]
