"""The command that measures a study and records it: one run a profile and seed, with
where it comes from.
"""

import sys
from types import ModuleType

import pytest

from minisupernet.course.commands import main
from minisupernet.course.records import load_runs
from minisupernet.course.studies import STUDIES, record_study
from minisupernet.errors import StudyError


@pytest.fixture
def fake_study(monkeypatch, squares):
    """A study that measures only what it was given, in the place of net2net's, on
    images drawn at once.
    """
    module = ModuleType("minisupernet.course.studies.net2net")
    module.measure = lambda images, seed, profile, report: {
        "images": images.name,
        "value": 10 * seed,
    }
    monkeypatch.setattr("minisupernet.studies.load", lambda name, device: squares)
    monkeypatch.setitem(sys.modules, "minisupernet.course.studies.net2net", module)


def test_a_run_is_recorded_with_its_origin_and_replaced_by_a_newer_one(
    fake_study, tmp_path
):
    out = tmp_path / "runs.json"
    for seed in (1, 0, 1):
        assert record_study("net2net", seed, "quick", "shapes100", "cpu", out) == out
    record_study("net2net", 1, "full", "shapes100", "cpu", out)
    runs = load_runs(out)
    assert [(run["profile"], run["seed"], run["value"]) for run in runs] == [
        ("full", 1, 10),
        ("quick", 0, 0),
        ("quick", 1, 10),
    ]
    for run in runs:
        assert run["data"]["name"] == run["images"] == "squares"
        assert (
            run["seconds"] >= 0
            and run["versions"]["torch"]
            and run["device"].startswith("cpu")
        )


def test_the_command_takes_several_seeds(fake_study, tmp_path, capsys):
    out = tmp_path / "runs.json"
    options = [
        "--profile",
        "quick",
        "--data",
        "shapes100",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    assert main(["study", "net2net", "--seeds", "3", "4", *options]) == 0
    assert [run["seed"] for run in load_runs(out)] == [3, 4]
    assert "net2net, seed 4: recorded in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "profile", "said"),
    [
        ("net3net", "full", "choose one of net2net"),
        ("net2net", "fast", "'quick' or 'full'"),
    ],
)
def test_what_does_not_exist_is_refused(name, profile, said):
    with pytest.raises(StudyError, match=said):
        record_study(name, profile=profile)


def test_every_study_can_be_measured():
    for name in STUDIES:
        module = __import__(f"minisupernet.course.studies.{name}", fromlist=["measure"])
        assert callable(module.measure)
