"""Result files, intervals and fingerprints."""

import json
import threading

import pytest
import torch
from torch import nn

from minisupernet.course.records import fingerprint, load_runs, record_run
from minisupernet.course.statistics import interval, paired
from minisupernet.errors import FileError, ResultError
from minisupernet.files import whole_file


def test_an_interval_covers_the_truth_about_95_times_in_100():
    random = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(300):
        found = interval((0.8 + 0.05 * torch.randn(20, generator=random)).tolist())
        hits += found.low <= 0.8 <= found.high
    assert 0.88 < hits / 300 < 0.98


def test_an_interval_says_what_it_is():
    found = interval([0.7, 0.8, 0.9])
    assert (
        found.mean == pytest.approx(0.8)
        and found.n == 3
        and found.low < 0.8 < found.high
    )
    assert found == interval([0.7, 0.8, 0.9])
    assert interval([0.5, 0.5]).percent() == "50.0 (50.0 to 50.0)"


def test_a_paired_difference_is_narrower_than_two_intervals():
    tasks = [0.6, 0.7, 0.8, 0.9, 0.75]
    better = [value + 0.03 + 0.002 * n for n, value in enumerate(tasks)]
    difference = paired(better, tasks)
    assert (
        difference.low > 0
        and difference.high - difference.low
        < interval(tasks).high - interval(tasks).low
    )


@pytest.mark.parametrize("values", [[], [0.5], [0.5, float("nan")]])
def test_no_interval_without_values(values):
    with pytest.raises(ResultError, match="at least two finite values"):
        interval(values)
    with pytest.raises(ResultError, match="the same tasks on both sides, got 3 and 2"):
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
