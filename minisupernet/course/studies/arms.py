"""Experiments 1 and 2: train the generator on some tasks, freeze it, fit only z on the
others, against controls.

`run_experiment` trains one generator on one `Fold` of tasks, as a `Setup` says, and
measures every arm on the held-out tasks, with the same images, steps and batch order
for each arm:

* `z_only`: z; the trained generator frozen. The claim.
* `random_generator`: z; a generator never trained, frozen. Is it a random subspace?
* `from_scratch`: all weights, from an ordinary start. Ordinary training.
* `fine_tuned`: all weights, from what the generator makes of the mean z. Transfer.
* `last_layer`, `biases`: those weights alone, from the same start. Few numbers.
* `one_network`: nothing: one ordinary network, trained on all trained tasks.
* `no_adaptation`: nothing: the generator's network for the mean z.
* `other_z`: nothing: the z fitted to another held-out task. Does z carry the task?
* `unfrozen`: z and the generator, as the original's code does. The flaw.

On the trained tasks, `right_z` against `wrong_z` (another task's) says whether z
carries the task.
"""

import copy
import fnmatch
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from minisupernet.course.records import fingerprint, provenance, rounded
from minisupernet.course.studies.geometry import Vectors, measure_geometry
from minisupernet.course.studies.rates import best_rate
from minisupernet.course.studies.setups import Setup
from minisupernet.data import ImageSet
from minisupernet.data.tasks import (
    BinaryTasks,
    TaskImages,
    all_pairs,
    experiment_1,
    experiment_2,
    hold_out,
)
from minisupernet.fitting import (
    Fit,
    accuracy,
    fit_shared,
    fit_weights,
    fit_z,
    train_generator,
)
from minisupernet.seeds import step_generator
from minisupernet.supernet import ClassVectors, SuperNet
from minisupernet.target import TaskClassifier, WeightSpec
from minisupernet.training import History

__all__ = [
    "ADAPTED",
    "Adapted",
    "Fold",
    "Trained",
    "adapt",
    "measure_arm",
    "run_experiment",
]

ADAPTED = ("z_only", "random_generator", "from_scratch", "fine_tuned")
# the weights that these arms fit
PARTS = {"last_layer": "output.*", "biases": "*.bias"}
Weights = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Fold:
    """One fold of an experiment: which tasks are trained and which held out (as task
    numbers), their images, and the network whose weights are made."""

    setup: Setup
    images: ImageSet
    seed: int
    number: int
    target: nn.Module
    spec: WeightSpec
    tasks: BinaryTasks
    trained: list[int]
    held_out: list[int]

    @classmethod
    def of(
        cls, setup: Setup, images: ImageSet, seed: int = 0, number: int | None = None
    ) -> "Fold":
        """The fold of this number; by default seed s holds out fold s."""
        number = seed % setup.folds if number is None else number
        target = TaskClassifier(setup.channels, head_activation=not setup.faithful)
        target = target.to(images.device)
        tasks = (experiment_1, experiment_2)[setup.experiment - 1](images.classes)
        trained, held_out = hold_out(
            setup.experiment, number, setup.folds, images.classes, setup.pairs
        )
        spec = WeightSpec.of(target)
        return cls(setup, images, seed, number, target, spec, tasks, trained, held_out)

    def new_generator(self, seed: int) -> SuperNet:
        """A generator as the setup wants it, at its random start."""
        setup = self.setup
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if setup.faithful:
                generator = SuperNet.original(self.spec, setup.z_dim)
            else:
                shape = (setup.z_dim, setup.hidden, setup.bound, setup.z_share)
                generator = SuperNet(self.spec, *shape)
        return generator.to(self.images.device)

    def images_of(self, tasks: BinaryTasks, per_class: int | None = None) -> TaskImages:
        """The images of any tasks, as this set-up shows them; of each class the first
        `per_class` to train on."""
        shown = {"raw": self.setup.raw, **self.setup.augmentation}
        return TaskImages(self.images, tasks, per_class=per_class, **shown)

    def data(self, numbers: list[int], per_class: int | None = None) -> TaskImages:
        """The images of the tasks with these numbers."""
        return self.images_of(self.tasks.select(numbers), per_class)

    def training_tasks(self) -> BinaryTasks:
        """What the generator is trained on: the trained tasks and, with `many_tasks`,
        every other pair of their classes that is not held out.

        The trained tasks are then repeated until they make up `own_share` of the list.
        """
        trained, share = self.tasks.select(self.trained), self.setup.own_share
        if not self.setup.many_tasks:
            return trained
        others = all_pairs(trained, but=self.tasks.select(self.held_out))
        times = max(1, round(len(others) * share / (1 - share) / len(trained)))
        return self.tasks.select(self.trained * times) + others

    def train(
        self, checkpoint: Path | None = None, generator: SuperNet | None = None
    ) -> "Trained":
        """Train a generator, in place, or a new one from its random start, and the
        vectors of its tasks."""
        fit, tasks = replace(self.setup.training, seed=self.seed), self.training_tasks()
        generator = self.new_generator(self.seed) if generator is None else generator
        vectors = None
        if self.setup.many_tasks:
            vectors = ClassVectors(tasks, self.setup.z_dim, self.seed)
        z, history = train_generator(
            generator,
            self.target,
            self.images_of(tasks),
            fit,
            vectors,
            one_hot=self.setup.one_hot,
            watch=self.data(self.trained),
            checkpoint=checkpoint,
        )
        u = None
        if vectors is not None:  # those of the classes that were asked about
            u = vectors.u.detach()[sorted({*tasks.positive, *tasks.negative})]
        return Trained(self, generator, z[: len(self.trained)], u, history)

    def test(self, weights: Weights, numbers: list[int] | None = None) -> list[float]:
        """Test accuracy of one network for each task with these numbers (the held-out
        ones)."""
        data = self.data(self.held_out if numbers is None else numbers)
        return rounded(accuracy(self.target, weights, data))

    def ordinary_start(self, tasks: int) -> Tensor:
        """Ordinary initial weights of so many networks, (tasks, P)."""
        rule = "glorot" if self.setup.faithful else "torch"
        random = step_generator(self.seed, -2, self.images.device)
        return self.spec.draw(tasks, random, rule)

    def random_z(self) -> Tensor:
        """Where the original starts a new z, (z_dim,): U(-0.244, 0.244) for 100."""
        limit = (6 / (1 + self.setup.z_dim)) ** 0.5
        random = torch.rand(self.setup.z_dim, generator=step_generator(self.seed, -1))
        return ((random * 2 - 1) * limit).to(self.images.device)

    def fit_at(self, rate: float) -> Fit:
        """How every arm is fitted to a new task, at this learning rate."""
        seed = self.seed + 500
        return replace(self.setup.adaptation, rate=rate, z_rate=rate, seed=seed)


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained generator, the vectors `z` (T, z_dim) of the trained tasks, and with
    many tasks `u` (classes, z_dim), those of the classes that were asked about."""

    fold: Fold
    generator: SuperNet
    z: Tensor
    u: Tensor | None
    history: History

    def mean_z(self) -> Tensor:
        """Where a new task's z starts, (z_dim,): the mean of learned ones; the
        original's has a start of its own."""
        return self.fold.random_z() if self.fold.setup.faithful else self.z.mean(0)

    def shared_weights(self) -> Tensor:
        """The one network nobody adapted, (1, P): of the mean z, or of z = 0 for the
        original (its shared column)."""
        z = self.mean_z() * (0.0 if self.fold.setup.faithful else 1.0)
        with torch.no_grad():
            return self.generator.flat(z.unsqueeze(0))

    def test_z(self, z: Tensor, numbers: list[int] | None = None) -> list[float]:
        """Test accuracy of the networks of task vectors (T, z_dim), on the tasks with T
        numbers (the held-out ones)."""
        with torch.no_grad():
            return self.fold.test(self.generator(z), numbers)

    def test_trained(self) -> dict[str, list[float]]:
        """Test accuracy of the trained tasks with their own z, and with the z of the
        next task (wrong)."""
        return {
            "right_z": self.test_z(self.z, self.fold.trained),
            "wrong_z": self.test_z(self.z.roll(1, 0), self.fold.trained),
        }

    def test_unadapted(self) -> list[float]:
        """Test accuracy of the shared network on each held-out task."""
        weights = self.shared_weights().expand(len(self.fold.held_out), -1)
        return self.fold.test(self.fold.spec.split(weights))


@dataclass(frozen=True, eq=False)
class Adapted:
    """What one fitted arm reached: the weights of T networks, and their task vectors
    where the arm has any."""

    weights: Weights
    z: Tensor | None = None


def adapt(trained: Trained, arm: str, rate: float, data: TaskImages) -> Adapted:
    """Fit one arm to the tasks of `data` at one learning rate."""
    fold = trained.fold
    if arm in ("z_only", "random_generator"):
        generator = trained.generator
        if arm == "random_generator":
            generator = fold.new_generator(fold.seed + 1_000)
        start, fit = trained.mean_z(), fold.fit_at(rate)
        z, _ = fit_z(generator, fold.target, data, fit, start)
        with torch.no_grad():
            return Adapted(generator(z), z)
    if arm == "one_network":
        return Adapted(_one_network(fold, rate, len(data.tasks)))
    start = trained.shared_weights()
    if arm == "from_scratch":
        start = fold.ordinary_start(len(data.tasks))
    names = [tensor.name for tensor in fold.spec.tensors]
    only = fnmatch.filter(names, PARTS[arm]) if arm in PARTS else None
    fit = fold.fit_at(rate)
    flat, _ = fit_weights(fold.spec, fold.target, data, fit, start, only)
    return Adapted(fold.spec.split(flat))


def _one_network(fold: Fold, rate: float, tasks: int) -> Weights:
    """One network trained on all that the generator was trained on, given to each
    task."""
    fit = replace(fold.setup.training, rate=rate, seed=fold.seed)
    data, watch = fold.images_of(fold.training_tasks()), fold.data(fold.trained)
    start = fold.ordinary_start(1)[0]
    flat, _ = fit_shared(fold.spec, fold.target, data, fit, start, watch)
    return fold.spec.split(flat.expand(tasks, -1))


def _test_unfrozen(trained: Trained, numbers: list[int]) -> list[float]:
    """Test accuracy of the original's code as written: z and a copy of the whole
    generator fitted, task by task."""
    fold, rate = trained.fold, trained.fold.setup.training.rate
    fit, accuracies = replace(fold.fit_at(rate), z_rate=2 * rate), []
    for number in numbers:
        data, generator = fold.data([number]), copy.deepcopy(trained.generator)
        start = trained.mean_z()
        z, _ = fit_z(generator, fold.target, data, fit, start, freeze=False)
        with torch.no_grad():
            accuracies += rounded(accuracy(fold.target, generator(z), data))
    return accuracies


def measure_arm(
    trained: Trained,
    arm: str,
    report: Callable[[str], None] = print,
    rates: tuple[float, ...] | None = None,
    per_class: int | None = None,
) -> tuple[dict, Adapted]:
    """Adapt at each of the arm's learning rates; keep the one that is best on
    validation images.

    Args:
        rates: by default the set-up's for this arm.
        per_class: training images of each class; None for all.

    Returns:
        A dict for the record and what the best rate reached. The dict has its "rate"
        and mean "validation"; "test" and "validation_each", a value a held-out task;
        and what was "tried".
    """
    fold = trained.fold
    data = fold.data(fold.held_out, per_class)

    def trial(rate: float) -> tuple[float, tuple[Adapted, list[float]]]:
        adapted = adapt(trained, arm, rate, data)
        each = rounded(accuracy(fold.target, adapted.weights, data, "validation"))
        return round(fmean(each), 4), (adapted, each)

    chosen = best_rate(rates or fold.setup.rates[arm], trial)
    adapted, each = chosen.result
    test = fold.test(adapted.weights)  # met once, by the chosen rate
    report(f"{arm}: {fmean(test):.3f} at rate {chosen.rate:g}")
    best = next(row for row in chosen.tried if row["rate"] == chosen.rate)
    found = {"test": test, "validation_each": each, "tried": chosen.tried}
    return {**best, **found}, adapted


def run_experiment(
    setup: Setup,
    images: ImageSet,
    seed: int = 0,
    fold: int | None = None,
    checkpoint: Path | None = None,
    report: Callable[[str], None] = print,
) -> dict:
    """Train one generator, adapt to the held-out tasks by every arm, and return all
    that was measured.

    Args:
        fold: which tasks are held out; by default seed s holds out fold s.
        checkpoint: a safetensors file from which a killed training goes on.
        report: told each stage as it ends, in one line.

    Returns:
        A dict ready for JSON. `arms[arm]["test"]` has one accuracy a held-out task, in
        the order of `held_out`; `few[size][arm]` the same, fitted to `size` images a
        class.
    """
    began = time.perf_counter()
    trained = Fold.of(setup, images, seed, fold).train(checkpoint)
    earlier = trained.history.last("seconds") - (time.perf_counter() - began)
    began -= max(0.0, earlier)  # before an interruption
    known = trained.test_trained()
    seconds, accuracy_known = time.perf_counter() - began, fmean(known["right_z"])
    report(f"generator: {seconds:.0f} s, {accuracy_known:.3f} on trained tasks")
    before = fingerprint(trained.generator)
    arms, z = _measure_arms(trained, report)
    few = {str(count): _few_images(trained, count, report) for count in setup.sizes}
    after = fingerprint(trained.generator)
    frozen = {"sha256_before": before, "sha256_after": after}
    return {
        **_about(trained),
        "arms": arms,
        "few": few,
        "trained": known,
        "geometry": _geometry(trained, z),
        "generator": {**frozen, "seconds": round(seconds, 1)},
        "seconds": round(time.perf_counter() - began, 1),
        **provenance(images, images.device),
    }


def _about(trained: Trained) -> dict:
    """What a record says of the run itself."""
    fold, setup = trained.fold, trained.fold.setup
    size = sum(each.numel() for each in trained.generator.parameters())
    tasks = {"trained": len(fold.training_tasks()), "held_out": len(fold.held_out)}
    return {
        "setup": setup.name,
        "experiment": setup.experiment,
        "seed": fold.seed,
        "fold": fold.number,
        "settings": asdict(setup),
        "held_out": fold.held_out,
        "history": trained.history.rows,
        "parameters": {"target": fold.spec.size, "z": setup.z_dim, "generator": size},
        "tasks": tasks,
    }


def _measure_arms(
    trained: Trained, report: Callable[[str], None]
) -> tuple[dict[str, dict], Tensor]:
    """Every arm of the set-up on the held-out tasks, with all training images; and the
    vectors (T, z_dim) that z alone was fitted to."""
    setup, held_out = trained.fold.setup, trained.fold.held_out
    found = {arm: measure_arm(trained, arm, report) for arm in setup.rates}
    arms, z = {arm: record for arm, (record, _) in found.items()}, found["z_only"][1].z
    arms["no_adaptation"] = {"test": trained.test_unadapted()}
    if setup.unfrozen:
        unfrozen = _test_unfrozen(trained, held_out[: setup.unfrozen])
        arms["unfrozen"] = {"test": unfrozen}
        report(f"unfrozen: {fmean(unfrozen):.3f}")
    arms["other_z"] = {"test": trained.test_z(z.roll(1, 0))}
    return arms, z


def _few_images(
    trained: Trained, count: int, report: Callable[[str], None]
) -> dict[str, dict]:
    report(f"{count} images a class:")
    return {
        arm: measure_arm(trained, arm, report, rates, count)[0]
        for arm, rates in trained.fold.setup.few_rates.items()
    }


def _geometry(trained: Trained, fitted: Tensor) -> dict:
    """Where the task vectors lie, those of the held-out tasks (T, z_dim) among them."""
    fold, coarse = trained.fold, trained.fold.images.superclass_of
    groups = None
    if fold.setup.experiment == 1 and coarse is not None:
        groups = coarse[[fold.tasks.positive[number] for number in fold.trained]]
    vectors = Vectors(trained.z, fold.trained, fitted, fold.held_out, len(fold.tasks))
    reversed_pairs = fold.setup.experiment == 2
    return measure_geometry(vectors, trained.test_z, reversed_pairs, groups)
