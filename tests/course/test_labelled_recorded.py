"""What chapters 9 and 10 say of the recorded looks holds on every recorded fold."""

from statistics import fmean

import pytest

from minisupernet.course.records import load_runs, results_file
from minisupernet.course.report.labelled import read_looks
from minisupernet.course.report.opponents import lead, reached
from minisupernet.course.statistics import verdict

RUNS = load_runs(results_file("09_labelled.json"))
OPPONENTS = load_runs(results_file("07_opponents.json"))
LOOKS = [run for run in RUNS if run["group"] == "look" and run["of_experiment"] == 2]
each_fold = pytest.mark.parametrize("run", LOOKS, ids=lambda run: f"fold {run['fold']}")


def mean(run: dict, size: int, arm: str) -> float:
    return fmean(run["few"][str(size)][arm]["test"])


def beside(run: dict, group: str) -> dict:
    (found,) = (
        each
        for each in OPPONENTS
        if each["group"] == group
        and (each["of_experiment"], each["fold"], each["channels"])
        == (2, run["fold"], 16)
        and each["steps"] == 2_000
    )
    return found


def test_looks_are_recorded_by_one_set_up_and_through_a_generator_that_did_not_move():
    assert LOOKS and len({run["fold"] for run in LOOKS}) == len(LOOKS)
    assert {run["profile"] for run in RUNS} == {"full"}
    assert {(run["channels"], run["steps"]) for run in RUNS} == {(16, 2_000)}
    for run in LOOKS:
        assert run["generator"]["sha256_before"] == run["generator"]["sha256_after"]
        assert run["settings"] == LOOKS[0]["settings"]
        assert run["data"]["sha256"] == beside(run, "heads")["data"]["sha256"]
        assert run["held_out"] == beside(run, "heads")["held_out"]


@each_fold
def test_the_look_is_used(run):
    """Above chance; at chance by shuffled labels, and no better by others' images."""
    for size in (1, 5, 10, 20, 50):
        assert abs(mean(run, size, "shuffled") - 0.5) < 0.05
        assert mean(run, size, "other_task") < 0.53
        assert mean(run, size, "look") > mean(run, size, "shuffled") + 0.1
    for size in (5, 10, 20, 50):
        assert mean(run, size, "look") > 0.7


@each_fold
def test_what_is_ahead_of_the_look(run):
    heads = beside(run, "heads")
    for size in (5, 20):
        assert mean(heads, size, "head") > mean(run, size, "look")
        assert mean(heads, size, "nearest_mean") > mean(run, size, "look")


def test_protonet_is_ahead_on_every_fold():
    """By intervals that leave out 0 at 10 and at 50 examples, as the chapter says."""
    runs = read_looks()
    for size in (1, 5, 10, 20, 50):
        looks, others = (reached(runs, 2, arm, size) for arm in ("look", "protonet"))
        assert others.keys() == looks.keys()
        assert all(others[unit] > looks[unit] for unit in looks)
        found = lead(runs, 2, "look", "protonet", size)
        lower = "lower" if size in (10, 50) else "not told apart"
        assert verdict(found) == lower


def test_the_verdict_on_a_head_is_the_one_that_is_stated():
    runs = read_looks()
    found = {size: lead(runs, 2, "look", "head", size) for size in (5, 20)}
    assert found[5].n == found[20].n == len(LOOKS)
    assert verdict(found[20]) == "lower" and verdict(found[5]) == "not told apart"


@each_fold
def test_what_the_network_adds_to_the_vectors_and_the_start_to_a_fit(run):
    for size in (1, 5, 10, 20, 50):
        added = mean(run, size, "look") - mean(run, size, "nearest_vector")
        assert -0.02 < added < 0.06
    start = mean(run, 5, "look_fitted") - mean(run, 5, "z_only")
    assert abs(start) < 0.02


@each_fold
def test_chapter_7_s_generator_ends_at_about_half_the_loss(run):
    ours = run["training"]["history"][-1]["loss"]
    theirs = beside(run, "prior")["history"][-1]["loss"]
    assert 0.4 < theirs / ours < 0.6
