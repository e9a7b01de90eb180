"""Networks that grow while they train: what they cost, and how accurate they are at
each cost.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from minisupernet.classification import accuracy
from minisupernet.data import ImageSet, augment, normalise
from minisupernet.data.images import held_back
from minisupernet.net2net import Widening, carry_over
from minisupernet.seeds import step_generator
from minisupernet.training import train

__all__ = ["Growing", "Growth", "Run", "Settings", "conv_net"]


@dataclass(frozen=True)
class Settings:
    """Sizes and steps of the study; on a GPU, give `measure` larger ones than its
    profiles have.

    A teacher trains `first` steps; growth and what follows take `second` steps, the
    last `cool` of them at a tenth of the rate in any case. `widths` are the channels of
    the three stages and `convolutions` how many each has: with the linear layer, 5
    layers. The teacher of the first phase has `widths` divided by `factor`. `to_8` and
    `to_20` list the growths one after the other, each the stages that get one more
    layer. `noise` and `much_noise` are on copied units, in standard deviations. Curves
    are measured on `curve_images` test images, the same for all runs, final accuracies
    on `test_images`.
    """

    first: int = 700
    second: int = 500
    cool: int = 150
    rate: float = 0.05
    momentum: float = 0.9
    batch: int = 100
    noise: float = 0.05
    much_noise: float = 0.5
    widths: tuple[int, ...] = (8, 16, 32)
    factor: int = 2
    convolutions: tuple[int, ...] = (2, 1, 1)
    to_8: tuple[tuple[int, ...], ...] = ((0,), (1,), (2,))
    to_20: tuple[tuple[int, ...], ...] = ((0, 1, 2),) * 4
    validation: int = 5000
    curve_images: int = 2000
    test_images: int = 10_000
    every: int = 100


def conv_net(
    widths: Sequence[int], convolutions: Sequence[int], classes: int, seed: int = 0
) -> nn.Sequential:
    """Stages of 3x3 convolutions with BatchNorm and ReLU, each halving the image once,
    then a mean and a linear layer.

    Args:
        widths: channels of each stage; `convolutions` how many there are in each.
    """
    layers, channels = [], 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for width, count in zip(widths, convolutions, strict=True):
            for place in range(count):
                layers.append(
                    nn.Conv2d(channels, width, 3, stride=1 if place else 2, padding=1)
                )
                layers += [nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
        return nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
        )


@dataclass
class Run:
    """A network in training, and what it has cost so far, its teacher's cost included.

    `flops` counts forward and backward passes, `seconds` the training without
    evaluation; each row of `curve` has both, with `step` and the accuracy `test` on the
    curve's images.
    """

    model: nn.Module
    optimizer: Optimizer
    step: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


class Growing:
    """Trains, grows and measures networks on one image set with one seed; every network
    sees the same batches.
    """

    def __init__(self, images: ImageSet, seed: int, settings: Settings) -> None:
        self.images, self.seed, self.settings = images, seed, settings
        order = torch.randperm(
            len(images.train_labels), generator=step_generator(0, -1)
        ).to(images.device)
        kept = held_back(len(order), settings.validation)
        self.held_out, self.used = order.tensor_split([kept])
        self.shown = torch.randperm(
            len(images.test_labels), generator=step_generator(0, -2)
        ).to(images.device)
        batch = images.train_images[self.used[: settings.batch]]
        # (batch, 3, 32, 32), for BatchNorm in `deepen`
        self.statistics = self.prepare(batch)

    def start(self, widths: Sequence[int], convolutions: Sequence[int]) -> Run:
        """A new network and its optimiser."""
        model = conv_net(widths, convolutions, self.images.classes, self.seed).to(
            self.images.device
        )
        return Run(
            model,
            SGD(
                model.parameters(),
                lr=self.settings.rate,
                momentum=self.settings.momentum,
            ),
        )

    def grow(self, run: Run, model: nn.Module, plan: Widening | None = None) -> Run:
        """A run that goes on with a network made from that of `run`, which itself stays
        as it is.
        """
        grown = replace(
            run,
            model=model,
            optimizer=carry_over(run.optimizer, run.model, model, plan),
        )
        grown.curve = list(run.curve)
        return grown

    def train(self, run: Run, until: int, schedule: str) -> Run:
        """Train up to step `until`, in place, with a look every `every` steps;
        `schedule` is "early" or "late".
        """
        cost = self._step_flops(run.model)
        run.curve.append(self._row(run))
        while run.step < until:
            steps, first = min(self.settings.every, until - run.step), run.step
            for group in run.optimizer.param_groups:
                group["lr"] = self.settings.rate * self.factor(first, schedule)
            run.model.train()
            began = time.perf_counter()
            train(
                run.model,
                run.optimizer,
                lambda step, first=first: self._loss(run.model, first + step),
                steps,
            )
            run.seconds += time.perf_counter() - began
            run.step, run.flops = run.step + steps, run.flops + steps * cost
            run.curve.append(self._row(run))
        return run

    def factor(self, step: int, schedule: str) -> float:
        """The rate at a step, as a share of the full one: 1 or 0.1."""
        amount = self.settings
        falls = (
            amount.first
            if schedule == "early"
            else amount.first + amount.second - amount.cool
        )
        return 1.0 if step < falls else 0.1

    def grown(self, teacher: Run, growths: Sequence["Growth"], schedule: str) -> Run:
        """Go on from a teacher through one growth after the other, evenly spaced up to
        the last `cool` steps.
        """
        amount, run = self.settings, self.grow(teacher, copy.deepcopy(teacher.model))
        apart = (amount.second - amount.cool) // max(len(growths), 1)
        for number, growth in enumerate(growths, 1):
            run = self.train(growth(self, run), amount.first + number * apart, schedule)
        return self.train(run, amount.first + amount.second, schedule)

    def accuracy(self, model: nn.Module, images: Tensor, labels: Tensor) -> float:
        """The share of images (N, 3, 32, 32) uint8 that the network, in eval mode, puts
        into their class."""
        return round(accuracy(model, self.prepare, images, labels), 4)

    def prepare(self, pixels: Tensor) -> Tensor:
        """Images (B, 3, 32, 32) uint8 to floats, normalised."""
        return normalise(pixels, self.images.mean, self.images.std)

    def summary(self, run: Run) -> dict:
        """What is recorded of a finished run."""
        images, held_out, shown = (
            self.images,
            self.held_out,
            self.shown[: self.settings.test_images],
        )
        return {
            "validation": self.accuracy(
                run.model, images.train_images[held_out], images.train_labels[held_out]
            ),
            "test": self.accuracy(
                run.model, images.test_images[shown], images.test_labels[shown]
            ),
            "parameters": sum(
                parameter.numel() for parameter in run.model.parameters()
            ),
            "flops": run.flops,
            "seconds": round(run.seconds, 2),
            "curve": run.curve,
        }

    def _row(self, run: Run) -> dict[str, float]:
        shown = self.shown[: self.settings.curve_images]
        test = self.accuracy(
            run.model, self.images.test_images[shown], self.images.test_labels[shown]
        )
        return {
            "step": run.step,
            "flops": run.flops,
            "seconds": round(run.seconds, 2),
            "test": test,
        }

    def _loss(self, model: nn.Module, step: int) -> Tensor:
        random, images = step_generator(self.seed, step), self.images
        picked = self.used[
            torch.randint(len(self.used), (self.settings.batch,), generator=random).to(
                self.used.device
            )
        ]
        pixels = normalise(
            augment(images.train_images[picked], random, crop=0),
            images.mean,
            images.std,
        )
        return F.cross_entropy(model(pixels), images.train_labels[picked])

    def _step_flops(self, model: nn.Module) -> float:
        """Floating-point operations of the convolutions and products in one training
        step.
        """
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            copy.deepcopy(model)(self.statistics).sum().backward()
        return float(counter.get_total_flops())


Growth = Callable[[Growing, Run], Run]  # a run that goes on with a larger network
