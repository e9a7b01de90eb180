"""Where a look can pay: a family of data sets, each with a change of its own.

A data set is five classes and one change of all its images, the same for support and
query: its colours are mixed, and with "all" its images are also blurred and their
blocks shuffled. One network must serve every change; PudNet sees the data set before it
makes the network. Classes and changes of the test are never met in training. A unit is
one arm on one split of the classes, which the seed draws.
"""

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from minisupernet.course.records import rounded, rounded_rows
from minisupernet.course.studies.rates import best_rate_once
from minisupernet.data import ImageSet
from minisupernet.data.episodes import Batch, Episodes, Shape
from minisupernet.errors import StudyError
from minisupernet.pudnet import (
    DatasetEncoder,
    FeatureNet,
    Learner,
    OneNetwork,
    PudNet,
)
from minisupernet.seeds import step_generator
from minisupernet.target import WeightSpec
from minisupernet.training import History, one_cycle, train

__all__ = [
    "ARMS",
    "CHANGES",
    "Changes",
    "ClassEncoder",
    "Family",
    "Settings",
    "Unit",
    "aligned",
    "check_choice",
    "check_size",
    "check_unit",
    "class_split",
    "draw_changes",
    "measure",
]

CHANGES = ("none", "colours", "all")
BLOCK, SIDE = 8, 4  # pixels of a block, and blocks in a row of an image


@dataclass(frozen=True)
class Settings:
    """How much is done.

    Each of `rates` is tried in `trial` steps, and one more where the best is at the
    edge; steps have `tasks` episodes of the form `shape`. `rank` and `share` are those
    of PudNet's heads. Arms are judged on `episodes` of each number of `supports`.
    """

    tasks: int = 8
    shape: Shape = Shape(5, 5, 10)
    rates: tuple[float, ...] = (1e-3, 3e-3, 9e-3)
    trial: int = 300
    rank: int = 16
    share: float = 0.1
    supports: tuple[int, ...] = (1, 5)
    episodes: int = 600
    checks: int = 100
    looks: int = 10


QUICK = Settings(
    tasks=2,
    shape=Shape(5, 2, 2),
    rates=(3e-3,),
    trial=1,
    supports=(2,),
    episodes=10,
    checks=10,
    looks=2,
)


class ClassEncoder(DatasetEncoder):
    """A sketch that knows labels: from the images' embeddings e the mean of the class
    means, their spread between classes, and the spread within, (T, width).

    Datasets lie class by class, `way` classes of equal size.
    """

    def __init__(self, width: int, way: int) -> None:
        super().__init__(width)
        self.way, self.join = way, nn.Linear(3 * width, width)

    def forward(self, datasets: Tensor) -> Tensor:
        each = super().forward(datasets.flatten(0, 1).unsqueeze(1))  # (T * S, width)
        classes = each.unflatten(0, (len(datasets), self.way, -1))  # (T, way, k, width)
        means = classes.mean(2)  # (T, way, width)
        within = (classes - means.unsqueeze(2)).square().mean((1, 2)).add(1e-5).sqrt()
        between = means.var(1, correction=0).add(1e-5).sqrt()
        return self.join(torch.cat([means.mean(1), between, within], dim=1))


def _pudnet(
    spec: WeightSpec, settings: Settings, share: float | None = None
) -> nn.Module:
    share = settings.share if share is None else share
    return PudNet(spec, rank=settings.rank, code_share=share)


def _pudnet_labels(spec: WeightSpec, settings: Settings) -> nn.Module:
    generator = _pudnet(spec, settings)
    width = generator.encoder.output.out_features
    generator.encoder = ClassEncoder(width, settings.shape.way)
    return generator


ARMS: dict[str, Callable[[WeightSpec, Settings], nn.Module]] = {
    "one_network": lambda spec, settings: OneNetwork(spec),
    "aligned": lambda spec, settings: OneNetwork(spec),
    "pudnet": _pudnet,
    "pudnet_labels": _pudnet_labels,
    "pudnet_share_01": lambda spec, settings: _pudnet(spec, settings, 0.01),
    "pudnet_share_30": lambda spec, settings: _pudnet(spec, settings, 0.3),
}


@dataclass(frozen=True)
class Changes:
    """The changes of T data sets: `mixing` (T, 3, 3) multiplies each pixel's colour,
    `down` and `across` (T, 32, 32) blur columns and rows, `order` (T, 16) says which
    block comes where.
    """

    mixing: Tensor
    down: Tensor | None = None
    across: Tensor | None = None
    order: Tensor | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Images (T, S, 3, 32, 32), changed."""
        images = torch.einsum("tij,tsjhw->tsihw", self.mixing, images)
        if self.order is None:
            return images
        images = self.down.unsqueeze(1).unsqueeze(1) @ images
        images = images @ self.across.unsqueeze(1).unsqueeze(1).mT
        cut = (SIDE, BLOCK)
        blocks = images.unflatten(4, cut).unflatten(3, cut).transpose(4, 5)
        blocks = blocks.flatten(3, 4).movedim(3, 1)  # (T, 16, S, 3, 8, 8)
        every = torch.arange(len(blocks), device=blocks.device).unsqueeze(1)
        blocks = blocks[every, self.order].movedim(1, 3)  # (T, S, 3, 16, 8, 8)
        return (
            blocks.unflatten(3, (SIDE, SIDE)).transpose(4, 5).flatten(5).flatten(3, 4)
        )

    def of_the_next(self) -> "Changes":
        """Each data set's change given to the one before it."""
        moved = (
            part if part is None else part.roll(1, 0) for part in vars(self).values()
        )
        return Changes(*moved)


def draw_changes(
    kind: str, count: int, random: torch.Generator, device: torch.device
) -> Changes:
    """`count` random changes of a kind, one of `CHANGES`.

    Colours are multiplied by a random orthogonal matrix, which half the time also
    mirrors them, as an inverted picture does. A blur is a Gaussian of 0 to 1.5 pixels
    down and another across; blocks of 8 x 8 pixels are put in a random order.
    """
    if kind == "none":
        return Changes(torch.eye(3, device=device).expand(count, 3, 3))
    q, r = torch.linalg.qr(torch.randn(count, 3, 3, generator=random))
    mixing = q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)
    if kind == "colours":
        return Changes(mixing.to(device))
    spread = 0.05 + 1.45 * torch.rand(2, count, 1, 1, generator=random)
    places = torch.arange(BLOCK * SIDE)
    apart = (places - places.unsqueeze(1)) / spread  # (2, T, 32, 32)
    blur = (-apart.square() / 2).softmax(-1)
    order = torch.rand(count, SIDE**2, generator=random).argsort(1)
    return Changes(*(part.to(device) for part in (mixing, *blur, order)))


def aligned(batch: Batch) -> Batch:
    """The look made by hand: colours are turned to the principal axes of the support's,
    so that a data set looks alike however its colours were turned.

    An axis points where the third moment along it is above 0.
    """
    colours = batch.support.movedim(2, -1).flatten(1, -2)  # (T, pixels, 3)
    centre = colours.mean(1, keepdim=True)
    axes = torch.linalg.eigh((colours - centre).mT @ (colours - centre))[1]
    third = ((colours - centre) @ axes).pow(3).mean(1, keepdim=True)  # (T, 1, 3)
    turn = (axes * torch.where(third < 0, -1.0, 1.0)).mT  # (T, 3, 3)

    def turned(images: Tensor) -> Tensor:
        away = images - centre.view(-1, 1, 3, 1, 1)
        return torch.einsum("tij,tsjhw->tsihw", turn, away)

    return Batch(batch.classes, turned(batch.support), turned(batch.query))


class Family:
    """Draws episodes of some classes, each changed in its own way."""

    def __init__(self, episodes: Episodes, kind: str, seed: int) -> None:
        self.episodes, self.kind, self.seed = episodes, kind, seed

    def draw(self, step: int, shape: Shape, count: int) -> tuple[Batch, Changes]:
        """The unchanged episodes of one step, and their changes."""
        random = step_generator(self.seed + 11_000, step)
        batch = self.episodes.draw(step, self.seed, shape, count)
        device = batch.support.device
        return batch, draw_changes(self.kind, count, random, device)


def changed(batch: Batch, changes: Changes) -> Batch:
    """The episodes as an arm meets them."""
    return Batch(batch.classes, changes(batch.support), changes(batch.query))


def class_split(images: ImageSet, seed: int) -> tuple[list[int], list[int], list[int]]:
    """Training, validation and test classes, by whole superclasses where there are any:
    seven, one and two tenths of them.
    """
    groups = [[number] for number in range(images.classes)]
    if images.superclass_of is not None:
        parents = images.superclass_of.tolist()
        groups = [
            [number for number, own in enumerate(parents) if own == parent]
            for parent in sorted(set(parents))
        ]
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(groups), generator=random).tolist()
    first, second = round(0.7 * len(order)), round(0.8 * len(order))
    parts = order[:first], order[first:second], order[second:]
    training, validation, test = (
        sorted(number for place in part for number in groups[place]) for part in parts
    )
    return training, validation, test


def check_unit(arm: str, changes: str, channels: int, steps: int) -> None:
    """Raise a StudyError where there is no such unit."""
    check_choice("arm", arm, ARMS)
    check_choice("changes", changes, CHANGES)
    check_size(channels, steps)


def check_choice(name: str, value: str, known: Collection[str]) -> None:
    """Raise a StudyError where a unit's parameter is none of those known."""
    if value not in known:
        raise StudyError(
            f"{name} cannot be '{value}'; choose one of {', '.join(known)}."
        )


def check_size(channels: int, steps: int) -> None:
    """Raise a StudyError where no target has so many channels, or for no steps."""
    if channels < 4 or channels % 4 or steps < 1:
        raise StudyError(
            "channels must be 4 or a multiple of it, and steps from 1, not"
            f" {channels} and {steps}."
        )


@dataclass(frozen=True, eq=False)
class Unit:
    """One arm on one split, and all that its training and its test draw from."""

    arm: str
    channels: int
    steps: int
    images: ImageSet
    seed: int
    settings: Settings
    training: Family
    validation: Family
    checkpoint: Path | None

    def prepare(self, batch: Batch) -> Batch:
        """The episodes as this arm takes them."""
        return aligned(batch) if self.arm == "aligned" else batch

    def new_learner(self) -> Learner:
        """The arm at its start, which the seed draws; prototype loss alone."""
        features = 4 * self.channels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            target = FeatureNet(self.channels, features)
            generator = ARMS[self.arm](WeightSpec.of(target), self.settings)
            learner = Learner(generator, target, features, 1, auxiliary=False)
        return learner.to(self.images.device)

    def train(
        self, rate: float, steps: int, checkpoint: Path | None = None
    ) -> tuple[Learner, History]:
        """A learner after so many steps, and what was measured on the way."""
        settings, learner = self.settings, self.new_learner()

        def loss_at(step: int) -> Tensor:
            drawn = self.training.draw(step, settings.shape, settings.tasks)
            return learner.loss(self.prepare(changed(*drawn)))

        history = train(
            learner,
            torch.optim.AdamW(learner.parameters(), lr=rate, fused=True),
            loss_at,
            steps,
            schedule=one_cycle,
            every=-(-steps // settings.looks),
            checkpoint=checkpoint,
            run={"arm": self.arm, "seed": str(self.seed)},
            label=self.arm,
            evaluate=lambda: {"validation_accuracy": self.check(learner)},
        )
        return learner, history

    def check(self, learner: Learner) -> float:
        """Mean accuracy on the same validation episodes every time."""
        count = min(10, self.settings.checks)
        found = []
        for step in range(self.settings.checks // count):
            drawn = self.validation.draw(step, self.settings.shape, count)
            found.append(learner.accuracy(self.prepare(changed(*drawn))))
        return torch.cat(found).mean().item()

    def choose(self) -> dict:
        """The learning rate, and all that were tried."""
        rates = self.settings.rates

        def trial(rate: float) -> float:
            history = self.train(rate, self.settings.trial)[1]
            return round(history.last("validation_accuracy"), 4)

        most = len(rates) + 1 if len(rates) > 1 else None
        return best_rate_once(self.kept, rates, trial, most)

    @property
    def kept(self) -> Path | None:
        """Where the choice is kept for a unit that is killed."""
        return self.checkpoint and self.checkpoint.with_suffix(".rate")

    def test(self, learner: Learner, family: Family, support: int) -> dict[str, float]:
        """Mean accuracy over `on_episodes`."""
        return {
            name: round(fmean(values), 4)
            for name, values in self.on_episodes(learner, family, support).items()
        }

    def forget(self) -> None:
        """Remove what was kept for a unit that is killed."""
        if self.kept:
            self.kept.unlink(missing_ok=True)

    def shown(self, batch: Batch, changes: Changes) -> dict[str, Tensor | None]:
        """What a generator that looks is shown: the data set itself, another one, other
        classes in its own change, or its own in another."""
        if "pudnet" not in self.arm:
            return {"own": None}
        others, there = batch.support.roll(1, 0), changes.of_the_next()
        return {
            "own": None,
            "wrong": there(others),
            "other_classes": changes(others),
            "other_change": there(batch.support),
        }

    def on_episodes(
        self, learner: Learner, family: Family, support: int
    ) -> dict[str, list[float]]:
        """Accuracy on each test episode, by what the generator is shown."""
        shape = Shape(self.settings.shape.way, support, self.settings.shape.query)
        found: dict[str, list[float]] = {}
        for step in range(self.settings.episodes // 10):
            batch, changes = family.draw(step, shape, 10)
            met = self.prepare(changed(batch, changes))
            for name, datasets in self.shown(batch, changes).items():
                values = rounded(learner.accuracy(met, datasets))
                found[name] = found.get(name, []) + values
        return found


def measure(
    images: ImageSet,
    seed: int,
    profile: str,
    report: Callable[[str], None],
    checkpoint: Path | None,
    arm: str,
    changes: str,
    channels: int,
    steps: int,
) -> dict:
    """Choose a rate, train one arm and test it on classes and changes never met; a dict
    ready for JSON.

    Args:
        profile: "full", or "quick" to try it.
        checkpoint: a safetensors file from which a killed run goes on.
        arm: a key of `ARMS`.
        changes: one of `CHANGES`.
        channels: of the target's first layer; its features are four times as many.

    Raises:
        StudyError: for a unit that does not exist.
        EpisodeError: where the image set has too few classes or images.
    """
    check_unit(arm, changes, channels, steps)
    settings = QUICK if profile == "quick" else Settings()
    classes = class_split(images, seed)
    training = Family(Episodes(images, classes[0], flip=True), changes, seed)
    validation = Family(Episodes(images, classes[1]), changes, seed + 7_000)
    test = Family(Episodes(images, classes[2], test=True), changes, seed + 5_000)
    for family in (training, validation, test):
        family.episodes.check(settings.shape)
    unit = Unit(
        arm, channels, steps, images, seed, settings, training, validation, checkpoint
    )
    chosen = unit.choose()
    learner, history = unit.train(chosen["rate"], steps, checkpoint)
    tested = {str(k): unit.test(learner, test, k) for k in settings.supports}
    report(f"{arm}, {changes}, {channels} channels, seed {seed}: {tested}")
    unit.forget()
    return {
        "arm": arm,
        "changes": changes,
        "channels": channels,
        "steps": steps,
        "settings": asdict(settings),
        "classes": dict(zip(("training", "validation", "test"), classes, strict=True)),
        "parameters": sum(each.numel() for each in learner.generator.parameters()),
        "weights": learner.generator.spec.size,
        **chosen,
        "test": tested,
        "train_loss": round(history.last("loss"), 4),
        "train_seconds": round(history.last("seconds"), 1),
        "history": rounded_rows(history.rows),
    }
