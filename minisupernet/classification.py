"""An ordinary classifier of one image set: its batches, its training, and its accuracy
on images no training saw.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minisupernet.data import ImageSet, augment, normalise
from minisupernet.data.images import held_back
from minisupernet.seeds import step_generator
from minisupernet.training import History, one_cycle, train

__all__ = ["Pictures", "accuracy", "fit", "settle_norms", "signals"]


class Pictures:
    """Batches and measurements of one image set, cut into training, validation and test
    images.

    Args:
        validation: training images held back, at most a fifth of all, the same for
            every seed.
        batch: images in a batch. `crop`: random shifts of up to so many pixels, beside
            random flips.
        pool: side of the squares of pixels that are averaged before a network sees
            them; 1 leaves images as they are.
        most: test images at most, to try things out; None means all.
    """

    def __init__(
        self,
        images: ImageSet,
        validation: int = 3000,
        batch: int = 64,
        crop: int = 0,
        pool: int = 1,
        most: int | None = None,
    ) -> None:
        self.images, self.size, self.crop, self.pool = images, batch, crop, pool
        order = _fixed_order(len(images.train_labels)).to(images.device)
        kept = held_back(len(order), validation)
        self.validation, self.train = order.tensor_split([kept])
        self.test = _fixed_order(len(images.test_labels))[:most]

    def describe(self) -> str:
        """How the images are split, in one sentence."""
        return (
            f"Images: {len(self.train):,} to train on, {len(self.validation):,} for"
            f" validation, {len(self.test):,} for tests."
        )

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]:
        """Training images (B, 3, H, W) float32, flipped and shifted at random, and
        labels (B,) of one step.
        """
        random = step_generator(seed, step)
        places = torch.randint(len(self.train), (self.size,), generator=random)
        chosen = self.train[places.to(self.train.device)]
        pixels = augment(self.images.train_images[chosen], random, crop=self.crop)
        return self.prepare(pixels), self.images.train_labels[chosen]

    def prepare(self, pixels: Tensor) -> Tensor:
        """Normalise and pool images (B, 3, 32, 32) uint8, to (B, 3, 32 / pool, 32 /
        pool) float32.
        """
        normal = normalise(pixels, self.images.mean, self.images.std)
        return F.avg_pool2d(normal, self.pool)

    def accuracy(self, network: nn.Module, part: str) -> float:
        """Share of the "validation" or "test" images that the network gets right, in
        evaluation mode.
        """
        rows = self.validation if part == "validation" else self.test
        rows, own = rows.to(self.images.device), "test" if part == "test" else "train"
        pixels = getattr(self.images, f"{own}_images")[rows]
        labels = getattr(self.images, f"{own}_labels")[rows]
        return accuracy(network, self.prepare, pixels, labels)


def _fixed_order(count: int) -> Tensor:
    """A random order of so many images, always the same."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def accuracy(
    network: nn.Module,
    prepare: Callable[[Tensor], Tensor],
    pixels: Tensor,
    labels: Tensor,
) -> float:
    """Share of images that a classifier gets right, in evaluation mode, 500 at a time.

    Args:
        network: prepared images to logits (B, classes).
        prepare: images (B, 3, H, W) uint8 to what the network reads.
        pixels: (N, 3, H, W) uint8; `labels` (N,).
    """
    before, right = network.training, 0
    network.eval()
    for some, truth in zip(pixels.split(500), labels.split(500), strict=True):
        right += (network(prepare(some)).argmax(1) == truth).sum().item()
    network.train(before)
    return right / len(labels)


def fit(
    network: nn.Module,
    pictures: Pictures,
    rate: float,
    steps: int,
    seed: int,
    every: int | None = None,
) -> History:
    """Train in place on cross-entropy, with Adam and one cycle of the rate; the batches
    depend on seed and step alone.

    With `every`, the History has the validation accuracy each so many steps.
    """

    def loss_at(step: int) -> Tensor:
        pixels, labels = pictures.batch(step, seed)
        return F.cross_entropy(network(pixels), labels)

    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    look = (
        (lambda: {"validation_accuracy": pictures.accuracy(network, "validation")})
        if every
        else None
    )
    return train(
        network,
        optimizer,
        loss_at,
        steps,
        schedule=one_cycle,
        evaluate=look,
        every=every or steps,
    )


@torch.no_grad()
def settle_norms(
    network: nn.Module, pictures: Pictures, seed: int, batches: int = 20
) -> None:
    """Measure the statistics of every BatchNorm layer anew, as the plain mean over a
    few training batches.
    """
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    kept = [layer.momentum for layer in norms]
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None
    for step in range(batches):
        network(pictures.batch(step, seed + 500)[0])
    for layer, momentum in zip(norms, kept, strict=True):
        layer.momentum = momentum


@torch.no_grad()
def signals(network: nn.Module, pixels: Tensor) -> list[float]:
    """Root mean square of what each 3 x 3 convolution puts out for a batch of images,
    layer by layer.
    """
    found: list[float] = []

    def note(layer: nn.Module, given: tuple, output: Tensor) -> None:
        found.append(output.square().mean().sqrt().item())

    layers = [
        layer
        for layer in network.modules()
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)
    ]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    network(pixels)
    for hook in hooks:
        hook.remove()
    return found
