"""The study of chapter 8: what PudNet's networks are worth on classes never seen, what
they cost, what the sketch does.

Classes of the image set are cut three ways. The unseen ones are those of experiment 2's
held-out pairs of this seed's fold; ten of the next fold choose learning rates; the
others train. Every learning rate is chosen by one rule: each candidate gets a short
run, and the best on validation images gets the full one.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from minisupernet.course.records import rounded
from minisupernet.course.studies.pudnet_fits import (
    FitBudget,
    kept_for_training,
    measure_fits,
)
from minisupernet.course.studies.rates import best_rate
from minisupernet.data import ImageSet, load
from minisupernet.data.episodes import Batch, Episodes, Shape
from minisupernet.data.loading import is_at_hand
from minisupernet.data.tasks import experiment_2, hold_out, usable_folds
from minisupernet.pudnet import FeatureNet, Learner, OneNetwork, PudNet
from minisupernet.target import WeightSpec
from minisupernet.training import History, one_cycle, train

__all__ = ["Budget", "class_split", "measure", "measure_with"]

Report = Callable[[str], None]
Places = dict[str, tuple[Episodes, Shape]]  # where arms are compared, on which form


@dataclass(frozen=True)
class Budget:
    """How much is done. On a GPU: `measure_with(images, seed, Budget(steps=20_000,
    tasks=32), print)`.

    `steps` of `tasks` episodes of the form `shape` train each generator, after
    `trial_steps` for each of `rates`; `episodes` are what every arm is judged on, with
    `supports` support and `query` test images a class.
    """

    steps: int = 450
    tasks: int = 6
    shape: Shape = Shape(10, 5, 5)
    rates: tuple[float, ...] = (1e-3, 3e-3)
    trial_steps: int = 60
    episodes: int = 100
    query: int = 10
    supports: tuple[int, ...] = (1, 5, 50)
    fits: FitBudget = FitBudget()


@dataclass(frozen=True)
class Trained:
    """A learner after training, with what training it took."""

    learner: Learner
    record: dict


def measure(images: ImageSet, seed: int, profile: str, report: Report) -> dict:
    """Measure one seed; "full" takes about 12 minutes of one CPU core, "quick" half a
    minute.
    """
    quick = Budget(
        30,
        4,
        rates=(3e-3,),
        trial_steps=0,
        episodes=20,
        fits=FitBudget((0.25, 0.5), (0.25,), (3e-3,), 0.1),
    )
    return measure_with(images, seed, quick if profile == "quick" else Budget(), report)


def measure_with(images: ImageSet, seed: int, budget: Budget, report: Report) -> dict:
    """Train PudNet and its controls with one seed and measure every arm; a dict ready
    for JSON.
    """
    training, validation, unseen, pairs = class_split(images, seed)
    places, notes = _places(images, training, unseen, budget)
    Episodes(images, training).check(budget.shape)
    for episodes, shape in places.values():  # before anything is trained
        episodes.check(shape)
    arms: dict[str, Trained] = {}
    for arm in ("pudnet", "no_auxiliary", "one_network"):
        rates = budget.rates
        if arm == "no_auxiliary":
            rates = (arms["pudnet"].record["rate"],)
        split = (images, training, validation, rates, budget, seed)
        arms[arm] = train_learner(arm, *split)
        record = arms[arm].record
        report(f"{arm}: {record['seconds']:.0f} s at rate {record['rate']:g}")
    learners = {arm: trained.learner for arm, trained in arms.items()}
    learners["untrained"] = _new_learner("pudnet", images, seed)
    for learner in learners.values():
        # from here on every dataset is compared with the average of training
        learner.eval()
    new = Episodes(images, unseen, test=True)
    return {
        "settings": asdict(budget),
        "classes": {"training": training, "validation": validation, "unseen": unseen},
        "parameters": _sizes(learners),
        "training": {arm: trained.record for arm, trained in arms.items()},
        "episodes": _everywhere(learners, places, budget.episodes, seed, report),
        "notes": notes,
        "pairs": _on_pairs(learners, new, pairs, kept_for_training(images)),
        "datasets": measure_fits(learners, images, unseen, budget.fits, seed, report),
        "sketches": measure_sketches(learners, images, new, seed),
    }


def _everywhere(
    learners: dict[str, Learner],
    places: Places,
    count: int,
    seed: int,
    report: Report,
) -> dict[str, dict[str, list[float]]]:
    """Accuracy of every arm on `count` episodes of every place."""
    found = {}
    for name, (episodes, shape) in places.items():
        found[name] = _episode_accuracies(learners, episodes, shape, count, seed)
        means = (f"{arm} {sum(v) / len(v):.3f}" for arm, v in found[name].items())
        report(f"{name}: {', '.join(means)}")
    return found


def _sizes(learners: dict[str, Learner]) -> dict[str, int]:
    """Parameters of every arm's generator, and weights of the target."""
    generators = {arm: learner.generator for arm, learner in learners.items()}
    sizes = {
        arm: sum(parameter.numel() for parameter in generator.parameters())
        for arm, generator in generators.items()
    }
    return {**sizes, "target": generators["pudnet"].spec.size}


def _on_pairs(
    learners: dict[str, Learner],
    unseen: Episodes,
    pairs: list[tuple[int, list[int]]],
    support: int,
) -> dict:
    """Accuracy of every arm on experiment 2's held-out pairs."""
    binary = unseen.whole([pair for _, pair in pairs], support)
    about = {"numbers": [number for number, _ in pairs], "support_per_class": support}
    arms = {arm: rounded(learner.accuracy(binary)) for arm, learner in learners.items()}
    return about | arms


def class_split(
    images: ImageSet, seed: int
) -> tuple[list[int], list[int], list[int], list[tuple[int, list[int]]]]:
    """Training, validation and unseen classes, and the unseen pairs as (number of the
    task, [label 0, label 1]).
    """
    tasks, folds = experiment_2(images.classes), usable_folds(2, 5, images.classes)
    half = len(tasks) // 2

    def held(fold: int) -> list[int]:
        both = hold_out(2, fold % folds, folds, images.classes, pairs=True)[1]
        return [number for number in both if number < half]

    def classes_of(pairs: list[int]) -> list[int]:
        return tasks.select(pairs).classes

    pairs, others = held(seed % folds), held(seed % folds + 1)
    unseen = classes_of(pairs)
    validation = classes_of(others[: max(len(others) // 2, 1)])
    elsewhere = {*unseen, *validation}
    training = [number for number in range(images.classes) if number not in elsewhere]
    sides = [(n, [tasks.negative[n], tasks.positive[n]]) for n in pairs]
    return training, validation, unseen, sides


def train_learner(
    arm: str,
    images: ImageSet,
    training: list[int],
    validation: list[int],
    rates: tuple[float, ...],
    budget: Budget,
    seed: int,
) -> Trained:
    """Train "pudnet", "no_auxiliary" or "one_network" on episodes, at the rate that a
    short run found best.
    """
    episodes, unmet = (
        Episodes(images, training, flip=True),
        Episodes(images, validation),
    )
    shape = Shape(min(5, len(validation)), 5, budget.query)
    checks = [unmet.draw(step, seed + 7_000, shape, 20) for step in range(2)]

    def run(rate: float, steps: int) -> tuple[Learner, History]:
        learner = _new_learner(arm, images, seed)
        optimizer = torch.optim.AdamW(learner.parameters(), lr=rate, fused=True)

        def loss_at(step: int) -> Tensor:
            return learner.loss(episodes.draw(step, seed, budget.shape, budget.tasks))

        history = train(
            learner,
            optimizer,
            loss_at,
            steps,
            schedule=one_cycle,
            every=max(steps // 4, 1),
            label=arm,
            evaluate=lambda: {"validation_accuracy": _mean(learner, checks)},
        )
        return learner, history

    def trial(rate: float) -> tuple[float, None]:
        _, history = run(rate, budget.trial_steps)
        return round(history.last("validation_accuracy"), 4), None

    rate, tried = rates[0], []
    if len(rates) > 1:
        rate, _, tried = best_rate(rates, trial)
    learner, history = run(rate, budget.steps)
    rows = [{name: round(v, 4) for name, v in row.items()} for row in history.rows]
    about = {"rate": rate, "tried": tried, "seconds": rows[-1]["seconds"]}
    return Trained(learner, {**about, "history": rows})


@torch.no_grad()
def measure_sketches(
    learners: dict[str, Learner],
    images: ImageSet,
    unseen: Episodes,
    seed: int,
    draws: int = 6,
) -> dict:
    """What sketches hold: how they gather by superclass, and what share of the weights'
    size depends on the dataset.
    """
    batch = unseen.draw(0, seed + 8_000, Shape(min(5, len(unseen.classes)), 5, 1), 50)
    found: dict = {"weight_share": {}, "nearest": {}}
    for arm in ("pudnet", "untrained"):
        weights = learners[arm].generator(batch.support)
        found["weight_share"][arm] = {
            name: round(
                (tensor.var(0, correction=0).mean() / tensor.square().mean()).item(), 6
            )
            for name, tensor in weights.items()
        }
    if images.superclass_of is None:
        return found
    groups = [
        (images.superclass_of == number).nonzero().flatten().tolist()
        for number in images.superclass_of.unique()
    ]
    way = min(len(group) for group in groups)
    sets = [
        Episodes(images, group).draw(0, seed + 9_000 + n, Shape(way, 10, 1), draws)
        for n, group in enumerate(groups)
    ]
    own = torch.arange(len(groups), device=images.device).repeat_interleave(draws)
    for arm in ("pudnet", "untrained"):
        sketches = torch.cat(
            [learners[arm].generator.sketch(each.support) for each in sets]
        )  # (groups * draws, width)
        centred = sketches - sketches.mean(0)
        distances = torch.cdist(centred, centred).fill_diagonal_(float("inf"))
        found["nearest"][arm] = round(
            (own[distances.argmin(1)] == own).float().mean().item(), 4
        )
        if arm == "pudnet":
            plane = centred @ torch.linalg.svd(centred, full_matrices=False)[2][:2].T
            found["plane"] = [rounded(point) for point in plane]
            found["superclass"] = own.tolist()
    return found


def _new_learner(arm: str, images: ImageSet, seed: int) -> Learner:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        target = FeatureNet()
        spec = WeightSpec.of(target)
        generator = OneNetwork(spec) if arm == "one_network" else PudNet(spec)
        learner = Learner(
            generator, target, classes=images.classes, auxiliary=arm != "no_auxiliary"
        )
    return learner.to(images.device)


def _places(
    images: ImageSet, training: list[int], unseen: list[int], budget: Budget
) -> tuple[Places, list[str]]:
    """Where arms are compared, and a note on each image set that is not at hand."""
    new, seen = (Episodes(images, part, test=True) for part in (unseen, training))
    most, query = len(unseen), budget.query
    way = min(5, most)
    places = {
        f"unseen, 5-way, {k} a class": (new, Shape(way, k, query))
        for k in budget.supports
    }
    places["seen, 5-way, 5 a class"] = (seen, Shape(way, 5, query))
    places[f"unseen, {most}-way, 5 a class"] = (new, Shape(most, 5, query))
    notes = []
    for name, there in (("cifar10", is_at_hand("cifar10")), ("shapes100", True)):
        if name == images.name or not there:
            why = "the training set itself" if there else "not at hand, left out"
            notes.append(f"{name}: {why}")
            continue
        other = load(name, images.device)
        counts = f"{len(other.train_images)} train and {len(other.test_images)} test"
        notes.append(f"{name}: {counts} images")
        episodes = Episodes(other, range(other.classes), test=True)
        places[f"{name}, 5-way, 5 a class"] = (episodes, Shape(5, 5, query))
    return places, notes


def _episode_accuracies(
    learners: dict[str, Learner],
    episodes: Episodes,
    shape: Shape,
    count: int,
    seed: int,
) -> dict[str, list[float]]:
    """Accuracy of each arm on the same fixed episodes; `wrong_sketch` shows PudNet the
    next episode's dataset.
    """
    found: dict[str, list[float]] = {arm: [] for arm in [*learners, "wrong_sketch"]}
    at_once = 10 if shape.way * (shape.support + shape.query) <= 150 else 4
    at_once = min(at_once, count)
    for step in range(count // at_once):
        batch = episodes.draw(step, seed + 5_000, shape, at_once)
        for arm, learner in learners.items():
            found[arm] += rounded(learner.accuracy(batch))
        wrong = learners["pudnet"].accuracy(batch, batch.support.roll(1, 0))
        found["wrong_sketch"] += rounded(wrong)
    return found


def _mean(learner: Learner, batches: list[Batch]) -> float:
    return torch.cat([learner.accuracy(batch) for batch in batches]).mean().item()
