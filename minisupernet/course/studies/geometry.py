"""The geometry of task vectors: who lies near whom, how many directions are used, and
what lies between two tasks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional as F

from minisupernet.course.records import rounded
from minisupernet.seeds import step_generator

__all__ = [
    "Vectors",
    "dimensions_used",
    "measure_geometry",
    "neighbours",
    "twins",
    "variances",
]

Test = Callable[[Tensor, list[int]], list[float]]
PERMUTATIONS = 10_000
FRACTIONS = 11


def neighbours(z: Tensor, groups: Tensor, seed: int = 0) -> dict[str, float]:
    """Whether vectors of one group lie near each other: a permutation test.

    Args:
        z: T vectors (T, z_dim); distances are cosines, after the mean is taken off.
        groups: whole numbers (T,), such as the superclass of each task's class.

    Returns:
        "share" of vectors whose nearest neighbour is of their group, the share
        "expected" when groups are dealt at random, and "p": how often, of 10,000 deals,
        the share is at least as large (one-sided).
    """
    unit = F.normalize(z.cpu() - z.cpu().mean(0), dim=1)
    nearest = (unit @ unit.T).fill_diagonal_(-2).argmax(1)  # (T,)
    groups, random = groups.cpu(), step_generator(seed, -1)
    order = torch.rand(PERMUTATIONS, len(groups), generator=random).argsort(1)
    dealt = groups[order]  # (permutations, T)
    shares = (dealt == dealt[:, nearest]).float().mean(1)
    share = (groups == groups[nearest]).float().mean()
    p = (1 + (shares >= share).sum().item()) / (1 + PERMUTATIONS)
    return {
        "share": round(share.item(), 4),
        "expected": round(shares.mean().item(), 4),
        "p": round(p, 4),
    }


def variances(z: Tensor) -> Tensor:
    """The share of the variance of T vectors along each principal direction, largest
    first, (min(T, z_dim),).
    """
    squares = torch.linalg.svdvals(z - z.mean(0)) ** 2
    return squares / squares.sum()


def dimensions_used(z: Tensor) -> float:
    """The participation ratio of the principal variances, between 1 (a line) and z_dim
    (a ball).
    """
    return (1 / variances(z).square().sum()).item()


def twins(z: Tensor, others: Tensor) -> float:
    """The mean cosine between T vectors and their reversed tasks': -1 where reversing
    mirrors z in the origin.
    """
    return round(F.cosine_similarity(z, others).mean().item(), 4)


@dataclass(frozen=True, eq=False)
class Vectors:
    """Task vectors of one generator and the numbers of their tasks: `z` (T, z_dim) of
    the `trained` tasks, `fitted` of the `held_out` ones, of `total` tasks in all."""

    z: Tensor
    trained: list[int]
    fitted: Tensor
    held_out: list[int]
    total: int

    def of(self, numbers: list[int]) -> Tensor:
        """The vectors of trained tasks with these numbers."""
        return self.z[[self.trained.index(number) for number in numbers]]


def line(
    vectors: Vectors, test: Test, start: list[int], end: list[int]
) -> dict[str, list[float]]:
    """Walk straight from the z of some trained tasks to that of others.

    Returns:
        Mean test accuracy at 11 equal steps, on the tasks where the walk starts and on
        those where it ends.
    """
    first, last = vectors.of(start), vectors.of(end)
    steps = torch.linspace(0, 1, FRACTIONS)
    walk = [first + (last - first) * fraction for fraction in steps.to(first.device)]
    return {
        name: [round(fmean(test(z, numbers)), 4) for z in walk]
        for name, numbers in (("start", start), ("end", end))
    }


def measure_geometry(
    vectors: Vectors, test: Test, reversed_pairs: bool, groups: Tensor | None = None
) -> dict:
    """All of the above for one trained generator.

    Args:
        test: task vectors and task numbers to test accuracies.
        reversed_pairs: whether the second half of the tasks is the first, reversed.
        groups: the superclass of each trained task's class, (T,), where there is one.
    """
    found = {
        "variances": rounded(variances(vectors.z)),
        "dimensions_used": round(dimensions_used(vectors.z), 2),
        "accuracy_in_few_directions": _in_few_directions(vectors, test),
        "length": {
            "trained": _length(vectors.z),
            "fitted": _length(vectors.fitted),
        },
    }
    if reversed_pairs:
        return found | _of_twins(vectors, test)
    trained = vectors.trained
    found["line"] = line(vectors, test, trained, trained[1:] + trained[:1])
    if groups is not None:
        found["neighbours"] = neighbours(vectors.z, groups)
    return found


def _of_twins(vectors: Vectors, test: Test) -> dict:
    """Where a reversed task's vector lies: its own, and that fitted to a new one."""
    trained, half = vectors.trained, vectors.total // 2
    both = [n for n in trained if n < half and n + half in trained]
    others = [number + half for number in both]
    own, other = vectors.of(both), vectors.of(others)
    centre = (own.mean(0) + other.mean(0)) / 2
    found = {"line": line(vectors, test, both, others)}
    found["twins"] = twins(own - centre, other - centre)
    known = [number - half for number in vectors.held_out]
    if set(known) <= set(trained):  # held-out reversed tasks, whose twins were trained
        theirs = vectors.of(known)
        found["fitted_twins"] = twins(vectors.fitted - centre, theirs - centre)
        found["mirrored_z"] = test(2 * centre - theirs, vectors.held_out)
    return found


def _in_few_directions(vectors: Vectors, test: Test) -> dict[str, float]:
    """Mean test accuracy of the trained tasks when z keeps only its first k principal
    directions."""
    mean = vectors.z.mean(0)
    away = vectors.z - mean
    _, _, directions = torch.linalg.svd(away, full_matrices=False)
    counts = [n for n in (0, 1, 2, 4, 8, 16, 32, 64) if n <= len(directions)]
    walk = {n: mean + away @ directions[:n].T @ directions[:n] for n in counts}
    return {str(n): round(fmean(test(walk[n], vectors.trained)), 4) for n in counts}


def _length(z: Tensor) -> float:
    return round(z.norm(dim=1).mean().item(), 4)
