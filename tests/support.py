"""What tests of several folders share: the repository, a tiny image set, and what runs
in the nightly set alone."""

import os
from pathlib import Path

import pytest
import torch

from minisupernet.data import ImageSet

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONG = bool(os.environ.get("MINISUPERNET_LONG"))  # `make test-long` sets it
nightly = pytest.mark.skipif(not LONG, reason="nightly: make test-long")


def coloured_squares(
    classes: int = 10, train: int = 24, test: int = 12, seed: int = 0
) -> ImageSet:
    """A tiny image set a network learns in seconds: class c is a square of its own
    colour on noise.
    """
    random = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 256, (classes, 3), generator=random)

    def split(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(classes).repeat(count)
        images = torch.randint(
            0, 256, (len(labels), 3, 32, 32), generator=random, dtype=torch.uint8
        )
        images[:, :, 8:24, 8:24] = (
            0.7 * colours[labels][:, :, None, None] + 0.3 * images[:, :, 8:24, 8:24]
        ).byte()
        return images, labels

    (train_images, train_labels), (test_images, test_labels) = split(train), split(test)
    pixels = train_images.float() / 255
    return ImageSet(
        name="squares",
        source="drawn by a test",
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        class_names=tuple(f"colour {c}" for c in range(classes)),
        superclass_of=None,
        superclass_names=(),
        mean=pixels.mean((0, 2, 3)),
        std=pixels.std((0, 2, 3)),
    )
