"""The geometry of task vectors: who lies near whom, how many directions are used, and
what lies between two tasks.
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from minisupernet.seeds import step_generator

if TYPE_CHECKING:
    from minisupernet.course.studies import arms as experiments

__all__ = ["dimensions_used", "measure_geometry", "neighbours", "twins", "variances"]

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


def line(
    bench: experiments.Bench, start: list[int], end: list[int]
) -> dict[str, list[float]]:
    """Walk straight from the z of some trained tasks to that of others.

    Returns:
        Mean test accuracy at 11 equal steps, on the tasks where the walk starts and on
        those where it ends.
    """
    first, last = (
        bench.z[[bench.trained.index(number) for number in side]]
        for side in (start, end)
    )
    steps = torch.linspace(0, 1, FRACTIONS)
    walk = [first + (last - first) * fraction for fraction in steps.to(first.device)]
    return {
        name: [round(fmean(bench.test_z(z, numbers)), 4) for z in walk]
        for name, numbers in (("start", start), ("end", end))
    }


def measure_geometry(bench: experiments.Bench, fitted: Tensor) -> dict:
    """All of the above for one trained generator and the vectors (T, z_dim) fitted to
    its held-out tasks.
    """
    trained, tasks = bench.trained, bench.tasks
    half = len(tasks) // 2
    found = {
        "variances": [round(share, 4) for share in variances(bench.z).tolist()],
        "dimensions_used": round(dimensions_used(bench.z), 2),
        "accuracy_in_few_directions": _in_few_directions(bench),
        "length": {"trained": _length(bench.z), "fitted": _length(fitted)},
    }
    if bench.setup.experiment == 1:
        found["line"] = line(bench, trained, trained[1:] + trained[:1])
        if bench.images.superclass_of is not None:
            coarse = bench.images.superclass_of[
                [tasks.positive[number] for number in trained]
            ]
            found["neighbours"] = neighbours(bench.z, coarse)
        return found
    both = [number for number in trained if number < half and number + half in trained]
    own, other = (
        [trained.index(number) for number in side]
        for side in (both, [n + half for n in both])
    )
    centre = (bench.z[own].mean(0) + bench.z[other].mean(0)) / 2
    found["line"] = line(bench, both, [number + half for number in both])
    found["twins"] = twins(bench.z[own] - centre, bench.z[other] - centre)
    known = [number - half for number in bench.held_out]
    if set(known) <= set(trained):  # held-out reversed tasks, whose twins were trained
        theirs = bench.z[[trained.index(number) for number in known]]
        found["fitted_twins"] = twins(fitted - centre, theirs - centre)
        found["mirrored_z"] = bench.test_z(2 * centre - theirs)
    return found


def _in_few_directions(bench: experiments.Bench) -> dict[str, float]:
    """Mean test accuracy of the trained tasks when z keeps only its first k principal
    directions.
    """
    mean = bench.z.mean(0)
    _, _, directions = torch.linalg.svd(bench.z - mean, full_matrices=False)
    kept = {
        count: directions[:count]
        for count in (0, 1, 2, 4, 8, 16, 32, 64)
        if count <= len(directions)
    }
    walk = {
        count: mean + (bench.z - mean) @ kept[count].T @ kept[count] for count in kept
    }
    return {
        str(count): round(fmean(bench.test_z(z, bench.trained)), 4)
        for count, z in walk.items()
    }


def _length(z: Tensor) -> float:
    return round(z.norm(dim=1).mean().item(), 4)
