"""The recorded results: complete, on the real images, and still saying what the chapters say of them."""

from pathlib import Path

import pytest

from minisupernet.report import compare, verdict
from minisupernet.results import interval, load_runs, results_file, task_means

FILES = {1: "06_experiment_1.json", 2: "07_experiment_2.json"}
CIFAR100 = "7c4367d59714"  # how the checksum of the real images begins
FITTED = ("z_only", "random_generator", "from_scratch", "fine_tuned")

# What the "What holds" sections of chapters 6 and 7 state: (experiment, set-up, first arm, second arm) and the verdict
# on first minus second. When a number changes, this list and the chapter's sentence change together.
STATED = {
    (1, "original", "z_only", "from_scratch"): "lower",
    (1, "original", "z_only", "fine_tuned"): "lower",
    (1, "original", "z_only", "random_generator"): "not told apart",
    (1, "original", "unfrozen", "z_only"): "higher",
    (1, "better", "z_only", "from_scratch"): "higher",
    (1, "better", "z_only", "random_generator"): "higher",
    (1, "better", "z_only", "no_adaptation"): "higher",
    (1, "better", "z_only", "fine_tuned"): "lower",
    (2, "original", "right_z", "wrong_z"): "higher",
    (2, "original", "z_only", "no_adaptation"): "higher",
    (2, "original", "z_only", "random_generator"): "higher",
    (2, "original", "z_only", "from_scratch"): "lower",
    (2, "better", "right_z", "wrong_z"): "higher",
    (2, "better", "z_only", "no_adaptation"): "higher",
    (2, "better", "z_only", "random_generator"): "higher",
    (2, "better", "z_only", "from_scratch"): "lower",
    (2, "better", "z_only", "fine_tuned"): "lower",
}


def recorded(experiment: int) -> list[dict]:
    return load_runs(results_file(FILES[experiment]))


@pytest.mark.parametrize("setup", ["original", "better"])
@pytest.mark.parametrize("experiment", [1, 2])
def test_enough_seeds_and_held_out_tasks(experiment, setup):
    runs = [run for run in recorded(experiment) if run["setup"] == setup]
    assert len({run["seed"] for run in runs}) >= 3
    assert len(task_means(runs, setup, "z_only")) >= 10


def test_the_better_generator_held_out_every_task_of_experiment_1():
    assert sorted(task_means(recorded(1), "better", "z_only")) == list(range(99))


@pytest.mark.parametrize("experiment", [1, 2])
def test_every_run_says_where_it_comes_from(experiment):
    for run in recorded(experiment):
        assert run["data"]["name"] == "cifar100" and run["data"]["sha256"].startswith(CIFAR100)
        assert len(run["commit"]) == 40 and run["versions"]["torch"] and run["device"] and run["seconds"] > 0
        assert run["settings"]["name"] == run["setup"] and run["experiment"] == experiment


@pytest.mark.parametrize("experiment", [1, 2])
def test_no_generator_moved_and_no_arm_got_more_than_another(experiment):
    for run in recorded(experiment):
        assert run["generator"]["sha256_before"] == run["generator"]["sha256_after"]
        assert all(len(run["arms"][arm]["test"]) == len(run["held_out"]) for arm in FITTED)
        tried = {arm: len(run["arms"][arm]["tried"]) for arm in FITTED}
        assert len(set(tried.values())) == 1, f"learning rates tried: {tried}"
        for arm in FITTED:
            best = max(run["arms"][arm]["tried"], key=lambda each: each["validation"])
            assert run["arms"][arm]["rate"] == best["rate"]


@pytest.mark.parametrize("experiment", [1, 2])
def test_the_original_ran_to_its_full_length(experiment):
    for run in recorded(experiment):
        if run["setup"] == "original":
            training = run["settings"]["training"]
            assert (training["steps"], training["tasks"], training["images"]) == (50_000, 1, 20)
            assert run["history"][-1]["step"] == 50_000


@pytest.mark.parametrize(("experiment", "setup", "first", "second"), STATED)
def test_the_chapters_say_what_the_numbers_say(experiment, setup, first, second):
    found = compare(recorded(experiment), setup, first, second)
    assert verdict(found) == STATED[experiment, setup, first, second], found


def test_the_sizes_that_the_chapters_speak_of():
    """Words beside the verdicts: "four images of five", "a few points", "far behind", "a point or two", "small"."""
    one, two = recorded(1), recorded(2)
    assert 0.78 < interval(list(task_means(one, "better", "no_adaptation").values())).mean < 0.83
    for found in (compare(one, "better", "z_only", "no_adaptation"), compare(two, "better", "from_scratch", "z_only")):
        assert 0.02 < found.mean < 0.07
    assert compare(one, "better", "z_only", "random_generator").low > 0.10
    assert compare(one, "better", "fine_tuned", "z_only").mean < 0.02
    assert compare(two, "original", "z_only", "random_generator").mean < 0.05
    gaps = [compare(two, setup, "from_scratch", "z_only").mean for setup in ("original", "better")]
    assert gaps[1] < gaps[0] and compare(two, "better", "fine_tuned", "z_only").mean > gaps[1]


def test_no_recorded_path_or_user_name():
    for name in FILES.values():
        text = Path(results_file(name)).read_text()
        assert "/home/" not in text and "/tmp/" not in text and "/root" not in text and "\\\\" not in text
