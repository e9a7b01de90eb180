"""The protocol of experiments 1 and 2, on images that take seconds; and the command
that records it.
"""

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from minisupernet.course.records import fingerprint
from minisupernet.course.studies import arms as experiments
from minisupernet.course.studies.arms import (
    ADAPTED,
    Adapted,
    Fold,
    Trained,
    measure_arm,
    run_experiment,
)
from minisupernet.course.studies.setups import (
    SETUPS,
    better,
    many_tasks,
    original,
    search,
    unseen_pairs,
)
from minisupernet.errors import SetupError
from minisupernet.fitting import Fit
from minisupernet.training import History


def short(setup, unfrozen=0):
    """The same setup with a few steps and a small generator."""
    training = dataclasses.replace(
        setup.training, steps=6, tasks=min(setup.training.tasks, 3), images=4, every=3
    )
    adaptation = dataclasses.replace(setup.adaptation, steps=3, images=4)
    z_dim = 20 if setup.faithful else 4
    rates, few_rates = (
        {arm: each[:1] for arm, each in every.items()}
        for every in (setup.rates, setup.few_rates)
    )
    return dataclasses.replace(
        setup,
        training=training,
        adaptation=adaptation,
        z_dim=z_dim,
        unfrozen=unfrozen,
        sizes=setup.sizes[:1],
        rates=rates,
        few_rates=few_rates,
    )


@pytest.fixture(scope="module")
def many_squares():
    from support import coloured_squares

    return coloured_squares(classes=20, train=54, test=3)


@pytest.mark.parametrize("experiment", [1, 2])
@pytest.mark.parametrize("make", [original, better])
def test_every_arm_is_measured_on_the_held_out_tasks(make, experiment, many_squares):
    run = run_experiment(
        short(make(experiment, "quick"), unfrozen=1),
        many_squares,
        seed=1,
        report=lambda line: None,
    )
    held = len(run["held_out"])
    assert set(run["arms"]) == {*ADAPTED, "no_adaptation", "other_z", "unfrozen"}
    for arm in (*ADAPTED, "no_adaptation"):
        assert len(run["arms"][arm]["test"]) == held
    assert len(run["arms"]["unfrozen"]["test"]) == 1
    assert len(run["trained"]["right_z"]) == len(run["trained"]["wrong_z"]) > held
    assert run["generator"]["sha256_before"] == run["generator"]["sha256_after"]
    assert run["data"]["name"] == "squares" and len(run["data"]["sha256"]) == 64
    assert (
        run["parameters"]["target"] == 37_165 and run["seed"] == 1 and run["fold"] == 1
    )
    json.dumps(run)


def test_unseen_pairs_are_trained_in_neither_orientation(many_squares):
    fold = Fold.of(short(unseen_pairs(2, "quick")), many_squares)
    tasks = fold.tasks
    met = {frozenset((tasks.positive[n], tasks.negative[n])) for n in fold.trained}
    asked = [frozenset((tasks.positive[n], tasks.negative[n])) for n in fold.held_out]
    assert not met & set(asked) and len(asked) == 2 * len(set(asked)) > 0
    with pytest.raises(SetupError, match="only experiment 2"):
        unseen_pairs(1)


@pytest.mark.parametrize(
    ("make", "experiment"), [(many_tasks, 1), (many_tasks, 2), (unseen_pairs, 2)]
)
def test_the_whole_ladder_the_few_images_and_the_geometry(
    make, experiment, many_squares
):
    run = run_experiment(
        short(make(experiment)), many_squares, report=lambda line: None
    )
    held = len(run["held_out"])
    fitted = {
        *ADAPTED,
        "last_layer",
        "biases",
        *(["one_network"] if experiment == 1 else []),
    }
    assert set(run["arms"]) == {*fitted, "no_adaptation", "other_z"}
    assert all(len(arm["test"]) == held for arm in run["arms"].values())
    assert set(run["few"]) == {"5"} and set(run["few"]["5"]) == {
        "z_only",
        "fine_tuned",
        "from_scratch",
    }
    assert run["tasks"]["trained"] > len(run["trained"]["right_z"])
    geometry = run["geometry"]
    assert set(geometry["accuracy_in_few_directions"]) == {"0", "1", "2", "4"}
    assert geometry["accuracy_in_few_directions"]["4"] == pytest.approx(
        sum(run["trained"]["right_z"]) / (len(run["trained"]["right_z"])), abs=2e-4
    )
    assert len(geometry["line"]["start"]) == len(geometry["line"]["end"]) == 11
    if experiment == 2:
        assert geometry["twins"] == pytest.approx(
            -1, abs=1e-4
        )  # class vectors mirror a reversed task
        assert ("mirrored_z" in geometry) == (make is many_tasks)
    json.dumps(run)


@pytest.mark.parametrize(
    "change",
    [
        {"one_hot": True, "many_tasks": False, "z_dim": 16, "hidden": ()},
        {"bound": 1.0, "z_share": 0.5},
        {"raw": True, "augmentation": {}},
        {"channels": 8},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_the_search_varies_reaches_the_run(change, many_squares):
    setup = dataclasses.replace(short(search(2)), **change)
    fold = Fold.of(setup, many_squares)
    assert fold.data([0]).batch(0, 0, 4)[1].max() > 200 or not setup.raw
    bound, channels = setup.bound, setup.channels
    assert fold.new_generator(0).bound == bound
    assert fold.target.convolutions[0].out_channels == channels
    run = run_experiment(setup, many_squares, report=lambda line: None)
    assert set(run["arms"]) == {"z_only", "no_adaptation", "other_z"} and set(
        run["few"]
    ) == {"20"}
    assert run["parameters"]["target"] == fold.spec.size


def test_task_vectors_decay_as_the_fit_says():
    z = torch.nn.Parameter(torch.ones(3))
    optimizer = Fit(1, z_rate=0.1, z_decay=0.5).make_optimizer([], [z])
    z.grad = torch.zeros(3)
    optimizer.step()
    torch.testing.assert_close(z.detach(), torch.full((3,), 0.95))


def test_few_images_are_the_first_of_each_class(many_squares):
    fold = Fold.of(short(many_tasks(2)), many_squares)
    few, every = fold.data(fold.held_out, 2), fold.data(fold.held_out)
    assert (few.splits["train"].counts <= 2).all() and (
        every.splits["train"].counts > 2
    ).any()
    assert torch.equal(
        few.splits["train"].members, every.splits["train"].members[:, :2]
    )
    assert torch.equal(
        few.splits["validation"].members, every.splits["validation"].members
    )


@pytest.mark.parametrize("name", SETUPS)
def test_a_setup_that_does_not_exist_is_refused(name):
    with pytest.raises(SetupError, match="no profile 'tiny'; use 'quick' or 'full'"):
        SETUPS[name](2, "tiny")
    with pytest.raises(SetupError, match="no experiment 3|only experiment 2"):
        SETUPS[name](3)


def test_a_run_repeats_itself(many_squares):
    setup = short(better(2, "quick"))
    first, again = (
        run_experiment(setup, many_squares, report=lambda line: None) for _ in range(2)
    )
    assert first["arms"] == again["arms"] and first["trained"] == again["trained"]


def test_an_interrupted_run_counts_the_seconds_before(many_squares, tmp_path):
    setup, path = short(better(1, "quick")), tmp_path / "run.safetensors"
    run = run_experiment(setup, many_squares, checkpoint=path, report=lambda line: None)
    with safe_open(path, "pt") as file:
        notes, tensors = (
            file.metadata(),
            {name: file.get_tensor(name) for name in file.keys()},
        )
    rows = json.loads(notes["history"])
    rows[-1]["seconds"] = 1_000.0
    save_file(tensors, path, {**notes, "history": json.dumps(rows)})
    again = run_experiment(
        setup, many_squares, checkpoint=path, report=lambda line: None
    )
    assert again["arms"] == run["arms"] and run["seconds"] < 500
    assert again["seconds"] >= again["generator"]["seconds"] >= 1_000


def test_the_rate_is_chosen_on_validation_images(many_squares, monkeypatch):
    """The best validation rate counts even where another is better on test images."""
    scores = {
        ("validation", 3e-2): 0.6,
        ("validation", 1e-1): 0.8,
        ("validation", 3e-1): 0.7,
    }
    scores |= {("test", 3e-2): 0.9, ("test", 1e-1): 0.5, ("test", 3e-1): 0.6}
    fold = Fold.of(short(better(2)), many_squares)
    object.__setattr__(fold.setup, "rates", better(2).rates)
    made = Trained(fold, fold.new_generator(0), torch.zeros(1, 4), None, History())
    monkeypatch.setattr(
        experiments, "adapt", lambda made, arm, rate, data: Adapted(rate)
    )
    monkeypatch.setattr(
        experiments,
        "accuracy",
        lambda t, rate, d, split="test": torch.tensor([scores[split, rate]]),
    )
    best, adapted = measure_arm(made, "z_only", lambda line: None)
    assert adapted.weights == 1e-1
    assert best["rate"] == 1e-1 and best["test"] == [0.5]


def test_the_original_is_set_up_as_its_code():
    setup = original(1)
    assert (
        setup.training.steps == 50_000
        and setup.training.images == 20
        and setup.training.tasks == 1
    )
    assert (
        setup.training.rate == 1e-4
        and setup.training.optimizer == "tensorflow-rmsprop"
        and not setup.training.cycle
    )
    assert (
        setup.adaptation.steps == 1_000
        and setup.faithful
        and not setup.augmentation
        and setup.z_dim == 100
    )


def test_the_original_sees_raw_pixels_and_a_linear_head(many_squares):
    fold = Fold.of(short(original(1, "quick")), many_squares)
    assert (
        fold.target.head_slope == 1.0
        and fold.new_generator(0).bound == 1.0
        and not fold.new_generator(0).trunk
    )
    assert fold.data([0]).batch(0, 0, 4)[1].max() > 200
    assert (
        Fold.of(short(better(1, "quick")), many_squares)
        .data([0])
        .batch(0, 0, 4)[1]
        .abs()
        .max()
        < 10
    )


def test_two_equal_copies_of_z_move_as_one_at_twice_the_rate():
    """The original's new z is W_z + b_z; RMSProp moves both by the same step."""
    start = torch.randn(5)
    copies, single = (
        [torch.nn.Parameter(start / 2) for _ in range(2)],
        torch.nn.Parameter(start.clone()),
    )
    goal = torch.randn(5)
    fit = Fit(1, optimizer="tensorflow-rmsprop")
    two = dataclasses.replace(fit, z_rate=1e-2).make_optimizer([], copies)
    one = dataclasses.replace(fit, z_rate=2e-2).make_optimizer([], [single])
    for _ in range(20):
        for optimizer, z in ((two, copies[0] + copies[1]), (one, single)):
            optimizer.zero_grad()
            (z - goal).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(copies[0] + copies[1], single)


def test_the_wrong_generator_is_a_fresh_one(many_squares):
    fold = Fold.of(short(better(1, "quick")), many_squares)
    start = fingerprint(fold.new_generator(0))
    assert start == fingerprint(fold.new_generator(0))
    assert start != fingerprint(fold.new_generator(1_000))
    assert fingerprint(fold.train().generator) != start
