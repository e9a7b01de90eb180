"""Chapter 3's verdict at a size that counts: one arm, one seed, one rate a unit.

Networks see images averaged to 16 x 16, flipped and shifted, for many epochs. The rate
of an arm is the best of its short units on validation images, and its long units take
that one: a sweep lists both, and a test holds the choice to the record.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minisupernet.classification import Pictures
from minisupernet.course.records import rounded_rows
from minisupernet.course.studies.static_hypernet import multiply_adds
from minisupernet.data import ImageSet
from minisupernet.errors import StudyError
from minisupernet.static_hypernet import Generated, WideResNet
from minisupernet.training import one_cycle, train

__all__ = ["ARMS", "Settings", "check_unit", "measure"]

ARMS: dict[str, Callable[[int], Generated]] = {
    "generated": lambda classes: WideResNet(40, generated=True, classes=classes),
    "direct": lambda classes: WideResNet(40, classes=classes),
    "as_many_numbers": lambda classes: WideResNet(16, 0.75, classes=classes),
    "smaller": lambda classes: WideResNet(10, classes=classes),
    "wider_generated": lambda classes: WideResNet(28, 2, True, classes),
    "as_many_as_wider": lambda classes: WideResNet(16, classes=classes),
}


@dataclass(frozen=True)
class Settings:
    """How an arm is trained.

    A generated network by AdamW, as the paper's by Adam; a direct one by SGD with
    Nesterov's momentum, as the paper's. `pool` is the side of the squares of pixels
    that are averaged, `crop` the largest shift in pixels before that, `most` the test
    images at most (None: all).
    """

    batch: int = 128
    crop: int = 4
    pool: int = 2
    smoothing: float = 0.1
    momentum: float = 0.9
    decay: float = 5e-4
    validation: int = 3000
    most: int | None = None
    looks: int = 8


QUICK = Settings(batch=32, validation=200, most=500, looks=1)


def check_unit(arm: str, rate: float, epochs: float) -> None:
    """Raise a StudyError where there is no such unit."""
    if arm not in ARMS:
        raise StudyError(f"there is no arm '{arm}'; choose one of {', '.join(ARMS)}.")
    if min(rate, epochs) <= 0:
        raise StudyError(f"rate and epochs must be above 0, not {rate} and {epochs}.")


def measure(
    images: ImageSet,
    seed: int,
    profile: str,
    report: Callable[[str], None],
    checkpoint: Path | None,
    arm: str,
    rate: float,
    epochs: float,
) -> dict:
    """Train one network and measure it once on test images; a dict ready for JSON.

    Args:
        profile: "full", or "quick" to try it.
        checkpoint: a safetensors file from which a killed run goes on.
        arm: a key of `ARMS`.
        epochs: passes over the training images.

    Raises:
        StudyError: for a unit that does not exist.
    """
    check_unit(arm, rate, epochs)
    settings = QUICK if profile == "quick" else Settings()
    pictures = Pictures(
        images,
        settings.validation,
        settings.batch,
        crop=settings.crop,
        pool=settings.pool,
        most=settings.most,
    )
    network = _new(arm, seed, images)
    steps = max(1, round(epochs * len(pictures.train) / settings.batch))
    rows = _train(network, pictures, settings, rate, steps, seed, checkpoint)
    report(f"{arm} at rate {rate:g}: {rows[-1]}")
    return {
        "arm": arm,
        "rate": rate,
        "epochs": epochs,
        "settings": asdict(settings),
        "images": len(pictures.train),
        "parameters": sum(each.numel() for each in network.parameters()),
        "multiply_adds": multiply_adds(network, pictures.batch(0, seed)[0]),
        "validation": round(pictures.accuracy(network, "validation"), 4),
        "test": round(pictures.accuracy(network, "test"), 4),
        "train_loss": rows[-1]["loss"],
        "train_seconds": rows[-1]["seconds"],
        "history": rows,
    }


def _new(arm: str, seed: int, images: ImageSet) -> Generated:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ARMS[arm](images.classes).to(images.device)


def _train(
    network: Generated,
    pictures: Pictures,
    settings: Settings,
    rate: float,
    steps: int,
    seed: int,
    checkpoint: Path | None,
) -> list[dict[str, float]]:
    """Train in place; what was measured on the way, in few digits."""

    def loss_at(step: int) -> Tensor:
        pixels, labels = pictures.batch(step, seed)
        smoothing = settings.smoothing
        return F.cross_entropy(network(pixels), labels, label_smoothing=smoothing)

    def look() -> dict[str, float]:
        return {"validation_accuracy": pictures.accuracy(network, "validation")}

    history = train(
        network,
        _optimizer(network, rate, settings),
        loss_at,
        steps,
        schedule=one_cycle,
        evaluate=look,
        every=-(-steps // settings.looks),
        checkpoint=checkpoint,
    )
    return rounded_rows(history.rows)


def _optimizer(
    network: Generated, rate: float, settings: Settings
) -> torch.optim.Optimizer:
    numbers: list[nn.Parameter] = list(network.parameters())
    if network.hyper is not None:
        return torch.optim.AdamW(numbers, lr=rate, weight_decay=settings.decay)
    momentum, decay = settings.momentum, settings.decay
    return torch.optim.SGD(
        numbers, lr=rate, momentum=momentum, weight_decay=decay, nesterov=True
    )
