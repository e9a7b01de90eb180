"""Predicting a dataset's network against training it: accuracy over seconds, on
datasets of unseen classes.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minisupernet.course.records import rounded
from minisupernet.course.studies.rates import best_rate
from minisupernet.data import ImageSet, augment, normalise
from minisupernet.data.episodes import Batch, Episodes
from minisupernet.pudnet import Learner, cosine_logits, prototypes
from minisupernet.seeds import step_generator
from minisupernet.target import run_tasks
from minisupernet.training import one_cycle, train, wait_for

__all__ = ["DatasetFits", "FitBudget", "kept_for_training", "measure_fits"]

Weights = dict[str, Tensor]  # name -> (T, *shape)


@dataclass(frozen=True)
class FitBudget:
    """Runs of so many `epochs` each from scratch, and of so many `tuned_epochs` from
    made weights.

    Each run has its own one-cycle schedule, so that a short one is a short schedule and
    not a part of a long one. The learning rate is the one of `rates` with the best
    validation accuracy after `trial_epochs`. Predictions see all images or `few` of
    each class; training steps see `images` of a dataset.
    """

    epochs: tuple[float, ...] = (0.25, 0.5, 1, 2, 4, 12)
    tuned_epochs: tuple[float, ...] = (0.5, 2, 6)
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    trial_epochs: float = 1
    images: int = 50
    few: int = 20


class DatasetFits:
    """T datasets of unseen classes, made from all their training images but a tenth,
    which chooses learning rates.

    All T are predicted, or trained, side by side; seconds are for one of them, the T-th
    part of all.
    """

    def __init__(
        self,
        target: nn.Module,
        images: ImageSet,
        datasets: list[list[int]],
        batch: int,
        seed: int,
    ) -> None:
        self.target, self.images, self.size, self.seed = target, images, batch, seed
        classes = sorted({number for each in datasets for number in each})
        kept, self.support = _hold_back(images)
        self.test = Episodes(images, classes, test=True).whole(datasets, self.support)
        self.validation = Episodes(kept, classes, test=True).whole(
            datasets, self.support
        )
        each_class = {
            c: (kept.train_labels == c).nonzero().flatten()[: self.support]
            for c in classes
        }
        self.members = torch.stack(
            [torch.stack([each_class[c] for c in each]) for each in datasets]
        )  # (T, way, k)
        self.pixels = kept.train_images

    @torch.no_grad()
    def predict(
        self, generator: nn.Module, few: int | None = None
    ) -> tuple[Weights, Tensor, float]:
        """Made weights, prototypes (T, way, F) and the seconds that making both took
        for one dataset, best of three.

        Args:
            few: show only the first so many images of each class; None for all.
        """
        way, seconds = self.test.way, []
        shown = self.test.support.unflatten(1, (way, -1))[:, :, :few].flatten(
            1, 2
        )  # (T, way * few, 3, 32, 32)
        for _ in range(3):
            wait_for(self.images.device)
            began = time.perf_counter()
            weights = generator(shown)
            centres = prototypes(self._features(weights, shown), way)
            wait_for(self.images.device)
            seconds.append(time.perf_counter() - began)
        return weights, centres, min(seconds) / len(centres)

    def fit(
        self, weights: Weights, rate: float, epochs: float, temperature: float
    ) -> tuple[Weights, Tensor, float]:
        """Train all weights and the class centres from a start; the trained ones and
        the seconds for one dataset.
        """
        with torch.no_grad():
            features = self._features(weights, self.test.support)
        first = prototypes(features, self.test.way)
        places = {name: name.replace(".", "/") for name in weights}
        state = nn.ParameterDict(
            {
                place: nn.Parameter(weights[name].clone())
                for name, place in places.items()
            }
        )
        state["centres"] = nn.Parameter(F.normalize(first, dim=2))
        steps = max(round(epochs * self.members[0].numel() / self.size), 1)

        def made() -> Weights:
            return {name: state[place] for name, place in places.items()}

        def loss_at(step: int) -> Tensor:
            pixels, labels = self._draw(step)  # (T, B, 3, 32, 32), (T, B)
            found = run_tasks(self.target, made(), pixels)
            logits = cosine_logits(found, state["centres"], temperature)
            mean = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return mean * len(labels)  # as if each were alone

        optimizer = torch.optim.AdamW(state.parameters(), lr=rate, fused=True)
        wait_for(self.images.device)
        began = time.perf_counter()
        settings = {"schedule": one_cycle, "every": steps, "label": "fitting"}
        train(state, optimizer, loss_at, steps, **settings)
        wait_for(self.images.device)
        seconds = (time.perf_counter() - began) / len(first)
        fitted = {name: own.detach() for name, own in made().items()}
        return fitted, state["centres"].detach(), seconds

    @torch.no_grad()
    def accuracy(self, weights: Weights, centres: Tensor, batch: Batch) -> Tensor:
        """The share of each dataset's query images that it gets right, (T,)."""
        guesses = cosine_logits(
            self._features(weights, batch.query), centres, 1.0
        ).argmax(2)
        return (guesses == batch.labels).float().mean(1)

    def _draw(self, step: int) -> tuple[Tensor, Tensor]:
        random = step_generator(self.seed, step, self.images.device)
        tasks, way, count = self.members.shape
        picks = torch.randint(
            way * count, (tasks, self.size), generator=random, device=random.device
        )  # (T, B)
        pixels = augment(self.pixels[self.members.flatten(1).gather(1, picks)], random)
        return normalise(pixels, self.images.mean, self.images.std), picks // count

    def _features(self, weights: Weights, pixels: Tensor) -> Tensor:
        return torch.cat(
            [
                run_tasks(self.target, weights, part)
                for part in pixels.split(250, dim=1)
            ],
            dim=1,
        )


def measure_fits(
    learners: dict[str, Learner],
    images: ImageSet,
    unseen: list[int],
    budget: FitBudget,
    seed: int,
    report: Callable[[str], None],
) -> dict:
    """Predict and train networks for disjoint datasets of five unseen classes;
    accuracies, seconds and rates an arm.
    """
    way = min(5, len(unseen))
    order = torch.randperm(
        len(unseen), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    datasets = [
        [unseen[n] for n in order[start : start + way]]
        for start in range(0, len(order) - way + 1, way)
    ]
    learner = learners["pudnet"]
    fits = DatasetFits(learner.target, images, datasets, budget.images, seed + 6_000)
    found: dict = {
        "classes": datasets,
        "train_per_class": fits.support,
        "predicted": {},
        "few": {},
        "fits": {},
    }
    random = torch.Generator(images.device).manual_seed(seed)
    spec = learner.generator.spec
    starts = {"scratch": spec.split(spec.draw(len(datasets), random))}
    for arm in ("pudnet", "one_network", "untrained"):
        for name, few in (("few", budget.few), ("predicted", None)):
            weights, centres, seconds = fits.predict(learners[arm].generator, few)
            accuracy = rounded(fits.accuracy(weights, centres, fits.test))
            found[name][arm] = {"seconds": round(seconds, 5), "accuracy": accuracy}
        starts |= {arm: weights} if arm != "untrained" else {}
    for arm, weights in starts.items():
        found["fits"][arm] = _curve(
            fits,
            weights,
            budget,
            arm == "scratch",
            learner.log_temperature.exp().item(),
        )
        last = found["fits"][arm]["curve"][-1]
        report(
            f"fits from {arm}: {sum(last['accuracy']) / len(datasets):.3f} in"
            f" {last['seconds']:.1f} s"
        )
    return found


def _curve(
    fits: DatasetFits,
    start: Weights,
    budget: FitBudget,
    scratch: bool,
    temperature: float,
) -> dict:
    """The rate that a short run found best, and the runs of every length at that
    rate.
    """

    def trial(rate: float) -> tuple[float, None]:
        weights, centres, _ = fits.fit(start, rate, budget.trial_epochs, temperature)
        value = fits.accuracy(weights, centres, fits.validation).mean().item()
        return round(value, 4), None

    (rate, *_), tried, curve = budget.rates, [], []
    if len(budget.rates) > 1:
        rate, _, tried = best_rate(budget.rates, trial)
    for epochs in budget.epochs if scratch else budget.tuned_epochs:
        weights, centres, seconds = fits.fit(start, rate, epochs, temperature)
        accuracy = rounded(fits.accuracy(weights, centres, fits.test))
        curve.append(
            {"epochs": epochs, "seconds": round(seconds, 4), "accuracy": accuracy}
        )
    return {"rate": rate, "tried": tried, "curve": curve}


def kept_for_training(images: ImageSet) -> int:
    """Training images a class that are left after the last tenth is kept for
    validation.
    """
    return int(torch.bincount(images.train_labels).min()) * 9 // 10


def _hold_back(images: ImageSet) -> tuple[ImageSet, int]:
    """The image set with a tenth of each class's training images in place of its test
    images; and how many stay.
    """
    numbers = [
        (images.train_labels == number).nonzero().flatten()
        for number in range(images.classes)
    ]
    stay = kept_for_training(images)
    train, held = (
        torch.cat([own[:stay] for own in numbers]),
        torch.cat([own[stay:] for own in numbers]),
    )
    return (
        replace(
            images,
            train_images=images.train_images[train],
            train_labels=images.train_labels[train],
            test_images=images.train_images[held],
            test_labels=images.train_labels[held],
        ),
        stay,
    )
