"""The opponents of a task vector: one ordinary network for all classes, and a head.

That one network cannot answer a question and its reverse is true of a classifier, and
false of a network of features with a small head for each task. A unit is one group of
arms on one fold:

* `heads`: a trunk, the target's own body, is trained to tell all trained classes apart,
  with the images and steps that the generator had. On its 100 features: `head`, a
  logistic regression; `head_32`, one on their 32 principal directions, so as many
  numbers as z; `nearest_mean`, the cosine to class means.
* `from_trunk`: the same trunk and `head`, from which are fitted `biases`, `lora` (each
  weight matrix plus a product of two vectors) and `trunk_fine_tuned` (all weights).
* `prototypes`: a trunk trained by episodes (Snell and others, 2017) and, on it, the
  nearest class mean.
* `prior`: the generator, and z fitted from the mean of the trained ones, `z_only`, or
  with a prior, `z_prior`: z = L e with L L' twice the covariance of the class vectors,
  and |e|^2 / 2 added to the summed loss.
"""

import copy
import fnmatch
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minisupernet.course.records import fingerprint, rounded
from minisupernet.course.studies.arms import Fold, Trained
from minisupernet.course.studies.rates import best_rate
from minisupernet.course.studies.setups import many_tasks, unseen_pairs
from minisupernet.data import ImageSet, augment, normalise
from minisupernet.data.tasks import TaskImages
from minisupernet.errors import StudyError
from minisupernet.fitting import Fit, accuracy, fit_alone, fit_weights
from minisupernet.seeds import step_generator
from minisupernet.target import TaskClassifier
from minisupernet.training import History, frozen, one_cycle, train

__all__ = ["GROUPS", "Logistic", "Settings", "fit_logistic", "measure"]

Weights = dict[str, Tensor]
Report = Callable[[str], None]
RANK = 32  # principal directions of `head_32`: as many numbers as z has


@dataclass(frozen=True)
class Settings:
    """How much is done.

    `sizes` are training images of a class, None for all but the validation images;
    `fitted_sizes` those of the arms that take gradient steps. Every choice starts from
    three candidates and tries `most` at the most.
    """

    sizes: tuple[int | None, ...] = (5, 10, 20, 50, 100, None)
    fitted_sizes: tuple[int | None, ...] = (5, 20, None)
    steps: int = 2_000
    images: int = 800
    trial_steps: int = 200
    trunk_rates: tuple[float, ...] = (1e-3, 3e-3, 9e-3)
    strengths: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    most: int = 6


FULL = Settings()
QUICK = Settings(
    (5, None), (5,), 20, 100, 5, (1e-3, 3e-3, 9e-3), (1e-3, 1e-2, 1e-1), most=3
)


@dataclass(frozen=True)
class Logistic:
    """One logistic regression a task: weights (T, D) and biases (T,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Features (T, n, D) to logits (T, n)."""
        return torch.einsum("tnd,td->tn", features, self.weight) + self.bias[:, None]


def fit_logistic(features: Tensor, labels: Tensor, strength: float) -> Logistic:
    """The logistic regressions of T tasks, each the minimum of its mean loss plus
    strength / 2 |weight|^2.

    Args:
        features: (T, n, D); `labels` (T, n), 0 or 1.
    """
    tasks, _, size = features.shape
    features, labels = features.double(), labels.double()
    weight = torch.zeros(tasks, size, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(tasks, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=300, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        solver.zero_grad()
        logits = Logistic(weight, bias)(features)
        each = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        total = each.mean(1).sum() + strength / 2 * weight.square().sum()
        total.backward()
        return total

    solver.step(loss)
    return Logistic(weight.detach(), bias.detach())


class Trunk:
    """A trained body of the target and its 100 features, standardised by the trained
    classes' own."""

    def __init__(self, network: nn.Module, images: ImageSet, classes: list[int]):
        self.network, self.images = network, images
        self.body = copy.deepcopy(network)
        self.body.output = nn.Identity()
        known = torch.isin(images.train_labels, torch.tensor(classes))
        raw = self._raw(images.train_images[known])
        self.mean, self.std = raw.mean(0), raw.std(0) + 1e-6
        centred = (raw - self.mean) / self.std
        self.directions = torch.linalg.svd(centred, full_matrices=False)[2]  # (D, D)

    @torch.no_grad()
    def _raw(self, pixels: Tensor) -> Tensor:
        """Features (N, D) of images (N, 3, 32, 32) uint8."""
        prepared = (
            normalise(part, self.images.mean, self.images.std)
            for part in pixels.split(500)
        )
        return torch.cat([self.body(part) for part in prepared])

    def features(self, pixels: Tensor) -> Tensor:
        """Standardised features of images and of their mirror images, (2, N, D)."""
        both = torch.stack([self._raw(pixels), self._raw(pixels.flip(-1))])
        return (both - self.mean) / self.std


@dataclass(frozen=True)
class TaskFeatures:
    """Features of each task's images, (2, T, n, D) by mirror, and labels (T, n)."""

    train: Tensor
    train_labels: Tensor
    validation: Tensor
    validation_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @classmethod
    def of(cls, trunk: Trunk, data: TaskImages) -> "TaskFeatures":
        """Those of the tasks of `data`, its classes being of equal size."""
        parts: list[Tensor] = []
        for name in ("train", "validation", "test"):
            split = data.splits[name]
            source = trunk.images
            pixels = source.test_images if name == "test" else source.train_images
            members = split.members[data.classes]  # (T, 2, n)
            used, place = members.unique(return_inverse=True)
            found = trunk.features(pixels[used])[:, place].flatten(2, 3)
            each = torch.arange(2).repeat_interleave(members.shape[2])
            parts += [found, each.expand(len(members), -1)]
        return cls(*parts)

    def along(self, directions: Tensor) -> "TaskFeatures":
        """The same in fewer numbers: coordinates along `directions` (k, D)."""
        shorter = {
            name: getattr(self, name) @ directions.T
            for name in ("train", "validation", "test")
        }
        return replace(self, **shorter)

    def right(self, classify: Callable[[Tensor], Tensor], name: str) -> list[float]:
        """Accuracy of each task on "validation" or "test": logits are means over an
        image and its mirror."""
        features, labels = getattr(self, name), getattr(self, f"{name}_labels")
        logits = (classify(features[0].double()) + classify(features[1].double())) / 2
        return rounded(((logits > 0) == (labels > 0)).double().mean(1))


def measure(
    images: ImageSet,
    seed: int,
    profile: str,
    report: Report,
    checkpoint: Path | None,
    of_experiment: int,
    fold: int,
    group: str,
) -> dict:
    """One group of arms on the held-out tasks of one fold; a dict ready for JSON.

    Args:
        of_experiment: 1, or 2 for pairs of classes that no question was about.
        group: a key of `GROUPS`.

    Raises:
        StudyError: for a group that does not exist.
    """
    if group not in GROUPS:
        raise StudyError(f"there is no group '{group}'; choose of {', '.join(GROUPS)}.")
    first = of_experiment == 1
    setup = many_tasks(1, profile) if first else unseen_pairs(of_experiment, profile)
    held = Fold.of(setup, images, seed, fold)
    settings = QUICK if profile == "quick" else FULL
    half = len(held.tasks) // 2
    numbers = [number for number in held.held_out if first or number < half]
    found = GROUPS[group](held, numbers, settings, report, checkpoint)
    return {
        "of_experiment": of_experiment,
        "fold": fold,
        "group": group,
        "settings": asdict(settings),
        "held_out": numbers,
        **found,
    }


def _heads(
    fold: Fold, numbers: list[int], settings: Settings, report: Report, path: Path
) -> dict:
    trunk, about = _train_trunk(fold, settings, report, path)
    few = {}
    for size in settings.sizes:
        features = TaskFeatures.of(trunk, fold.data(numbers, size))
        few[_name(size)] = {
            "head": _head(features, settings)[1],
            "head_32": _head(features.along(trunk.directions[:RANK]), settings)[1],
            "nearest_mean": _nearest_mean(features),
        }
        _tell(report, size, few[_name(size)])
    return {"trunk": about, "few": few}


def _head(features: TaskFeatures, settings: Settings) -> tuple[Logistic, dict]:
    """The logistic regression of the strength that is best on validation images."""
    both = features.train.transpose(0, 1).flatten(1, 2)  # (T, 2 n, D)
    labels = features.train_labels.repeat(1, 2)

    def trial(strength: float) -> tuple[float, Logistic]:
        head = fit_logistic(both, labels, strength)
        return round(fmean(features.right(head, "validation")), 4), head

    chosen = best_rate(settings.strengths, trial, settings.most)
    test = features.right(chosen.result, "test")
    return chosen.result, {"rate": chosen.rate, "test": test, "tried": chosen.tried}


def _nearest_mean(features: TaskFeatures) -> dict:
    """The nearer of two class means by cosine."""
    both = features.train.transpose(0, 1).flatten(1, 2).double()  # (T, 2 n, D)
    labels = features.train_labels.repeat(1, 2).bool()
    means = [
        F.normalize(both[t][labels[t] == which].mean(0), dim=0)
        for t in range(len(both))
        for which in (False, True)
    ]
    negative, positive = torch.stack(means).view(len(both), 2, -1).unbind(1)

    def classify(each: Tensor) -> Tensor:
        unit = F.normalize(each, dim=2)
        return torch.einsum("tnd,td->tn", unit, positive - negative)

    return {"test": features.right(classify, "test")}


def _from_trunk(
    fold: Fold, numbers: list[int], settings: Settings, report: Report, path: Path
) -> dict:
    trunk, about = _train_trunk(fold, settings, report, path)
    few = {}
    for size in settings.fitted_sizes:
        data = fold.data(numbers, size)
        start = _whole_network(trunk, fold, data, settings)
        fits = {
            "biases": lambda fit, start=start, data=data: _fit_part(
                fold, data, fit, start, "*.bias"
            ),
            "lora": lambda fit, start=start, data=data: _fit_lora(
                fold, data, fit, start
            ),
            "trunk_fine_tuned": lambda fit, start=start, data=data: _fit_part(
                fold, data, fit, start, "*"
            ),
        }
        rates = {"biases": 1e-3, "lora": 1e-3, "trunk_fine_tuned": 1e-4}
        few[_name(size)] = {
            arm: _fitted(fold, data, rates[arm], settings, fits[arm]) for arm in fits
        }
        _tell(report, size, few[_name(size)])
    return {"trunk": about, "few": few}


def _whole_network(
    trunk: Trunk, fold: Fold, data: TaskImages, settings: Settings
) -> Tensor:
    """Trunk and logistic head as weights of the target, (T, P)."""
    head, _ = _head(TaskFeatures.of(trunk, data), settings)
    weight = head.weight / trunk.std  # of the features as they come
    bias = head.bias - (weight * trunk.mean).sum(1)
    tasks = len(data.tasks)
    weights = {
        name: own.detach().expand(tasks, *own.shape)
        for name, own in trunk.network.named_parameters()
    }
    weights |= {"output.weight": weight.float()[:, None], "output.bias": bias.float()}
    weights["output.bias"] = weights["output.bias"][:, None]
    return fold.spec.join(weights)


def _fit_part(
    fold: Fold, data: TaskImages, fit: Fit, start: Tensor, pattern: str
) -> Weights:
    names = [tensor.name for tensor in fold.spec.tensors]
    only = fnmatch.filter(names, pattern)
    flat, _ = fit_weights(fold.spec, fold.target, data, fit, start, only)
    return fold.spec.split(flat)


def _fit_lora(fold: Fold, data: TaskImages, fit: Fit, start: Tensor) -> Weights:
    """Each weight matrix, or kernel laid out as one, plus a b' (Hu and others, 2021):
    a starts at 0 and b at random."""
    fixed, tasks = fold.spec.split(start), len(start)
    random, factors = step_generator(fit.seed, -3), nn.ParameterDict()
    matrices = {n: w.flatten(2) for n, w in fixed.items() if w.ndim > 2}  # (T, out, in)
    for name, matrix in matrices.items():
        draw = torch.randn(tasks, matrix.shape[2], generator=random)
        factors[f"{name}:a".replace(".", "/")] = nn.Parameter(
            torch.zeros(tasks, matrix.shape[1])
        )
        factors[f"{name}:b".replace(".", "/")] = nn.Parameter(
            draw / math.sqrt(matrix.shape[2])
        )

    def weights() -> Weights:
        moved = {}
        for name in matrices:
            key = name.replace(".", "/")
            product = factors[f"{key}:a"][:, :, None] * factors[f"{key}:b"][:, None]
            moved[name] = fixed[name] + product.view_as(fixed[name])
        return {**fixed, **moved}

    fit_alone(factors, weights, list(factors.values()), [], fold.target, data, fit)
    return {name: own.detach() for name, own in weights().items()}


def _prototypes(
    fold: Fold, numbers: list[int], settings: Settings, report: Report, path: Path
) -> dict:
    trunk, about = _train_trunk(fold, settings, report, path, episodes=True)
    few = {}
    for size in settings.sizes:
        features = TaskFeatures.of(trunk, fold.data(numbers, size))
        few[_name(size)] = {"protonet": _nearest_mean(features)}
        _tell(report, size, few[_name(size)])
    return {"trunk": about, "few": few}


def _prior(
    fold: Fold, numbers: list[int], settings: Settings, report: Report, path: Path
) -> dict:
    trained, few = fold.train(path), {}
    before = fingerprint(trained.generator)
    covariance = torch.cov(trained.u.T)  # (z_dim, z_dim)
    values, directions = torch.linalg.eigh(2 * covariance)
    root = directions * values.clamp(min=0).sqrt()  # L, with L L' = 2 S
    for size in settings.fitted_sizes:
        data = fold.data(numbers, size)
        images = (size or int(data.splits["train"].counts.max())) * 2
        fits = {
            "z_only": lambda fit, data=data: _fit_e(
                trained, data, fit, None, trained.mean_z(), 0
            ),
            "z_prior": lambda fit, data=data, images=images: _fit_e(
                trained, data, fit, root, None, images
            ),
        }
        rates = {"z_only": 3e-3, "z_prior": 3e-2}
        few[_name(size)] = {
            arm: _fitted(fold, data, rates[arm], settings, fits[arm]) for arm in fits
        }
        _tell(report, size, few[_name(size)])
    frozen = {"sha256_before": before, "sha256_after": fingerprint(trained.generator)}
    return {
        "generator": frozen,
        "history": trained.history.rows,
        "prior": rounded(values.flip(0)),
        "few": few,
    }


def _fit_e(
    trained: Trained,
    data: TaskImages,
    fit: Fit,
    root: Tensor | None,
    start: Tensor | None,
    images: int,
) -> Weights:
    """Fit z itself, or with a `root` L the e of z = L e under the prior."""
    fold, generator = trained.fold, trained.generator
    first = torch.zeros(fold.setup.z_dim) if start is None else start
    e = nn.Parameter(first.expand(len(data.tasks), -1).clone())

    def weights() -> Weights:
        return generator(e if root is None else e @ root.T)

    def prior() -> Tensor:
        return e.square().sum() / (2 * images) if images else e.new_zeros(())

    state = nn.ParameterDict({"e": e})
    with frozen(generator):
        fit_alone(state, weights, [], [e], fold.target, data, fit, penalty=prior)
    with torch.no_grad():
        return weights()


def _fitted(
    fold: Fold,
    data: TaskImages,
    rate: float,
    settings: Settings,
    fit_at: Callable[[Fit], Weights],
) -> dict:
    """An arm at the best of its rates, a factor 3 apart and the first one `rate`."""

    def trial(rate: float) -> tuple[float, Weights]:
        fit = replace(fold.setup.adaptation, rate=rate, z_rate=rate)
        weights = fit_at(replace(fit, seed=fold.seed + 500))
        each = rounded(accuracy(fold.target, weights, data, "validation"))
        return round(fmean(each), 4), weights

    rates = (rate, 3 * rate, 9 * rate)
    chosen = best_rate(rates, trial, settings.most)
    test = rounded(accuracy(fold.target, chosen.result, data, "test"))
    return {"rate": chosen.rate, "test": test, "tried": chosen.tried}


def _train_trunk(
    fold: Fold,
    settings: Settings,
    report: Report,
    path: Path | None,
    episodes: bool = False,
) -> tuple[Trunk, dict]:
    """The trunk at the rate that a short run found best, and what its training took."""
    asked = fold.training_tasks()
    classes = sorted({*asked.positive, *asked.negative})
    data = fold.images_of(asked)

    def run(rate: float, steps: int, path: Path | None) -> tuple[nn.Module, History]:
        return _run_trunk(fold, data, classes, rate, steps, settings, episodes, path)

    def trial(rate: float) -> tuple[float, None]:
        _, history = run(rate, settings.trial_steps, None)
        return round(history.last("validation_accuracy"), 4), None

    chosen = best_rate(settings.trunk_rates, trial, settings.most)
    network, history = run(chosen.rate, settings.steps, path)
    about = {"rate": chosen.rate, "tried": chosen.tried, "classes": len(classes)}
    about |= {"history": history.rows, "sha256": fingerprint(network)}
    report(f"trunk: {history.rows[-1]}")
    return Trunk(network, fold.images, classes), about


def _run_trunk(
    fold: Fold,
    data: TaskImages,
    classes: list[int],
    rate: float,
    steps: int,
    settings: Settings,
    episodes: bool,
    path: Path | None,
) -> tuple[nn.Module, History]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fold.seed)
        network = TaskClassifier(fold.setup.channels)
        outputs = nn.Identity() if episodes else nn.Linear(100, len(classes))
        network.output = outputs
    held_back = _held_back(data, classes)

    def loss_at(step: int) -> Tensor:
        if episodes:
            return _episode_loss(network, fold, data, classes, step, settings)
        pixels, labels = _draw(fold, data, classes, step, settings.images)
        return F.cross_entropy(network(pixels), labels)

    def look() -> dict[str, float]:
        return {"validation_accuracy": _look(network, fold, *held_back, episodes)}

    optimizer = torch.optim.AdamW(
        network.parameters(), lr=rate, weight_decay=fold.setup.training.decay
    )
    history = train(
        network,
        optimizer,
        loss_at,
        steps,
        schedule=one_cycle,
        evaluate=look,
        every=max(steps // 4, 1),
        checkpoint=path,
    )
    return network.eval(), history


def _draw(
    fold: Fold, data: TaskImages, classes: list[int], step: int, count: int
) -> tuple[Tensor, Tensor]:
    """Training images (count, 3, 32, 32) float of random classes, and places."""
    random = step_generator(fold.seed, step)
    labels = torch.randint(len(classes), (count,), generator=random)
    return _pictures(data, classes, labels, random), labels


def _pictures(
    data: TaskImages, classes: list[int], labels: Tensor, random: torch.Generator
) -> Tensor:
    split, images = data.splits["train"], data.images
    chosen = torch.tensor(classes)[labels]
    place = torch.rand(labels.shape, generator=random) * split.counts[chosen]
    pixels = images.train_images[split.members[chosen, place.long()]]
    pixels = augment(pixels, random, **data.augmentation)
    return normalise(pixels, images.mean, images.std)


def _episode_loss(
    network: nn.Module,
    fold: Fold,
    data: TaskImages,
    classes: list[int],
    step: int,
    settings: Settings,
) -> Tensor:
    """Episodes of 10 classes, 5 support and 5 query images each; minus the squared
    distances from class means are the logits."""
    random, way = step_generator(fold.seed, step), min(10, len(classes))
    losses = []
    for _ in range(max(settings.images // (way * 10), 1)):
        labels = torch.randperm(len(classes), generator=random)[:way]
        pixels = _pictures(data, classes, labels.repeat_interleave(10), random)
        support, query = network(pixels).view(way, 2, 5, -1).unbind(1)  # (way, 5, D)
        distances = torch.cdist(query.flatten(0, 1), support.mean(1)).square()
        own = torch.arange(way).repeat_interleave(5)
        losses.append(F.cross_entropy(-distances, own))
    return torch.stack(losses).mean()


def _held_back(data: TaskImages, classes: list[int]) -> tuple[Tensor, Tensor]:
    """Validation images (N, 3, 32, 32) uint8 of trained classes, and places (N,)."""
    split = data.splits["validation"]
    members = split.members[torch.tensor(classes)]  # (classes, n)
    labels = torch.arange(len(classes)).repeat_interleave(members.shape[1])
    return data.images.train_images[members.flatten()], labels


@torch.no_grad()
def _look(
    network: nn.Module, fold: Fold, pixels: Tensor, labels: Tensor, episodes: bool
) -> float:
    """Validation accuracy; after episodes by the nearest mean of half of the images."""
    images = fold.images
    parts = (normalise(part, images.mean, images.std) for part in pixels.split(500))
    outputs = torch.cat([network(part) for part in parts])
    if not episodes:
        return (outputs.argmax(1) == labels).float().mean().item()
    grouped = outputs.view(int(labels.max()) + 1, -1, outputs.shape[1])
    half = grouped.shape[1] // 2
    distances = torch.cdist(grouped[:, half:].flatten(0, 1), grouped[:, :half].mean(1))
    own = torch.arange(len(grouped)).repeat_interleave(grouped.shape[1] - half)
    return (distances.argmin(1) == own).float().mean().item()


def _name(size: int | None) -> str:
    return "all" if size is None else str(size)


def _tell(report: Report, size: int | None, arms: dict[str, dict]) -> None:
    said = ", ".join(f"{arm} {fmean(each['test']):.3f}" for arm, each in arms.items())
    report(f"{_name(size)} images a class: {said}")


GROUPS = {
    "heads": _heads,
    "from_trunk": _from_trunk,
    "prototypes": _prototypes,
    "prior": _prior,
}
