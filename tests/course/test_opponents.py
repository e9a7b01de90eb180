"""The opponents of a task vector: every group runs on a tiny set, and is right."""

import json
import re
from dataclasses import replace
from statistics import fmean, stdev

import pytest
import torch
from support import ROOT, coloured_squares

from minisupernet.course.records import load_runs, results_file
from minisupernet.course.report.opponents import (
    lead,
    leads_table,
    opponents_table,
    reached,
    target_sizes_table,
)
from minisupernet.course.statistics import paired
from minisupernet.course.studies import opponents
from minisupernet.course.studies.arms import Fold
from minisupernet.course.studies.opponents import GROUPS, measure
from minisupernet.course.studies.rates import best_rate
from minisupernet.course.studies.setups import unseen_pairs
from minisupernet.course.studies.trunk import (
    Lesson,
    TaskFeatures,
    Trunk,
    fit_logistic,
)
from minisupernet.errors import ResultError, SetupError, StudyError
from minisupernet.fitting import accuracy

NUMBER = re.compile(r"\d+\.\d")


@pytest.fixture(scope="module")
def squares():
    return coloured_squares(classes=20, train=60)


def unit(images, group, experiment=2, checkpoint=None, report=str, channels=4):
    sizes = {"of_experiment": experiment, "fold": 0, "channels": channels, "steps": 6}
    return measure(images, 0, "quick", report, checkpoint, group=group, **sizes)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    steps = {"fit_steps": 2, "long_steps": (2, 3), "longest": (4,), "trial_steps": 2}
    monkeypatch.setattr(opponents, "QUICK", replace(opponents.QUICK, **steps))


@pytest.mark.parametrize(
    ("experiment", "group"), [(1, "heads"), *((2, group) for group in GROUPS)]
)
def test_a_group_measures_every_held_out_task(squares, experiment, group, tmp_path):
    run = unit(squares, group, experiment, tmp_path / "unit.safetensors")
    arms = [arm for arms in run["few"].values() for arm in arms.values()]
    count = len(run["held_out"])
    assert arms and count >= 2
    for arm in arms:
        assert len(arm["test"]) == len(arm["test_mirrored"]) == count
        tried = [each["rate"] for each in arm.get("tried", [])]
        assert tried == sorted(tried) and (not tried or arm["rate"] in tried)
    if group == "prior":
        assert run["generator"]["sha256_before"] == run["generator"]["sha256_after"]
        assert len(run["prior"]) == 32 and min(run["prior"]) > -1e-6
    assert run["steps"] == 6 and not list(tmp_path.glob("*.so_far"))


def test_a_killed_unit_goes_on_and_ends_as_if_never_killed(squares, tmp_path):
    whole, said = unit(squares, "from_trunk"), []

    def killed(line):
        said.append(line)
        if line.startswith("5 images"):
            raise KeyboardInterrupt

    path = tmp_path / "unit.safetensors"
    with pytest.raises(KeyboardInterrupt):
        unit(squares, "from_trunk", checkpoint=path, report=killed)
    done = json.loads(path.with_suffix(".so_far").read_text())
    assert {"trunk", "lora 5"} <= done.keys() and "lora all" not in done
    again = unit(squares, "from_trunk", checkpoint=path)
    assert again["few"] == whole["few"] and again["trunk"]["rate"]
    assert again["trunk"]["sha256"] == whole["trunk"]["sha256"]


def test_no_trunk_is_trained_on_a_held_out_class(squares):
    run = unit(squares, "heads")
    assert run["trunk"]["classes"] == squares.classes - 2 * len(run["held_out"])


def test_a_unit_that_cannot_be_is_refused(squares):
    with pytest.raises(StudyError, match="no group 'tails'; choose of heads"):
        unit(squares, "tails")
    with pytest.raises(SetupError, match="channels must be from 1 to 10,000, not 0"):
        unit(squares, "heads", channels=0)


def test_trunk_and_head_are_one_network(squares):
    fold = Fold.of(replace(unseen_pairs(2, "quick"), channels=4), squares, 0, 0)
    lesson, data = Lesson.of(fold, 40), fold.data(fold.held_out)
    trunk = Trunk(lesson.train(1e-3, 4)[0], lesson)
    features = TaskFeatures.of(trunk, data)
    head = fit_logistic(*features.to_train(), 0.1)
    alone, _ = features.right(head, "test")
    whole = accuracy(fold.target, trunk.with_head(head), data)
    assert (alone - whole).abs().max() < 1e-6


def test_the_start_of_he_keeps_the_length_of_a_signal(squares):
    fold = Fold.of(replace(unseen_pairs(2, "quick"), channels=64), squares, 0, 0)
    weights = fold.spec.split(opponents.STARTS["he"](fold, 2))
    signal = torch.randn(2, 50, 64, 8, 8, generator=torch.Generator().manual_seed(0))
    out = [
        torch.nn.functional.conv2d(x, w, padding=2)
        for x, w in zip(signal, weights["convolutions.1.weight"], strict=True)
    ]
    after = torch.nn.functional.leaky_relu(torch.stack(out), 0.2)[..., 2:-2, 2:-2]
    assert 0.8 < after.square().mean() / signal.square().mean() < 1.25
    assert weights["output.bias"].abs().max() == 0


def test_a_logistic_regression_is_the_minimum():
    random = torch.Generator().manual_seed(0)
    features = torch.randn(3, 40, 5, generator=random)
    labels = (features[:, :, 0] + torch.randn(3, 40, generator=random) > 0).float()
    found = fit_logistic(features, labels, 0.1)
    weight, bias = (t.clone().requires_grad_() for t in (found.weight, found.bias))
    logits = torch.einsum("tnd,td->tn", features.double(), weight) + bias[:, None]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.double())
    (3 * loss + 0.05 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-4 and bias.grad.abs().max() < 1e-4


def test_candidates_grow_beyond_an_edge_and_stop_inside():
    asked = []

    def trial(rate: float) -> tuple[float, float]:
        asked.append(rate)
        return -abs(rate - 16.0), rate

    chosen = best_rate((1.0, 2.0, 4.0), trial, most=8)
    assert (chosen.rate, chosen.result) == (16.0, 16.0)
    assert asked == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    assert [each["rate"] for each in chosen.tried] == sorted(asked)
    assert best_rate((1.0, 2.0, 4.0), trial, most=4).rate == 8.0
    assert best_rate((1.0, 2.0, 4.0), trial).rate == 4.0
    assert best_rate((5.0,), trial).rate == 5.0


def recorded_unit(fold: int, group: str, channels: int = 16, **few: dict) -> dict:
    unit = {"of_experiment": 2, "fold": fold, "seed": fold, "group": group}
    return {**unit, "channels": channels, "steps": 2_000, "weights": 37_165, "few": few}


def test_the_tables_are_drawn_from_the_records_by_fold():
    runs = []
    for fold, shift in enumerate((0.0, 0.01, 0.05)):
        head, z = 0.8 + shift, 0.83 + 1.5 * shift
        arm = {"test": [head, head + 0.1], "test_mirrored": [head + 0.2, head + 0.3]}
        runs.append(recorded_unit(fold, "heads", **{"5": {"head": arm}}))
        runs.append(recorded_unit(fold, "prior", **{"5": {"z_only": {"test": [z, z]}}}))
    assert reached(runs, 2, "head", 5)[1, 1] == pytest.approx(0.86)
    assert reached(runs, 2, "head", 5, mirrored=True)[1, 1] == pytest.approx(1.06)
    found = lead(runs, 2, "z_only", "head", 5)
    expected = paired([0.83, 0.845, 0.905], [0.85, 0.86, 0.9])
    assert found.n == 3 and found.percent() == expected.percent()
    lines = opponents_table(runs, 2).data.splitlines()
    assert lines[3].startswith("| head on one network | 87.0 ± 6.6 | – |")
    row = f"| head on one network | {found.percent()}: not told apart | – | – |"
    assert leads_table(runs, 2).data.splitlines()[2:] == [row]
    sizes = target_sizes_table(runs, "z_only").data
    assert f"| 16 | 37,165 | {found.percent()}: not told apart | – | – |" in sizes
    with pytest.raises(ResultError, match="no recorded unit of experiment 1 has the"):
        reached(runs, 1, "head", 5)


def test_every_recorded_choice_was_made_by_one_rule():
    """Three candidates, and more beyond an edge that is best, up to six."""
    runs = load_runs(results_file("07_opponents.json"))
    for run in runs:
        settings = run["settings"]
        arms = [arm for arms in run["few"].values() for arm in arms.values()]
        for arm in [each for each in [*arms, run.get("trunk", {})] if "tried" in each]:
            tried = {each["rate"]: each["validation"] for each in arm["tried"]}
            inside = min(tried) < arm["rate"] < max(tried)
            assert inside and len(tried) >= 3 or len(tried) == settings["most"] == 6
            assert tried[arm["rate"]] == max(tried.values())


def test_recorded_z_were_fitted_through_a_generator_that_did_not_move():
    runs = load_runs(results_file("07_opponents.json"))
    for run in (each for each in runs if each["group"] == "prior"):
        assert run["generator"]["sha256_before"] == run["generator"]["sha256_after"]


def lead_of_recorded(experiment: int, size: str, arm: str) -> list[float]:
    """z minus an arm in points, a value a fold, from the records."""
    setup = {1: "many_tasks", 2: "unseen_pairs"}[experiment]
    name = f"{experiment + 5:02d}_experiment_{experiment}.json"
    runs = [run for run in load_runs(results_file(name)) if run["setup"] == setup]
    opponents = load_runs(results_file("07_opponents.json"))
    found = []
    for run in runs:
        (other,) = (
            each
            for each in opponents
            if each["group"] == "heads"
            and (each["of_experiment"], each["fold"]) == (experiment, run["fold"])
        )
        arms = run["arms"] if size == "all" else run["few"][size]
        ours, theirs = arms["z_only"]["test"], other["few"][size][arm]["test"]
        found.append(100 * (fmean(ours) - fmean(theirs)))
    return found


@pytest.mark.parametrize(
    ("experiment", "size", "said"),
    [
        (1, "5", "leads by 7.4 points (5.9 to 8.9)"),
        (1, "20", "3.3 (2.3 to 4.2) with 20"),
        (1, "all", "trails by 1.4 (0.3 to 2.5)"),
        (2, "20", "by 3.7 points (2.0 to 5.3)"),
        (2, "all", "2.8 (1.6 to 4.1) with 450"),
    ],
)
def test_what_the_readme_says_of_the_head_is_recorded(experiment, size, said):
    values = lead_of_recorded(experiment, size, "head")
    half = 2.776 * stdev(values) / len(values) ** 0.5  # t, four degrees of freedom
    mean = fmean(values)
    ends = sorted(abs(end) for end in (mean - half, mean + half))
    assert len(values) == 5 and ends[0] > 0
    assert [f"{each:.1f}" for each in (abs(mean), *ends)] == NUMBER.findall(said)[:3]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert said in readme and (mean > 0) == (experiment == 1 and size != "all")
