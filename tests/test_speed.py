"""The speed record: complete, honest, and the one that README and the book show."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("speed_report", ROOT / "benchmarks" / "speed_report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["README.md", "book/speed.md"])
def test_the_table_is_that_of_the_record(report, page):
    assert report.table(report.read("05_speed.json")) in (ROOT / page).read_text(encoding="utf-8")


def test_every_contestant_was_checked_and_timed(report):
    record = report.read("05_speed.json")
    assert record["largest_difference_in_float64"] <= 1e-10
    for row in record["rows"]:
        assert row["largest_relative_difference"] <= 1e-5
        for clock in ("wall", "cpu"):
            assert set(row["milliseconds"][clock]) == set(report.NAMES)


def test_ratios_follow_from_the_times(report):
    for row in report.read("05_speed.json")["rows"]:
        steps = {name: parts["step"] for name, parts in row["milliseconds"]["wall"].items()}
        mine = steps.pop("minisupernet")
        assert row["times_faster_than_loop"]["wall"] == pytest.approx(steps["plain loop"] / mine, abs=0.006)
        assert row["times_faster_than_best_peer"]["wall"] == pytest.approx(min(steps.values()) / mine, abs=0.006)


def test_a_table_is_put_between_its_marks_and_nowhere_else(report):
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.with_table(page, "new") == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
