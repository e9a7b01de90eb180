"""Studies at a size that counts: every arm runs at a tiny size, a killed unit goes on,
and what the arms stand on is right.
"""

from dataclasses import replace

import pytest
import torch
from support import coloured_squares

from minisupernet.course.studies import pudnet_family
from minisupernet.data.episodes import Batch
from minisupernet.errors import StudyError


def lasting(run: dict) -> dict:
    """What must be the same in every run of one unit: all but times."""
    rows = [{**row, "seconds": 0} for row in run["history"]]
    return {**run, "history": rows, "train_seconds": 0}


def images_like(*shape: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.rand(*shape, 3, 32, 32, generator=random)


def changes_of(kind: str, count: int = 3) -> pudnet_family.Changes:
    random = torch.Generator().manual_seed(2)
    return pudnet_family.draw_changes(kind, count, random, torch.device("cpu"))


# Chapter 8: data sets with changes of their own


def test_each_data_set_has_one_change_of_all_its_images():
    images = images_like(1, 1).expand(3, 4, 3, 32, 32)  # one image, 12 times
    for kind in ("colours", "all"):
        found = changes_of(kind)(images)
        torch.testing.assert_close(found[:, :1].expand(found.shape), found)
        apart = (found[0, 0] - found[1, 0]).abs().mean(), found[0, 0].abs().mean()
        assert apart[0] > 0.2 * apart[1]
        moved = changes_of(kind).of_the_next()(images)
        torch.testing.assert_close(moved, found.roll(-1, 0).roll(2, 0))
    assert changes_of("none")(images).equal(images)


def test_colours_are_turned_and_mirrored_half_the_time():
    mixing = changes_of("colours", 200).mixing
    identity = torch.eye(3).expand(200, 3, 3)
    torch.testing.assert_close(mixing @ mixing.mT, identity, atol=1e-5, rtol=0)
    mirrored = (torch.linalg.det(mixing) < 0).float().mean().item()
    assert 0.4 < mirrored < 0.6 and mixing.mean(0).abs().max() < 0.15


def test_blocks_are_shuffled_whole_and_a_blur_keeps_the_mean_colour():
    images, change = images_like(3, 2), changes_of("all")
    sharp = replace(change, down=torch.eye(32).expand(3, 32, 32))
    sharp = replace(sharp, across=sharp.down, mixing=torch.eye(3).expand(3, 3, 3))
    found = sharp(images)
    torch.testing.assert_close(
        found.flatten(3).sort(3)[0], images.flatten(3).sort(3)[0]
    )
    place = int(sharp.order[0, 0])
    down, across = 8 * (place // 4), 8 * (place % 4)
    cut = images[0, 0, :, down : down + 8, across : across + 8]
    assert found[0, 0, :, :8, :8].equal(cut)
    torch.testing.assert_close(change.down.sum(2), torch.ones(3, 32))
    assert change.down[0].diagonal().max() < 1


def test_hand_alignment_undoes_what_turns_the_colours():
    skewed = images_like(3, 4).square() * torch.tensor([3.0, 1.0, 0.3]).view(3, 1, 1)
    batch = Batch(torch.zeros(3, 2), skewed[:, :2], skewed[:, 2:])
    there = pudnet_family.aligned(pudnet_family.changed(batch, changes_of("colours")))
    here = pudnet_family.aligned(batch)
    torch.testing.assert_close(there.support, here.support, atol=1e-4, rtol=0)
    torch.testing.assert_close(there.query, here.query, atol=1e-4, rtol=0)


def test_a_sketch_with_labels_sees_who_belongs_together_and_nothing_else():
    torch.manual_seed(0)
    encoder = pudnet_family.ClassEncoder(8, way=2).eval()
    datasets = images_like(1, 6)
    sketch = encoder(datasets)
    for order in ([1, 2, 0, 5, 4, 3], [3, 4, 5, 0, 1, 2]):
        torch.testing.assert_close(encoder(datasets[:, order]), sketch)
    mixed = encoder(datasets[:, [0, 1, 3, 2, 4, 5]])
    assert (mixed - sketch).abs().max() > 1e-4


def test_splits_keep_superclasses_whole_and_the_seed_draws_them():
    images = coloured_squares(classes=40, train=2, test=1)
    images = replace(images, superclass_of=torch.arange(40) // 2)
    parts = [pudnet_family.class_split(images, seed) for seed in range(2)]
    for training, validation, test in parts:
        assert sorted(training + validation + test) == list(range(40))
        assert [len(part) for part in (training, validation, test)] == [28, 4, 8]
        for part in (training, validation, test):
            assert {number ^ 1 for number in part} == set(part)
    assert parts[0] != parts[1]


@pytest.fixture(scope="module")
def many_squares():
    return coloured_squares(classes=50, train=6, test=4)


def family_unit(images, arm, checkpoint=None, **which):
    unit = {"changes": "colours", "channels": 4, "steps": 4, **which}
    return pudnet_family.measure(images, 0, "quick", str, checkpoint, arm=arm, **unit)


@pytest.mark.parametrize("arm", pudnet_family.ARMS)
def test_every_arm_of_the_family_is_measured(many_squares, arm):
    run = family_unit(many_squares, arm, changes="all")
    shown = {"own"}
    if arm.startswith("pudnet"):
        shown |= {"wrong", "other_classes", "other_change"}
    assert set(run["test"]["2"]) == shown
    assert all(0 <= value <= 1 for value in run["test"]["2"].values())
    assert run["weights"] == 3_896 and [r["step"] for r in run["history"]] == [2, 4]
    assert not {*run["classes"]["training"]} & {*run["classes"]["test"]}


def test_a_killed_unit_of_the_family_ends_as_if_never_killed(
    many_squares, tmp_path, monkeypatch
):
    rates = replace(pudnet_family.QUICK, rates=(1e-3, 3e-3))
    monkeypatch.setattr(pudnet_family, "QUICK", rates)
    path = tmp_path / "unit.safetensors"
    check, looks = pudnet_family.Unit.check, []

    def killed(self, learner):
        looks.append(check(self, learner))
        if path.exists():  # after the trials, and the first look of the run
            raise KeyboardInterrupt
        return looks[-1]

    with monkeypatch.context() as patch:
        patch.setattr(pudnet_family.Unit, "check", killed)
        with pytest.raises(KeyboardInterrupt):
            family_unit(many_squares, "pudnet", path)
    monkeypatch.setattr(pudnet_family, "best_rate", None)  # not chosen again
    again = family_unit(many_squares, "pudnet", path)
    monkeypatch.undo()
    monkeypatch.setattr(pudnet_family, "QUICK", rates)
    assert lasting(again) == lasting(family_unit(many_squares, "pudnet"))
    assert len(again["tried"]) == 3 and not list(tmp_path.glob("*.rate"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"arm": "two_networks"}, "arm cannot be 'two_networks'; choose one of one"),
        ({"changes": "sepia"}, "changes cannot be 'sepia'; choose one of none"),
        ({"channels": 6}, "channels must be 4 or a multiple of it"),
        ({"steps": 0}, "steps from 1, not 8 and 0"),
    ],
)
def test_a_unit_of_the_family_that_does_not_exist_is_refused(wrong, said):
    unit = {"arm": "pudnet", "changes": "all", "channels": 8, "steps": 1}
    with pytest.raises(StudyError, match=said):
        pudnet_family.check_unit(**{**unit, **wrong})
