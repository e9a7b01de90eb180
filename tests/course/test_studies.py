"""Studies: a run, or a unit of one, says where it comes from, and what does not exist
is refused."""

import sys
from types import ModuleType

import pytest

from minisupernet.course import studies
from minisupernet.course.records import load_runs, record_run
from minisupernet.course.studies import STUDIES, Study, measure_study
from minisupernet.errors import StudyError


@pytest.fixture
def fake_study(monkeypatch, squares):
    """A study in units that measures only what it was given, on images drawn at
    once."""
    module = ModuleType("minisupernet.course.studies.tiny")
    module.measure = lambda images, seed, profile, report, checkpoint, arm: {
        "images": images.name,
        "value": 10 * seed,
        "arm": arm,
    }
    monkeypatch.setattr(studies, "load", lambda name, device: squares)
    monkeypatch.setitem(STUDIES, "tiny", Study("tiny.json", unit={"arm": "a"}))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_a_unit_is_recorded_with_its_origin_and_replaced_by_a_newer_one(
    fake_study, tmp_path
):
    out, keys = tmp_path / "runs.json", ("profile", "seed", "arm")
    for seed, unit in ((1, {}), (0, {"arm": "b"}), (1, {})):
        run = measure_study("tiny", seed, "quick", "shapes100", "cpu", **unit)
        record_run(out, run, keys)
    runs = load_runs(out)
    assert [(run["seed"], run["arm"], run["value"]) for run in runs] == [
        (0, "b", 0),
        (1, "a", 10),
    ]
    for run in runs:
        assert run["data"]["name"] == run["images"] == "squares"
        assert run["seconds"] >= 0 and run["versions"]["torch"]
        assert run["device"].startswith("cpu")


@pytest.mark.parametrize(
    ("name", "profile", "said"),
    [
        ("net3net", "full", "choose one of net2net"),
        ("net2net", "fast", "'quick' or 'full'"),
    ],
)
def test_what_does_not_exist_is_refused(name, profile, said):
    with pytest.raises(StudyError, match=said):
        measure_study(name, profile=profile)


def test_every_study_can_be_measured():
    for name in STUDIES:
        module = __import__(f"minisupernet.course.studies.{name}", fromlist=["measure"])
        assert callable(module.measure)
