"""The study of one look: both groups run on a tiny set, their controls are what they
say, and a killed unit goes on."""

from dataclasses import replace

import pytest
import torch
from support import coloured_squares
from torch.utils.flop_counter import FlopCounterMode

from minisupernet.course.studies import labelled
from minisupernet.course.studies.arms import Fold
from minisupernet.course.studies.labelled import GROUPS, PROTONET_IMAGES, measure
from minisupernet.course.studies.setups import unseen_pairs
from minisupernet.errors import StudyError
from minisupernet.labelled import ExampleEncoder, LabelledNet, Lessons
from minisupernet.target import TaskClassifier, WeightSpec, run_tasks

LOOKED = {"look", "shuffled", "other_task", "untrained", "nearest_vector"}


@pytest.fixture(scope="module")
def squares():
    return coloured_squares(classes=20, train=30)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    few = {"fit_steps": 2, "trial_steps": 2, "shuffles": 2, "encoder_steps": 2}
    quick = replace(labelled.SETTINGS["quick"], **few)
    monkeypatch.setitem(labelled.SETTINGS, "quick", quick)
    monkeypatch.setattr(labelled, "PROTONET_IMAGES", 100)


def unit(images, group="look", experiment=2, checkpoint=None, report=str):
    sizes = {"of_experiment": experiment, "fold": 0, "channels": 4, "steps": 3}
    return measure(images, 0, "quick", report, checkpoint, group=group, **sizes)


@pytest.mark.parametrize(("experiment", "group"), [(1, "look"), (2, "protonet")])
def test_a_group_measures_every_held_out_task(squares, experiment, group, tmp_path):
    run = unit(squares, group, experiment, tmp_path / "unit.safetensors")
    fits = {"look_fitted", "z_only", "z_prior"}
    wanted = LOOKED | fits if group == "look" else {"protonet"}
    for size, arms in run["few"].items():
        assert arms.keys() == wanted - (fits if size == "1" else set())
        for name, arm in arms.items():
            assert len(arm["test"]) == len(arm["test_mirrored"]) == len(run["held_out"])
            assert ("rate" in arm) == (name in fits)
    assert set(run["few"]) == {"1", "5"} and not list(tmp_path.glob("*.so_far"))
    if group == "look":
        assert run["generator"]["sha256_before"] == run["generator"]["sha256_after"]
        assert run["training"]["classes"] == squares.classes - len(run["held_out"])
        assert all(arms["look"]["seconds"] > 0 for arms in run["few"].values())
    else:
        assert run["trunk"]["classes"] == squares.classes - 2 * len(run["held_out"])


def test_a_killed_unit_goes_on_and_ends_as_if_never_killed(squares, tmp_path):
    whole = unit(squares)

    def killed(line):
        if line.startswith("1 images"):
            raise KeyboardInterrupt

    path = tmp_path / "unit.safetensors"
    with pytest.raises(KeyboardInterrupt):
        unit(squares, checkpoint=path, report=killed)
    again = unit(squares, checkpoint=path)
    for arm, found in whole["few"]["5"].items():
        assert again["few"]["5"][arm]["test"] == found["test"]
    assert again["generator"] == whole["generator"]


def test_a_group_that_does_not_exist_is_refused(squares):
    with pytest.raises(StudyError, match="no group 'glance'; choose of look, protonet"):
        unit(squares, "glance")


def test_class_vectors_of_the_trained_classes_make_the_trained_tasks(squares):
    fold = Fold.of(replace(unseen_pairs(2, "quick"), channels=4), squares, 0, 0)
    generator = LabelledNet(fold.spec, fold.setup.z_dim, fold.setup.hidden)
    trained = labelled._as_trained(fold, generator)
    tasks, known = fold.tasks.select(fold.trained), fold.training_tasks().classes
    a, b = known.index(tasks.positive[1]), known.index(tasks.negative[1])
    torch.testing.assert_close(trained.z[1], trained.u[a] - trained.u[b])
    assert trained.mean_z().abs().max() < 1e-6  # each pair is trained both ways round
    own = squares.train_images[squares.train_labels == known[3]][:24].float() / 255
    shown = (own - squares.mean.view(3, 1, 1)) / squares.std.view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(
            generator.encoder(shown).mean(0), trained.u[3], rtol=1e-3, atol=1e-4
        )


def test_an_episode_of_protonet_is_as_much_arithmetic_as_a_lesson():
    """Multiplications of a lesson as in the set-up, shown 12 examples a class, and of
    half a lesson of the encoder alone, against those of the episode's images."""
    setup, target = unseen_pairs(2, "full"), TaskClassifier()
    generator = LabelledNet(WeightSpec.of(target), setup.z_dim, setup.hidden)
    fit, classes = setup.training, Lessons.__init__.__defaults__[0]
    with FlopCounterMode(display=False) as lesson, torch.no_grad():
        u = generator.class_vectors(torch.randn(classes, 12, 3, 32, 32))
        z = u[torch.arange(fit.tasks) % classes]
        generator.supernet(z)
    weights = generator.supernet(z[:1].detach())
    with FlopCounterMode(display=False) as asked, torch.no_grad():
        run_tasks(target, weights, torch.randn(1, fit.images, 3, 32, 32))
    with FlopCounterMode(display=False) as episode, torch.no_grad():
        ExampleEncoder(labelled.FEATURES)(torch.randn(100, 3, 32, 32))
    alone = (12 * classes + labelled.LESSON_TASKS * labelled.LESSON_SIZE) / 100
    alone *= (
        labelled.SETTINGS["full"].encoder_steps / fit.steps * episode.get_total_flops()
    )
    ours = lesson.get_total_flops() + fit.tasks * asked.get_total_flops() + alone
    theirs = PROTONET_IMAGES / 100 * episode.get_total_flops()
    assert 0.8 < theirs / ours < 1.25, (ours, theirs)
    assert set(GROUPS) == {"look", "protonet"}
