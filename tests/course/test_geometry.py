"""The geometry of task vectors: known clouds give known answers; a run measures all of
it.
"""

import pytest
import torch

from minisupernet.course.studies.geometry import (
    dimensions_used,
    neighbours,
    twins,
    variances,
)


def cloud(
    groups: int, members: int, spread: float
) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    centres = torch.randn(groups, 12, generator=random).repeat_interleave(members, 0)
    z = centres + spread * torch.randn(groups * members, 12, generator=random)
    return z, torch.arange(groups).repeat_interleave(members)


def test_vectors_that_cluster_are_found_and_others_are_not():
    found = neighbours(*cloud(groups=10, members=5, spread=0.05))
    assert found["share"] == 1.0 and found["p"] < 0.001
    scattered, groups = cloud(groups=10, members=5, spread=50.0)
    assert neighbours(scattered, groups)["p"] > 0.05
    assert neighbours(scattered, groups)["expected"] == pytest.approx(4 / 49, abs=0.01)


def test_the_permutation_test_is_right_about_chance():
    """Where groups mean nothing, p is below one tenth about one time in ten."""
    random = torch.Generator().manual_seed(1)
    z, groups = torch.randn(40, 6, generator=random), torch.arange(4).repeat(10)
    ps = [
        neighbours(z, groups[torch.randperm(40, generator=random)], seed)["p"]
        for seed in range(60)
    ]
    assert sum(p < 0.1 for p in ps) < 15 and sum(p < 0.9 for p in ps) > 40


def test_dimensions_of_a_line_a_plane_and_a_ball():
    random = torch.Generator().manual_seed(0)
    for rank in (1, 2, 8):
        basis, _ = torch.linalg.qr(torch.randn(8, rank, generator=random))
        z = torch.randn(4000, rank, generator=random) @ basis.T + 5
        assert dimensions_used(z) == pytest.approx(rank, rel=0.02)
        assert (
            variances(z).sum().item() == pytest.approx(1)
            and variances(z)[rank:].sum() < 1e-5
        )


def test_twins():
    z = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    assert twins(z, -3 * z) == pytest.approx(-1) and twins(z, z) == pytest.approx(1)
