"""The opponents of a task vector: every group runs on a tiny set, and is right."""

import json
import math
import re
from dataclasses import replace
from statistics import fmean, stdev

import pytest
import torch
from support import ROOT, coloured_squares

from minisupernet.course.records import load_runs, results_file, unit_means
from minisupernet.course.report.opponents import (
    by_chance,
    lead,
    leads_figure,
    leads_table,
    opponents_figure,
    opponents_table,
    reached,
    sizes_figure,
    target_sizes_table,
    with_experiment,
)
from minisupernet.course.statistics import Interval, paired, verdict
from minisupernet.course.studies import opponents
from minisupernet.course.studies.arms import Fold
from minisupernet.course.studies.opponents import GROUPS, measure
from minisupernet.course.studies.rates import best_rate
from minisupernet.course.studies.setups import many_tasks, unseen_pairs
from minisupernet.course.studies.trunk import (
    Lesson,
    TaskFeatures,
    Trunk,
    fit_logistic,
)
from minisupernet.course.studies.units import Prior
from minisupernet.errors import ResultError, SetupError, StudyError
from minisupernet.fitting import accuracy

NUMBER = re.compile(r"-?\d+\.\d")


@pytest.fixture(scope="module")
def squares():
    return coloured_squares(classes=20, train=60)


def unit(images, group, experiment=2, checkpoint=None, report=str, channels=4):
    sizes = {"of_experiment": experiment, "fold": 0, "channels": channels, "steps": 6}
    return measure(images, 0, "quick", report, checkpoint, group=group, **sizes)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    steps = {"fit_steps": 2, "long_steps": (2, 3), "longest": (4,), "trial_steps": 2}
    quick = replace(opponents.SETTINGS["quick"], **steps)
    monkeypatch.setitem(opponents.SETTINGS, "quick", quick)


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
    if group in ("prior", "begun"):
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


def test_a_generator_that_is_begun_from_a_trunk_makes_its_body(squares, monkeypatch):
    made = []

    def caught(self, checkpoint=None, generator=None):
        made.append((self, generator))
        raise KeyboardInterrupt

    monkeypatch.setattr(Fold, "train", caught)
    with pytest.raises(KeyboardInterrupt):
        unit(squares, "begun")
    ((fold, generator),) = made
    flat = generator.flat(torch.randn(2, 32)).detach()
    assert torch.equal(flat[0], flat[1])
    weights = fold.spec.split(flat)
    assert weights["output.weight"].abs().max() == 0
    first = weights["convolutions.0.weight"][0]
    lesson = Lesson.of(fold, 800)
    assert not torch.allclose(first, lesson._new_network().convolutions[0].weight)
    assert first.abs().max() > 0.01


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


def test_a_trunk_trained_by_questions_answers_them(squares):
    """Its loss at the start is that of a coin, and each label is the generator's."""
    fold = Fold.of(replace(unseen_pairs(2, "quick"), channels=4), squares, 0, 0)
    lesson, asked = Lesson.of(fold, 400, "questions"), fold.training_tasks()
    places = torch.tensor(lesson.classes)[lesson.questions]
    assert places.tolist() == [list(asked.positive), list(asked.negative)]
    assert lesson._loss(lesson._new_network(), 0).item() == pytest.approx(
        math.log(2), abs=0.1
    )
    _, history = lesson.train(1e-2, 12)
    assert history.last("validation_accuracy") > 0.65


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
    assert leads_table(runs, 2, "z_only").data.splitlines()[2:] == [row]
    sizes = target_sizes_table(runs, "z_only").data
    row = f"| 16 | 37,165 | head on one network | {found.percent()}: not told apart |"
    assert row in sizes
    (axes,) = sizes_figure(runs, "z_only", ("head",), 5).axes
    (drawn,) = axes.containers
    assert drawn.lines[0].get_ydata()[0] == pytest.approx(100 * found.mean)
    said = by_chance(leads_table(runs, 2, "z_only"), target_sizes_table(runs, "z_only"))
    assert said.startswith("2 differences are judged here")
    with pytest.raises(ResultError, match="no recorded unit of experiment 1 has the"):
        reached(runs, 1, "head", 5)


def test_an_experiment_s_own_runs_stand_beside_the_opponents():
    units = load_runs(results_file("07_opponents.json"))
    for experiment, (name, setup) in OWN.items():
        own = load_runs(results_file(f"{name}.json"))
        units = with_experiment(units, own, setup)
        for arm, ours in (
            ("z_only", "z_recorded"),
            ("from_scratch", "scratch_recorded"),
        ):
            found = reached(units, experiment, ours, 20)
            straight = of_folds(experiment, arm, "20")
            assert {fold: 100 * v for (fold, _), v in found.items()} == pytest.approx(
                straight
            )
    (axes,) = leads_figure(units).axes
    assert [each.get_text() for each in axes.get_legend().get_texts()] == [
        "experiment 1",
        "experiment 2",
    ]
    (axes,) = opponents_figure(units, 1).axes
    head = axes.get_lines()[1].get_ydata()
    assert head[0] == pytest.approx(fmean(of_folds(1, "@head", "5").values()))


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


OWN = {1: ("06_experiment_1", "many_tasks"), 2: ("07_experiment_2", "unseen_pairs")}
T = 2.776  # Student's t, four degrees of freedom: five generators


def of_folds(experiment: int, arm: str, size: str) -> dict[int, float]:
    """An arm's test accuracy on each fold, in percent, straight from the records; with
    a mark in front of its name, from those of the opponents."""
    name, setup = OWN[experiment]
    if arm.startswith("@"):
        runs = load_runs(results_file("07_opponents.json"))
        asked = (experiment, 16, 2_000)
        return {
            run["fold"]: 100 * fmean(run["few"][size][arm[1:]]["test"])
            for run in runs
            if (run["of_experiment"], run["channels"], run["steps"]) == asked
            and arm[1:] in run["few"].get(size, {})
        }
    runs = load_runs(results_file(f"{name}.json"))
    return {
        run["fold"]: 100
        * fmean((run["arms"] if size == "all" else run["few"][size])[arm]["test"])
        for run in runs
        if run["setup"] == setup
    }


def text_of(place: str) -> str:
    """What a reader reads: of README.md, or of a chapter's Markdown cells."""
    path = ROOT / place
    if path.suffix == ".md":
        return " ".join(path.read_text(encoding="utf-8").split())
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    words = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
    return " ".join(" ".join(words).split())


SIX, SEVEN = (f"notebooks/{name}.ipynb" for name, _ in OWN.values())
# z minus an arm: experiment, images of a class, arm, where it is said, and the words
SAID = [
    (1, "5", "@head", "README.md", "leads by 7.4 points (5.9 to 8.9)"),
    (1, "20", "@head", "README.md", "3.3 (2.3 to 4.2) with 20"),
    (1, "all", "@head", "README.md", "trails by 1.4 (0.3 to 2.5)"),
    (1, "5", "no_adaptation", "README.md", "z adds 0.5 (-2.9 to 3.9)"),
    (2, "20", "@head", "README.md", "by 3.7 points (2.0 to 5.3)"),
    (2, "all", "@head", "README.md", "2.8 (1.6 to 4.1) with 450"),
    (2, "all", "from_scratch", "README.md", "2.3 points (1.6 to 2.9) with 450"),
    (2, "20", "from_scratch", "README.md", "by 5.9 (4.2 to 7.5) with 20"),
    (1, "5", "@head", SIX, "by 7.4 points (5.9 to 8.9) with 5"),
    (1, "20", "@head", SIX, "by 3.3 (2.3 to 4.2) with 20"),
    (1, "all", "@head", SIX, "1.4 behind (0.3 to 2.5)"),
    (1, "5", "no_adaptation", SIX, "z adds 0.5 points (-2.9 to 3.9)"),
    (2, "5", "@head", SEVEN, "by 4.1 points (0.1 to 8.0) with 5"),
    (2, "20", "@head", SEVEN, "by 3.7 (2.0 to 5.3) with 20"),
    (2, "all", "@head", SEVEN, "by 2.8 (1.6 to 4.1) with 450"),
    (2, "all", "from_scratch", SEVEN, "by 2.3 points (1.6 to 2.9)"),
]


@pytest.mark.parametrize(("experiment", "size", "arm", "place", "said"), SAID)
def test_what_is_said_of_z_against_an_arm_is_recorded(
    experiment, size, arm, place, said
):
    ours = of_folds(experiment, "z_only", size)
    theirs = of_folds(experiment, arm, "all" if arm == "no_adaptation" else size)
    values = [ours[fold] - theirs[fold] for fold in ours]
    half, mean = T * stdev(values) / len(values) ** 0.5, fmean(values)
    behind = any(word in said for word in ("trails", "behind", "lower"))
    behind = behind or (arm == "@head" and experiment == 2)
    numbers = [mean, mean - half, mean + half]
    if behind:
        numbers = [-mean, -mean - half, half - mean]
    assert len(values) == 5
    assert [f"{each:z.1f}" for each in numbers] == NUMBER.findall(said)[:3]
    assert said in text_of(place)


def test_what_the_mean_z_reaches_is_recorded():
    found = of_folds(1, "no_adaptation", "all")
    mean = f"{fmean(found.values()):.1f} %"
    assert f"starts at {mean}" in text_of("README.md")
    assert f"the mean z is right on {mean} of the test images" in text_of(SIX)
    assert many_tasks(1).own_share == 0.5  # "half of the training tasks"


def leads_of(experiment: int, first: str, second: str, size: str) -> Interval:
    ours, theirs = (of_folds(experiment, arm, size) for arm in (first, second))
    return paired([ours[fold] for fold in ours], [theirs[fold] for fold in ours])


def test_what_the_chapters_say_of_heads_in_words():
    """Not told apart with 50 and 100 images, a head on 32 directions as good as one on
    all; the nearest mean ahead of z with 5 to 20; the prior, and z fitted anew, no
    different."""
    for size in ("50", "100"):
        assert verdict(leads_of(1, "z_only", "@head", size)) == "not told apart"
    for experiment in OWN:
        for size in ("5", "20", "all"):
            assert abs(leads_of(experiment, "@head", "@head_32", size).mean) < 1
    for size in ("5", "10", "20"):
        assert verdict(leads_of(2, "z_only", "@nearest_mean", size)) == "lower"
    for arm in ("@z_only", "@z_prior"):
        for size in ("5", "20", "all"):
            assert verdict(leads_of(2, "z_only", arm, size)) == "not told apart"


def test_what_the_chapters_say_of_few_images_in_numbers():
    """In experiment 1 z loses two points from all images to 20, fine-tuning three, and
    training from scratch four."""
    arms = ("z_only", "fine_tuned", "from_scratch")
    fell = [
        fmean(of_folds(1, arm, "all").values()) - fmean(of_folds(1, arm, "20").values())
        for arm in arms
    ]
    assert [round(each) for each in fell] == [2, 3, 4]
    found = [leads_of(2, "z_only", arm, "5").mean for arm in arms[1:]]
    said = (
        f"it leads fine-tuning by {found[0]:.1f} points and training from scratch by"
        f" {found[1]:.1f}"
    )
    assert said in text_of(SEVEN)


def test_what_chapter_5_says_of_random_generators_is_recorded():
    means = []
    for name, _ in OWN.values():
        runs = load_runs(results_file(f"{name}.json"))
        for setup in {run["setup"] for run in runs}:
            found = unit_means(runs, setup, "random_generator")
            means.append(100 * fmean(found.values()))
    low, high = round(min(means)), round(max(means))
    assert f"it reaches {low} to {high} %" in text_of("notebooks/05_supernet.ipynb")


def on_pairs(first: str, second: str, size: int | None, channels: int = 16) -> Interval:
    """A difference in points on the pairs of experiment 2, fold by fold."""
    units = load_runs(results_file("07_opponents.json"))
    found = lead(units, 2, first, second, size, channels=channels)
    assert found.n == 5
    return found


def in_points(found: Interval) -> list[str]:
    return [f"{100 * each:z.1f}" for each in (found.mean, found.low, found.high)]


@pytest.mark.parametrize(
    ("first", "second", "size", "channels", "said"),
    [
        ("head", "question_head", 5, 16, "worse by 3.0 points (1.5 to 4.5) with 5"),
        ("head", "question_head", 20, 16, "by 2.7 (1.8 to 3.6) with 20"),
        ("head", "question_head", None, 16, "by 2.2 (1.6 to 2.7) with 450"),
        ("begun_z", "z_only", 20, 16, "better by 2.6 points (0.9 to 4.2) with 20"),
        ("begun_z", "z_only", None, 16, "by 1.7 (0.6 to 2.8) with 450"),
        ("begun_z_prior", "z_prior", 5, 16, "by 3.1 (0.5 to 5.7) with 5"),
        ("begun_z_prior", "z_prior", 20, 16, "by 2.9 (1.2 to 4.5) with 20"),
        ("begun_z_prior", "z_prior", None, 16, "by 1.9 (0.6 to 3.1) with 450"),
        ("head", "begun_z", None, 16, "leads z alone by 1.3 (0.8 to 1.8)"),
        ("head", "begun_z", None, 16, "the head leads by 1.3 points (0.8 to 1.8)."),
        ("z_only", "question_head", 20, 4, "same labels, by 1.7 points (0.6 to 2.8)."),
    ],
)
def test_what_chapter_7_says_of_labels_and_of_small_networks(
    first, second, size, channels, said
):
    assert in_points(on_pairs(first, second, size, channels)) == NUMBER.findall(said)
    assert said in text_of(SEVEN)


def test_z_of_a_begun_generator_catches_up_where_images_are_few():
    for arm in ("begun_z", "begun_z_prior"):
        for size in (5, 20):
            assert verdict(on_pairs(arm, "head", size)) == "not told apart"
    assert verdict(on_pairs("begun_z", "head_32", None)) == "not told apart"
    for arm in ("begun_z", "begun_z_prior"):
        assert on_pairs(arm, "head", None).mean > -0.016


def test_told_of_two_classes_at_a_time_a_head_is_not_told_apart_from_z():
    for size in (5, 20, None):
        found = verdict(on_pairs("z_only", "question_head", size))
        assert found == "not told apart"
        found = verdict(on_pairs("z_prior", "question_head", size))
        assert found == ("not told apart" if size else "lower")
    for size in (5, 20, None):
        for channels in (2, 4):
            found = on_pairs("z_only", "head", size, channels)
            assert verdict(found) == "not told apart"
        apart = on_pairs("question_head", "head", size, 2)
        assert max(abs(100 * apart.low), abs(100 * apart.high)) < 2
    for size in (5, None):
        found = verdict(on_pairs("z_only", "question_head", size, 4))
        assert found == "not told apart"


@pytest.mark.parametrize(
    ("size", "channels", "place", "said"),
    [
        (20, 4, SEVEN, "3.8 points (2.5 to 5.0) from 16 filters to 4"),
        (20, 2, SEVEN, "4.7 (3.0 to 6.3) from 16 to 2."),
        (20, 2, SEVEN, "4.7 points (3.0 to 6.3) with 20 images from 16"),
        (20, 2, "README.md", "4.7 points (3.0 to 6.3) on a head"),
        (5, 4, SEVEN, "gains 3.5 (0.5 to 6.4) and"),
        (5, 2, SEVEN, "and 4.6 (3.1 to 6.0), with 450"),
        (None, 4, SEVEN, "gains 1.4 (-0.3 to 3.1) and"),
        (None, 2, SEVEN, "and 2.3 (0.1 to 4.5)."),
    ],
)
def test_what_z_gains_on_a_head_in_a_smaller_network(size, channels, place, said):
    units = load_runs(results_file("07_opponents.json"))

    def leads(filters: int) -> dict[tuple[int, int], float]:
        ours, theirs = (
            reached(units, 2, arm, size, channels=filters) for arm in ("z_only", "head")
        )
        return {unit: ours[unit] - theirs[unit] for unit in ours}

    small, large = leads(channels), leads(16)
    found = paired([small[unit] for unit in small], [large[unit] for unit in small])
    assert found.n == 5 and in_points(found) == NUMBER.findall(said)[:3]
    assert said in text_of(place)


def test_the_head_leads_in_experiment_2_at_every_number_of_images():
    for size in ("5", "10", "20", "50", "100", "all"):
        ours, theirs = of_folds(2, "z_only", size), of_folds(2, "@head", size)
        values = [theirs[fold] - ours[fold] for fold in ours]
        assert fmean(values) > T * stdev(values) / len(values) ** 0.5


@pytest.mark.parametrize("experiment", [1, 2])
def test_a_prior_knows_the_classes_that_training_met(squares, experiment):
    setup = (many_tasks if experiment == 1 else unseen_pairs)(experiment, "quick")
    training = replace(setup.training, steps=1)
    fold = Fold.of(replace(setup, channels=4, training=training), squares, 0, 0)
    trained = fold.train()
    half = len(fold.held_out) // experiment  # of a pair, one orientation
    tasks = fold.tasks.select(fold.held_out[:half])
    prior, met = Prior.of(trained, tasks), fold.training_tasks().classes
    others = trained.u[[n for n, c in enumerate(met) if c not in tasks.classes]]
    mean = torch.zeros(32)
    if experiment == 1:  # the last class is in every question
        mean = others.mean(0) - trained.u[-1]
    assert torch.allclose(prior.mean, mean.expand(half, -1), atol=1e-6)
    covariance = experiment * torch.cov(others.T)
    assert torch.allclose(prior.root @ prior.root.T, covariance, atol=1e-6)
