"""Experiments 1 and 2: train the generator on some tasks, freeze it, fit only z on the others, against controls.

A `Setup` says how. `run_experiment` trains one generator on one fold and measures every arm on the held-out tasks,
with the same images, steps and batch order for each arm:

| arm | what is fitted on the new task | what it isolates |
|---|---|---|
| `z_only` | z; the trained generator frozen | the claim |
| `random_generator` | z; a generator never trained, frozen | is it just a random subspace? |
| `from_scratch` | all weights, from an ordinary start | ordinary training |
| `fine_tuned` | all weights, from what the generator makes of the mean z | transfer without z |
| `no_adaptation` | nothing: the generator's network for the mean z | one network for all |
| `unfrozen` | z and the generator, as the original's code does | the flaw |

On the trained tasks, `right_z` against `wrong_z` (another task's) says whether z carries the task.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from minisupernet.data import ImageSet
from minisupernet.results import fingerprint, provenance, rounded
from minisupernet.supernet import Fit, GeneratorError, SuperNet, accuracy, fit_weights, fit_z, train_generator
from minisupernet.target import TaskClassifier, WeightSpec
from minisupernet.tasks import TaskImages, experiment_1, experiment_2, hold_out
from minisupernet.training import History, step_generator

__all__ = ["ADAPTED", "Bench", "Setup", "best_rate", "better", "original", "run_experiment", "unseen_pairs"]

ADAPTED = ("z_only", "random_generator", "from_scratch", "fine_tuned")


@dataclass(frozen=True)
class Setup:
    """All settings of one experiment.

    `rates` lists, for each fitted arm, the learning rates to try; the one with the best mean validation accuracy over
    the held-out tasks counts. `unfrozen` is how many held-out tasks also run the original's unfrozen code.
    """

    name: str
    experiment: int
    training: Fit
    adaptation: Fit
    rates: dict[str, tuple[float, ...]]
    z_dim: int = 16
    hidden: tuple[int, ...] = (64,)
    faithful: bool = False  # the original's generator, classifier, start and raw pixels
    augmentation: dict[str, int] = field(default_factory=dict)
    unfrozen: int = 0
    pairs: bool = False  # experiment 2: hold out both orientations of a pair, not only the reversed one

    @property
    def folds(self) -> int:
        """Folds of held-out tasks: 9 of 11 tasks in experiment 1, 5 of 10 in experiment 2."""
        return {1: 9, 2: 5}[self.experiment]


def original(experiment: int, profile: str = "full") -> Setup:
    """The original's set-up: one-hot z, bare tanh heads, raw pixels, TensorFlow's RMSProp at 1e-4, one task a step.

    Full: 50,000 steps of 20 images, then 1,000 steps on each new task. Its new z is the sum of two equal vectors, which
    RMSProp moves by the same step each: one vector at twice the rate.
    """
    _check_profile(profile)
    full = profile == "full"
    training = Fit(
        50_000 if full else 2_000, 1e-4, images=20, tasks=1, optimizer="tensorflow-rmsprop", cycle=False, every=5_000
    )
    adaptation = replace(training, steps=1_000 if full else 200, tasks=None, every=1_000)
    rates = {"z_only": (2e-4,), "random_generator": (2e-4,), "from_scratch": (1e-4,), "fine_tuned": (1e-4,)}
    unfrozen = 4 if full else 0
    return Setup("original", experiment, training, adaptation, rates, 100, (), faithful=True, unfrozen=unfrozen)


def better(experiment: int, profile: str = "full") -> Setup:
    """A better generator: 16 learned numbers a task, one hidden layer, ordinary starting scale, normalised images."""
    _check_profile(profile)
    if profile == "quick":
        training, adaptation = Fit(240, 2e-3, tasks=24, images=16, every=60), Fit(80, images=16, every=1_000)
        rates = {"z_only": (1e-1,), "random_generator": (1e-1,), "from_scratch": (3e-3,), "fine_tuned": (1e-3,)}
        return Setup("better", experiment, training, adaptation, rates)  # no augmentation: too short to overfit
    rates = {
        "z_only": (3e-2, 1e-1, 3e-1), "random_generator": (3e-2, 1e-1, 3e-1),
        "from_scratch": (3e-4, 1e-3, 3e-3), "fine_tuned": (1e-4, 3e-4, 1e-3),
    }  # fmt: skip
    augmentation = {"flip": 1, "crop": 4, "cutout": 10 if experiment == 1 else 0}
    adaptation = Fit(300, every=1_000)
    return Setup("better", experiment, Fit(700, 1e-3, tasks=40), adaptation, rates, augmentation=augmentation)


def unseen_pairs(experiment: int = 2, profile: str = "full") -> Setup:
    """Experiment 2 by the better generator, on pairs of classes that it met in neither orientation."""
    if experiment != 2:
        raise GeneratorError("only experiment 2 has pairs; use 'better' for experiment 1.")
    return replace(better(2, profile), name="unseen_pairs", pairs=True)


def _check_profile(profile: str) -> None:
    if profile not in ("quick", "full"):
        raise GeneratorError(f"there is no profile '{profile}'; use 'quick' or 'full'.")


class Bench:
    """One generator and one fold of tasks: everything an arm needs, built from a setup, an image set and a seed."""

    def __init__(self, setup: Setup, images: ImageSet, seed: int = 0, fold: int | None = None) -> None:
        self.setup, self.images, self.seed = setup, images, seed
        self.fold = seed % setup.folds if fold is None else fold
        self.target = TaskClassifier(head_activation=not setup.faithful).to(images.device)
        self.spec = WeightSpec.of(self.target)
        self.tasks = (experiment_1, experiment_2)[setup.experiment - 1](images.classes)
        self.trained, self.held_out = hold_out(setup.experiment, self.fold, setup.folds, images.classes, setup.pairs)
        self.generator, self.z = self.new_generator(seed), None

    def new_generator(self, seed: int) -> SuperNet:
        """A generator as the setup wants it, at its random start."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if self.setup.faithful:
                generator = SuperNet.original(self.spec, self.setup.z_dim)
            else:
                generator = SuperNet(self.spec, self.setup.z_dim, self.setup.hidden)
        return generator.to(self.images.device)

    def data(self, numbers: list[int]) -> TaskImages:
        """The images of the tasks with these numbers."""
        return TaskImages(self.images, self.tasks.select(numbers), raw=self.setup.faithful, **self.setup.augmentation)

    def train(self, checkpoint: Path | None = None) -> History:
        """Train the generator on the trained tasks; returns the History and keeps the task vectors as `z`."""
        fit = replace(self.setup.training, seed=self.seed)
        self.z, history = train_generator(
            self.generator, self.target, self.data(self.trained), fit,
            one_hot=self.setup.faithful, checkpoint=checkpoint,
        )  # fmt: skip
        return history

    def mean_z(self) -> Tensor:
        """Where a new task's z starts: the mean of learned ones; for the original U(-0.244, 0.244)."""
        if not self.setup.faithful:
            return self.z.mean(0)
        limit = (6 / (1 + self.setup.z_dim)) ** 0.5
        random = step_generator(self.seed, -1)
        return ((torch.rand(self.setup.z_dim, generator=random) * 2 - 1) * limit).to(self.images.device)

    def shared_weights(self) -> Tensor:
        """The one network nobody adapted, (1, P): of the mean z, or of z = 0 for the original (its shared column)."""
        z = self.mean_z() * (0.0 if self.setup.faithful else 1.0)
        with torch.no_grad():
            return self.generator.flat(z.unsqueeze(0))

    def no_adaptation(self) -> list[float]:
        """Test accuracy of the shared network on each held-out task."""
        weights = self.spec.split(self.shared_weights().expand(len(self.held_out), -1))
        return rounded(accuracy(self.target, weights, self.data(self.held_out)))

    def adapt(self, arm: str, rate: float, data: TaskImages) -> dict[str, Tensor]:
        """The weights that one fitted arm reaches on `data`'s tasks at one learning rate."""
        fit = replace(self.setup.adaptation, rate=rate, z_rate=rate, seed=self.seed + 500)
        if arm in ("z_only", "random_generator"):
            generator = self.generator if arm == "z_only" else self.new_generator(self.seed + 1_000)
            z, _ = fit_z(generator, self.target, data, fit, self.mean_z())
            with torch.no_grad():
                return generator(z)
        start = self.shared_weights() if arm == "fine_tuned" else self._ordinary_start(len(data.tasks))
        return self.spec.split(fit_weights(self.spec, self.target, data, fit, start)[0])

    def _ordinary_start(self, tasks: int) -> Tensor:
        rule = "glorot" if self.setup.faithful else "torch"
        return self.spec.draw(tasks, step_generator(self.seed, -2, self.images.device), rule)

    def adapt_unfrozen(self, numbers: list[int]) -> list[float]:
        """Test accuracy of the original's code as written: z and a copy of the whole generator fitted, task by task."""
        rate = self.setup.training.rate
        fit = replace(self.setup.adaptation, rate=rate, z_rate=2 * rate, seed=self.seed + 500)
        accuracies = []
        for number in numbers:
            data, generator = self.data([number]), copy.deepcopy(self.generator)
            z, _ = fit_z(generator, self.target, data, fit, self.mean_z(), freeze=False)
            with torch.no_grad():
                accuracies += rounded(accuracy(self.target, generator(z), data))
        return accuracies

    def measure_trained(self) -> dict[str, list[float]]:
        """Test accuracy of the trained tasks with their own z, and with the z of the next task (wrong)."""
        data = self.data(self.trained)
        with torch.no_grad():
            right, wrong = self.generator(self.z), self.generator(self.z.roll(1, 0))
        return {
            "right_z": rounded(accuracy(self.target, right, data)),
            "wrong_z": rounded(accuracy(self.target, wrong, data)),
        }


def run_experiment(
    setup: Setup, images: ImageSet, seed: int = 0, fold: int | None = None, checkpoint: Path | None = None,
    report: Callable[[str], None] = print,
) -> dict:  # fmt: skip
    """Train one generator, adapt to the held-out tasks by every arm, and return all that was measured.

    Args:
        fold: which tasks are held out; by default seed s holds out fold s.
        checkpoint: a safetensors file from which a killed training goes on.
        report: told each stage as it ends, in one line.

    Returns:
        A dict ready for JSON. `arms[arm]["test"]` has one accuracy a held-out task, in the order of `held_out`.
    """
    began = time.perf_counter()
    bench = Bench(setup, images, seed, fold)
    history = bench.train(checkpoint)
    trained = bench.measure_trained()
    seconds = time.perf_counter() - began
    report(f"generator: {seconds:.0f} s, test accuracy on trained tasks {fmean(trained['right_z']):.3f}")
    before, size = fingerprint(bench.generator), sum(each.numel() for each in bench.generator.parameters())
    arms = {arm: best_rate(bench, arm, report) for arm in ADAPTED}
    frozen_proof = {"sha256_before": before, "sha256_after": fingerprint(bench.generator)}
    arms["no_adaptation"] = {"test": bench.no_adaptation()}
    if setup.unfrozen:
        arms["unfrozen"] = {"test": bench.adapt_unfrozen(bench.held_out[: setup.unfrozen])}
        report(f"unfrozen: {fmean(arms['unfrozen']['test']):.3f}")
    return {
        "setup": setup.name,
        "experiment": setup.experiment,
        "seed": seed,
        "fold": bench.fold,
        "settings": asdict(setup),
        "held_out": bench.held_out,
        "arms": arms,
        "trained": trained,
        "generator": frozen_proof,
        "history": history.rows,
        "parameters": {"target": bench.spec.size, "z": setup.z_dim, "generator": size},
        "seconds": round(time.perf_counter() - began, 1),
        **provenance(images, bench.generator.head_bias.device),
    }


def best_rate(bench: Bench, arm: str, report: Callable[[str], None] = print) -> dict:
    """Adapt at each of the arm's learning rates; keep the one that is best on validation images.

    Returns:
        Its "rate", "validation" accuracy and "test" accuracies, one a held-out task; and what was "tried".
    """
    data, tried, best = bench.data(bench.held_out), [], None
    for rate in bench.setup.rates[arm]:
        weights = bench.adapt(arm, rate, data)
        validation = round(accuracy(bench.target, weights, data, "validation").mean().item(), 4)
        tried.append({"rate": rate, "validation": validation})
        if best is None or validation > best["validation"]:
            best, best_weights = tried[-1], weights
    test = rounded(accuracy(bench.target, best_weights, data))  # test images are met once, by the chosen rate
    report(f"{arm}: {fmean(test):.3f} at rate {best['rate']:g}")
    return {**best, "test": test, "tried": tried}
