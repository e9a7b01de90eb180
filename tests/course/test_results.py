"""Result files, intervals and fingerprints."""

import json
import threading

import numpy as np
import pytest
import torch
from torch import nn

from minisupernet.course.records import fingerprint, load_runs, record_run
from minisupernet.course.statistics import interval, paired, student, verdict
from minisupernet.errors import FileError, ResultError
from minisupernet.files import whole_file


@pytest.mark.parametrize("n", [3, 4, 6, 10])
def test_a_verdict_is_wrong_one_time_in_twenty(n):
    """Drawn without a difference, it says "higher" or "lower" as often as it may."""
    random = np.random.default_rng(n)
    drawn = 0.03 * random.standard_normal((4_000, n))
    wrong = sum(verdict(interval(values)) != "not told apart" for values in drawn)
    assert 0.04 < wrong / len(drawn) < 0.06


@pytest.mark.parametrize("n", [3, 5, 20])
def test_an_interval_holds_the_truth_95_times_in_100(n):
    random = np.random.default_rng(n)
    drawn = 0.8 + 0.05 * random.standard_normal((2_000, n))
    hits = sum(found.low <= 0.8 <= found.high for found in map(interval, drawn))
    assert 0.935 < hits / len(drawn) < 0.965


@pytest.mark.parametrize(
    ("freedom", "known"),  # from printed tables
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (120, 1.980)],
)
def test_students_t_is_that_of_the_tables(freedom, known):
    assert student(freedom) == pytest.approx(known, abs=5e-4)


def test_an_interval_says_what_it_is():
    found = interval([0.7, 0.8, 0.9])
    half = 4.302653 * 0.1 / 3**0.5
    assert (found.low, found.high) == pytest.approx((0.8 - half, 0.8 + half))
    assert found.mean == pytest.approx(0.8) and found.n == 3
    assert interval([0.5, 0.5, 0.5]).percent() == "50.0 (50.0 to 50.0)"


def test_two_units_have_no_interval_and_no_verdict():
    found = interval([-0.071, -0.071])
    assert found.percent() == "-7.1 (n = 2: no interval)"
    assert verdict(found) == "no verdict" and found.low < 0 < found.high
    assert interval([0.4]).percent() == "40.0 (n = 1: no interval)"


def test_a_verdict_says_which_is_higher():
    assert verdict(interval([0.02, 0.03, 0.04])) == "higher"
    assert verdict(interval([-0.02, -0.03, -0.04])) == "lower"
    assert verdict(interval([-0.02, 0.01, 0.04])) == "not told apart"


def test_a_paired_difference_is_narrower_than_two_intervals():
    units = [0.6, 0.7, 0.8, 0.9, 0.75]
    better = [value + 0.03 + 0.002 * n for n, value in enumerate(units)]
    found, alone = paired(better, units), interval(units)
    assert found.low > 0 and found.high - found.low < alone.high - alone.low


@pytest.mark.parametrize("values", [[], [0.5, float("nan")], [float("inf")]])
def test_no_interval_without_values(values):
    with pytest.raises(ResultError, match="an interval needs finite values, got"):
        interval(values)
    with pytest.raises(ResultError, match="the same units on both sides, got 3 and 2"):
        paired([1, 2, 3], [1, 2])


def test_a_run_replaces_its_older_self(tmp_path):
    path = tmp_path / "results" / "one.json"
    for value, seed in ((1, 0), (2, 1), (3, 0)):
        record_run(
            path, {"setup": "s", "seed": seed, "value": value}, keys=("setup", "seed")
        )
    assert [(run["seed"], run["value"]) for run in load_runs(path)] == [(0, 3), (1, 2)]


def test_runs_recorded_side_by_side_are_all_kept(tmp_path):
    path = tmp_path / "one.json"
    threads = [
        threading.Thread(target=record_run, args=(path, {"seed": n}, ("seed",)))
        for n in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(run["seed"] for run in load_runs(path)) == list(range(12))


@pytest.mark.parametrize("text", ["{", "[]", '{"runs": 3}', '{"runs": [1]}', "\udcff"])
def test_a_damaged_result_file_is_named(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(
        ResultError, match="broken.json .*; restore it or record it anew"
    ):
        load_runs(path)
    with pytest.raises(
        ResultError, match="record it with `python -m minisupernet sweep"
    ):
        load_runs(tmp_path / "missing.json")


def test_a_result_that_cannot_be_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "one.json"
    record_run(path, {"seed": 0}, ("seed",))
    with pytest.raises(TypeError):
        record_run(path, {"seed": 1, "value": object()}, ("seed",))
    assert load_runs(path) == [{"seed": 0}] and json.loads(path.read_text())
    assert not list(tmp_path.glob("*.part"))


def test_a_whole_file_or_none(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with whole_file(path) as part:
        part.write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as part:
        part.write_text("half of the new")
        _ = 1 / 0
    assert path.read_text() == "old" and [f.name for f in path.parent.iterdir()] == [
        "file.txt"
    ]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(
            FileError, match=r"cannot write .*; free space or choose another place"
        ),
        whole_file(tmp_path / "file" / "x"),
    ):
        pass


def test_a_fingerprint_sees_one_bit():
    model = nn.Linear(3, 2)
    before = fingerprint(model)
    with torch.no_grad():
        model.weight[0, 0] = torch.nextafter(model.weight[0, 0], torch.tensor(9.0))
    assert fingerprint(model) != before
