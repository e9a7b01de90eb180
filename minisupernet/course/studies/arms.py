"""Experiments 1 and 2: train the generator on some tasks, freeze it, fit only z on the
others, against controls.

`run_experiment` trains one generator on one fold of tasks, as a `Setup` says, and
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
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from minisupernet.course.records import fingerprint, provenance, rounded
from minisupernet.course.studies.geometry import measure_geometry
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

__all__ = ["ADAPTED", "Bench", "best_rate", "run_experiment"]

ADAPTED = ("z_only", "random_generator", "from_scratch", "fine_tuned")
PARTS = {
    "last_layer": "output.*",
    "biases": "*.bias",
}  # the weights that these arms fit
Weights = dict[str, Tensor]


class Bench:
    """One generator and one fold of tasks: everything an arm needs, built from a setup,
    an image set and a seed.
    """

    def __init__(
        self, setup: Setup, images: ImageSet, seed: int = 0, fold: int | None = None
    ) -> None:
        self.setup, self.images, self.seed = setup, images, seed
        self.fold = seed % setup.folds if fold is None else fold
        self.target = TaskClassifier(
            channels=setup.channels, head_activation=not setup.faithful
        ).to(images.device)
        self.spec = WeightSpec.of(self.target)
        self.tasks = (experiment_1, experiment_2)[setup.experiment - 1](images.classes)
        self.trained, self.held_out = hold_out(
            setup.experiment, self.fold, setup.folds, images.classes, setup.pairs
        )
        self.generator, self.z = self.new_generator(seed), None
        self.fitted: dict[
            float, Tensor
        ] = {}  # what the arm `z_only` fitted last at each rate, (T, z_dim)

    def new_generator(self, seed: int) -> SuperNet:
        """A generator as the setup wants it, at its random start."""
        setup = self.setup
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if setup.faithful:
                generator = SuperNet.original(self.spec, setup.z_dim)
            else:
                generator = SuperNet(
                    self.spec, setup.z_dim, setup.hidden, setup.bound, setup.z_share
                )
        return generator.to(self.images.device)

    def images_of(self, tasks: BinaryTasks, per_class: int | None = None) -> TaskImages:
        """The images of any tasks, as this set-up shows them; of each class the first
        `per_class` to train on.
        """
        return TaskImages(
            self.images,
            tasks,
            per_class=per_class,
            raw=self.setup.raw,
            **self.setup.augmentation,
        )

    def data(self, numbers: list[int], per_class: int | None = None) -> TaskImages:
        """The images of the tasks with these numbers."""
        return self.images_of(self.tasks.select(numbers), per_class)

    def training_tasks(self) -> BinaryTasks:
        """What the generator is trained on: the trained tasks and, with `many_tasks`,
        every other pair of their classes that is not held out; the trained tasks are
        then repeated until they make up `own_share` of the list."""
        if not self.setup.many_tasks:
            return self.tasks.select(self.trained)
        trained, share = self.tasks.select(self.trained), self.setup.own_share
        others = all_pairs(trained, but=self.tasks.select(self.held_out))
        times = max(1, round(len(others) * share / (1 - share) / len(trained)))
        return self.tasks.select(self.trained * times) + others

    def train(self, checkpoint: Path | None = None) -> History:
        """Train the generator; returns the History and keeps the trained tasks' vectors
        as `z`.
        """
        fit, tasks = replace(self.setup.training, seed=self.seed), self.training_tasks()
        vectors = (
            ClassVectors(tasks, self.setup.z_dim, self.seed)
            if self.setup.many_tasks
            else None
        )
        z, history = train_generator(
            self.generator,
            self.target,
            self.images_of(tasks),
            fit,
            vectors,
            one_hot=self.setup.one_hot,
            watch=self.data(self.trained),
            checkpoint=checkpoint,
        )
        self.z = z[: len(self.trained)]
        if vectors is not None:  # those of the classes that were asked about
            known = sorted({*tasks.positive, *tasks.negative})
            self.class_vectors = vectors.u.detach()[known]  # (classes, z_dim)
        return history

    def mean_z(self) -> Tensor:
        """Where a new task's z starts: the mean of learned ones; for the original
        U(-0.244, 0.244).
        """
        if not self.setup.faithful:
            return self.z.mean(0)
        limit = (6 / (1 + self.setup.z_dim)) ** 0.5
        random = torch.rand(self.setup.z_dim, generator=step_generator(self.seed, -1))
        return ((random * 2 - 1) * limit).to(self.images.device)

    def shared_weights(self) -> Tensor:
        """The one network nobody adapted, (1, P): of the mean z, or of z = 0 for the
        original (its shared column).
        """
        z = self.mean_z() * (0.0 if self.setup.faithful else 1.0)
        with torch.no_grad():
            return self.generator.flat(z.unsqueeze(0))

    def no_adaptation(self) -> list[float]:
        """Test accuracy of the shared network on each held-out task."""
        return self.test(
            self.spec.split(self.shared_weights().expand(len(self.held_out), -1))
        )

    def test(self, weights: Weights) -> list[float]:
        """Test accuracy of one network for each held-out task."""
        return rounded(accuracy(self.target, weights, self.data(self.held_out)))

    def test_z(self, z: Tensor, numbers: list[int] | None = None) -> list[float]:
        """Test accuracy of the networks of task vectors (T, z_dim), on the held-out
        tasks or those with T numbers.
        """
        with torch.no_grad():
            return rounded(
                accuracy(
                    self.target, self.generator(z), self.data(numbers or self.held_out)
                )
            )

    def adapt(self, arm: str, rate: float, data: TaskImages) -> Weights:
        """The weights that one fitted arm reaches on `data`'s tasks at one learning
        rate.
        """
        if arm in ("z_only", "random_generator"):
            generator = (
                self.generator
                if arm == "z_only"
                else self.new_generator(self.seed + 1_000)
            )
            z = self.fit_z(generator, rate, data)
            if arm == "z_only":
                self.fitted[rate] = z
            with torch.no_grad():
                return generator(z)
        if arm == "one_network":
            return self._one_network(rate, len(data.tasks))
        start = (
            self._ordinary_start(len(data.tasks))
            if arm == "from_scratch"
            else self.shared_weights()
        )
        names = [tensor.name for tensor in self.spec.tensors]
        only = fnmatch.filter(names, PARTS[arm]) if arm in PARTS else None
        return self.spec.split(
            fit_weights(self.spec, self.target, data, self._fit(rate), start, only)[0]
        )

    def fit_z(self, generator: SuperNet, rate: float, data: TaskImages) -> Tensor:
        """The task vectors (T, z_dim) fitted to `data`'s tasks, the generator
        frozen.
        """
        return fit_z(generator, self.target, data, self._fit(rate), self.mean_z())[0]

    def _fit(self, rate: float) -> Fit:
        return replace(
            self.setup.adaptation, rate=rate, z_rate=rate, seed=self.seed + 500
        )

    def _one_network(self, rate: float, tasks: int) -> Weights:
        """One network trained on all that the generator was trained on, given to each
        task.
        """
        fit, data = (
            replace(self.setup.training, rate=rate, seed=self.seed),
            self.images_of(self.training_tasks()),
        )
        start, watch = self._ordinary_start(1)[0], self.data(self.trained)
        flat, _ = fit_shared(self.spec, self.target, data, fit, start, watch)
        return self.spec.split(flat.expand(tasks, -1))

    def _ordinary_start(self, tasks: int) -> Tensor:
        rule = "glorot" if self.setup.faithful else "torch"
        return self.spec.draw(
            tasks, step_generator(self.seed, -2, self.images.device), rule
        )

    def adapt_unfrozen(self, numbers: list[int]) -> list[float]:
        """Test accuracy of the original's code as written: z and a copy of the whole
        generator fitted, task by task.
        """
        rate = self.setup.training.rate
        fit = replace(self._fit(rate), z_rate=2 * rate)
        accuracies = []
        for number in numbers:
            data, generator = self.data([number]), copy.deepcopy(self.generator)
            z, _ = fit_z(generator, self.target, data, fit, self.mean_z(), freeze=False)
            with torch.no_grad():
                accuracies += rounded(accuracy(self.target, generator(z), data))
        return accuracies

    def measure_trained(self) -> dict[str, list[float]]:
        """Test accuracy of the trained tasks with their own z, and with the z of the
        next task (wrong).
        """
        return {
            "right_z": self.test_z(self.z, self.trained),
            "wrong_z": self.test_z(self.z.roll(1, 0), self.trained),
        }


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
    bench = Bench(setup, images, seed, fold)
    history = bench.train(checkpoint)
    began -= max(
        0.0, history.last("seconds") - (time.perf_counter() - began)
    )  # before an interruption
    trained = bench.measure_trained()
    seconds = time.perf_counter() - began
    report(
        f"generator: {seconds:.0f} s, test accuracy on trained tasks"
        f" {fmean(trained['right_z']):.3f}"
    )
    before, size = (
        fingerprint(bench.generator),
        sum(each.numel() for each in bench.generator.parameters()),
    )
    arms = _measure_arms(bench, report)
    fitted = bench.fitted[arms["z_only"]["rate"]]  # (T, z_dim)
    arms["other_z"] = {"test": bench.test_z(fitted.roll(1, 0))}
    few = {str(count): _few_images(bench, count, report) for count in setup.sizes}
    frozen = {
        "sha256_before": before,
        "sha256_after": fingerprint(bench.generator),
        "seconds": round(seconds, 1),
    }
    return {
        "setup": setup.name,
        "experiment": setup.experiment,
        "seed": seed,
        "fold": bench.fold,
        "settings": asdict(setup),
        "held_out": bench.held_out,
        "arms": arms,
        "few": few,
        "trained": trained,
        "geometry": measure_geometry(bench, fitted),
        "generator": frozen,
        "history": history.rows,
        "parameters": {"target": bench.spec.size, "z": setup.z_dim, "generator": size},
        "tasks": {
            "trained": len(bench.training_tasks()),
            "held_out": len(bench.held_out),
        },
        "seconds": round(time.perf_counter() - began, 1),
        **provenance(images, bench.generator.head_bias.device),
    }


def _measure_arms(
    bench: Bench, report: Callable[[str], None] = print
) -> dict[str, dict]:
    """Every arm of the set-up on the held-out tasks, with all training images."""
    arms = {arm: best_rate(bench, arm, report) for arm in bench.setup.rates}
    arms["no_adaptation"] = {"test": bench.no_adaptation()}
    if bench.setup.unfrozen:
        arms["unfrozen"] = {
            "test": bench.adapt_unfrozen(bench.held_out[: bench.setup.unfrozen])
        }
        report(f"unfrozen: {fmean(arms['unfrozen']['test']):.3f}")
    return arms


def _few_images(
    bench: Bench, count: int, report: Callable[[str], None]
) -> dict[str, dict]:
    report(f"{count} images a class:")
    return {
        arm: best_rate(bench, arm, report, rates, count)
        for arm, rates in bench.setup.few_rates.items()
    }


def best_rate(
    bench: Bench,
    arm: str,
    report: Callable[[str], None] = print,
    rates: tuple[float, ...] | None = None,
    per_class: int | None = None,
) -> dict:
    """Adapt at each of the arm's learning rates; keep the one that is best on
    validation images.

    Args:
        rates: by default the set-up's for this arm.
        per_class: training images of each class; None for all.

    Returns:
        Its "rate" and mean "validation"; "test" and "validation_each", a value a
        held-out task; and what was "tried".
    """
    data, tried, best = bench.data(bench.held_out, per_class), [], None
    for rate in rates or bench.setup.rates[arm]:
        weights = bench.adapt(arm, rate, data)
        each = rounded(accuracy(bench.target, weights, data, "validation"))
        tried.append({"rate": rate, "validation": round(fmean(each), 4)})
        if best is None or tried[-1]["validation"] > best["validation"]:
            best, best_weights, best_each = tried[-1], weights, each
    test = bench.test(best_weights)  # test images are met once, by the chosen rate
    report(f"{arm}: {fmean(test):.3f} at rate {best['rate']:g}")
    return {**best, "test": test, "validation_each": best_each, "tried": tried}
