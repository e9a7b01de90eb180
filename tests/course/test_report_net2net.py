"""Chapter 2's tables and pictures, and the numbers in its prose and in chapter 1's,
each read from where it comes from."""

import json
import re
from itertools import pairwise

import matplotlib.pyplot as plt
import pytest
import torch
from support import ROOT

from minisupernet.course.records import load_runs, results_file, unit_means
from minisupernet.course.report import net2net as report
from minisupernet.course.statistics import interval, paired, student


@pytest.fixture(scope="module")
def runs() -> list[dict]:
    return load_runs(results_file("02_net2net.json"))


def rows(table) -> list[list[str]]:
    lines = table.data.splitlines()[2:]
    return [line.strip("| ").split(" | ") for line in lines]


def prose(chapter: str) -> str:
    notebook = json.loads((ROOT / "notebooks" / f"{chapter}.ipynb").read_text())
    cells = (c["source"] for c in notebook["cells"] if c["cell_type"] == "markdown")
    return re.sub(r"\s+", " ", " ".join("".join(cell) for cell in cells))


def test_the_refresher_states_student_s_factors():
    said = re.search(
        r"is (\S+) for three values, (\S+) for five, (\S+) for eight, and comes down to"
        r" (\S+) for very many",
        prose("01_cifar_data"),
    )
    wanted = [student(freedom) for freedom in (2, 4, 7, 10_000)]
    assert [float(each) for each in said.groups()] == [round(t, 2) for t in wanted]


def test_the_recorded_baseline_rises_with_the_images():
    recorded = load_runs(results_file("07_experiment_2.json"))
    means = [
        interval(unit_means(recorded, "unseen_pairs", "from_scratch", size).values())
        for size in (5, 20, 100, None)
    ]
    assert all(few.mean < many.mean for few, many in pairwise(means))
    assert means[0].high < means[-1].low


def test_a_row_that_repeats_the_one_above_says_so(runs):
    found = rows(report.accuracy_table(runs))
    assert len(found) == 14 and all("to" in row[2] for row in found)
    for above, row in pairwise(found):
        assert (above[2:] == row[2:]) == row[1].endswith("(the row above)")
    assert sum("above" in row[1] for row in found) == 2


def test_a_row_of_differences_is_what_the_seeds_say(runs):
    found = rows(report.differences_table(runs))
    (row,) = (r for r in found if r[:2] == ["wider", "from scratch − random"])
    scratch, random = (
        report.final_accuracy(runs, "wider", arm) for arm in ("scratch", "random")
    )
    assert row[2] == paired(scratch, random).percent() and row[3] == "not told apart"
    assert round(100 * paired(scratch, random).mean) == 4  # "by four points"
    assert len(found) == 15 and "fifteen comparisons" in prose("02_net2net")


def test_computation_counts_from_growth_and_the_early_rate_never_helps(runs):
    reached = {tuple(row[:2]): row[2:] for row in rows(report.computation_table(runs))}
    assert reached["to 20 layers", "Net2Net"] == ["–, –, –", "21, 18, 52"]
    students = [row for (phase, arm), row in reached.items() if arm != "from scratch"]
    wider = [row for (phase, _), row in reached.items() if phase == "wider"]
    assert len(students) == 8 and [row[1] for row in wider[:-1]] == ["–, –, –"] * 4
    verdicts = {row[-1] for row in rows(report.schedules_table(runs))}
    assert verdicts == {"lower", "not told apart"}
    assert set(report.chosen_schedules(runs)) == {"late"}


def test_the_fall_before_the_third_insertion_is_as_told(runs):
    """Two of three curves fall by more than ten points and are back; no insertion moves
    an accuracy; every curve rises where the rate falls."""
    grown = [run["phases"]["deeper_20"]["net2net"]["late"]["curve"] for run in runs]
    falls = []
    for curve in grown:
        at = {row["step"]: row["test"] for row in curve}
        steps = sorted(at)
        third = steps[steps.index(700) + 2]
        before, after = at[steps[steps.index(700) + 1]], at[steps[steps.index(700) + 3]]
        falls.append(min(before, after) - at[third] > 0.1)
        pairs = [pair for pair in pairwise(curve) if pair[0]["step"] == pair[1]["step"]]
        assert len(pairs) >= 4
        assert all(old["test"] == new["test"] for old, new in pairs)
    assert sum(falls) == 2
    for run in runs:
        cool = run["settings"]["first"] + run["settings"]["second"]
        cool -= run["settings"]["cool"]
        for arms in run["phases"].values():
            for found in arms.values():
                curve = found["late"]["curve"]
                full_rate = [row for row in curve if row["step"] <= cool]
                assert curve[-1]["test"] > full_rate[-1]["test"]
        teacher = run["phases"]["deeper_20"]["teacher"]["late"]["curve"]
        assert any(later["test"] < row["test"] for row, later in pairwise(teacher))


def test_the_picture_shows_every_number_of_the_four_matrices(runs):
    maker, reader = torch.arange(6.0).view(3, 2), torch.ones(2, 3)
    source = torch.tensor([0, 1, 2, 2])
    figure = report.matrices(maker, reader, source, 1 / source.bincount()[source])
    shown = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert [len(each) for each in shown] == [6, 8, 6, 8]
    assert shown[1][4:] == ["4.0", "5.0", "4.0", "5.0"]  # unit 2 and its copy
    assert shown[3] == ["1.0", "1.0", "0.5", "0.5"] * 2
    curves = report.recorded_curves(load_runs(results_file("02_net2net.json")))
    assert [len(axes.lines) for axes in curves.axes] == [24, 16, 16]
    plt.close("all")
