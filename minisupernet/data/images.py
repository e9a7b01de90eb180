"""An image set as tensors on one device, and what is done to its pixels before a
network sees them.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["ImageSet", "augment", "held_back", "near_copies", "normalise"]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64 on one device, their classes,
    and where they came from.

    `superclass_of` (classes,) int64 gives the coarse class of each class, None where
    there are none. `mean` and `std` (3,) float32 are those of the train images scaled
    to 0..1.
    """

    name: str
    source: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    superclass_of: Tensor | None
    superclass_names: tuple[str, ...]
    mean: Tensor
    std: Tensor

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.train_images.device

    def to(self, device: str | torch.device) -> ImageSet:
        """The same set with every tensor on `device`."""
        tensors = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **tensors)

    def checksum(self) -> str:
        """The sha256 of the shapes, images and labels, in hexadecimal; the same on
        every device.
        """
        digest = hashlib.sha256()
        for tensor in (
            self.train_images,
            self.train_labels,
            self.test_images,
            self.test_labels,
        ):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().contiguous().numpy())
        return digest.hexdigest()


def held_back(count: int, most: int) -> int:
    """How many of `count` training images are kept back for validation: at most a fifth
    of them, and at most `most`.
    """
    return min(count // 5, most)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Scale images (..., 3, 32, 32) uint8 to float32 of about mean 0 and deviation 1 in
    each colour.
    """
    scale = 1 / (255 * std)
    return (images * scale.view(3, 1, 1)).sub_((mean / std).view(3, 1, 1))


def augment(
    images: Tensor,
    generator: torch.Generator,
    flip: bool = True,
    crop: int = 4,
    cutout: int = 0,
) -> Tensor:
    """Give each image (..., 3, H, W) its own random flip, shift by up to `crop` pixels
    and square hole, uint8 to uint8.

    What a shift brings in is 0 (black), and so is the hole of side `cutout`, which lies
    wholly inside the image.
    """
    batch = images.reshape(-1, *images.shape[-3:])
    count, _, height, width = batch.shape

    def choose(choices: int) -> Tensor:
        chosen = torch.randint(
            choices, (count,), generator=generator, device=generator.device
        )
        return chosen.to(batch.device)

    if flip:
        mirrored = choose(2).to(torch.uint8).view(-1, 1, 1, 1)
        batch = batch * (1 - mirrored) + batch.flip(-1) * mirrored
    if crop:
        padded = functional.pad(batch, (crop,) * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        down, across = choose(2 * crop + 1), choose(2 * crop + 1)
        every = torch.arange(count, device=batch.device)
        batch = windows[every, :, down, across]  # of (count, 3, down, across, H, W)
    if cutout:
        rows = _outside(choose(height - cutout + 1), cutout, height).unsqueeze(2)
        columns = _outside(choose(width - cutout + 1), cutout, width).unsqueeze(1)
        batch = batch * (rows | columns).unsqueeze(1)
    return batch.reshape(images.shape)


def _outside(start: Tensor, length: int, size: int) -> Tensor:
    """Which of the positions 0..size-1 lie outside start..start+length-1, (count, size)
    bool.
    """
    offset = torch.arange(size, device=start.device) - start.unsqueeze(1)
    return (offset < 0) | (offset >= length)


def near_copies(first: Tensor, second: Tensor, within: float = 6.0) -> Tensor:
    """Which of the first images (N, 3, 32, 32) uint8 have one among the second (M, 3,
    32, 32) that is nearly the same picture, (N,) bool.

    Two are where their thumbnails of 8 x 8 pixels, each without its mean brightness,
    differ by less than `within` of 255, root mean square: a burst of photographs does,
    and a picture that was resized or stored twice.
    """
    ours, theirs = _thumbnails(first), _thumbnails(second)  # (N, 192), (M, 192)
    limit = within * math.sqrt(ours.shape[1])
    found = [torch.cdist(piece, theirs).amin(1) < limit for piece in ours.split(500)]
    return torch.cat(found)


def _thumbnails(images: Tensor) -> Tensor:
    small = functional.avg_pool2d(images.float(), 4).flatten(1)
    return small - small.mean(1, keepdim=True)
