"""Chapter 10's tables and figures are drawn from the records by unit, and its sentences
say what they say."""

import json
import re

import pytest
from support import ROOT

from minisupernet.course.report import side_by_side
from minisupernet.course.report.opponents import lead, reached
from minisupernet.course.report.side_by_side import (
    ON_PAIRS,
    Comparison,
    comparisons,
    comparisons_figure,
    comparisons_table,
    heads_table,
    same_pairs,
)
from minisupernet.course.statistics import Interval, difference, interval, verdict
from minisupernet.supernet import SuperNet
from minisupernet.target import TaskClassifier, WeightSpec

NUMBER = re.compile(r"\d+\.\d")
SUPERNET, HEAD = "SuperNet, z fitted", "a head on one shared network"
NEAREST = "the nearer class mean on that network"
PUDNET, ONE = "PudNet, one look", "the nearer class mean on PudNet's control"


@pytest.fixture(scope="module")
def records():
    return side_by_side.read_records()


@pytest.fixture(scope="module")
def chapter() -> str:
    document = json.loads((ROOT / "notebooks/10_results.ipynb").read_text("utf-8"))
    cells = [each for each in document["cells"] if each["cell_type"] == "markdown"]
    return " ".join(" ".join("".join(each["source"]) for each in cells).split())


def test_a_line_is_a_mean_with_its_interval_over_units():
    rows = [
        Comparison("a", "b", (0.01, 0.02, 0.03)),
        Comparison("a", "c", (0.02,)),
    ]
    lines = comparisons_table(rows).data.splitlines()[2:]
    assert lines == [
        "| a | b | 2.0 (-0.5 to 4.5) | 3 | not told apart |",
        "| a | c | 2.0 (n = 1: no interval) | 1 | no verdict |",
    ]
    (axes,) = comparisons_figure(rows).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["a − b", "a − c"]
    bars = [line for line in axes.lines if line.get_linewidth() == 3]
    assert [round(x, 1) for x in bars[0].get_xdata()] == [-0.5, 4.5] and len(bars) == 1


def test_every_system_is_held_against_its_controls(records):
    found = comparisons(records)
    systems = {row.system.split(",")[0] for row in found}
    statics = {"static WRN-16-1", "static WRN-40-1"}
    others = {"Net2Net", "HyperLSTM", "z", "PudNet", "one look"}
    assert systems == statics | others
    assert all(row.values for row in found)
    heads = [row for row in found if row.control == "a head on one network"]
    looks = len([run for run in records["labelled"] if run["group"] == "look"])
    assert [row.found.n for row in heads] == [5, 5, looks]


def z_less(records: dict, experiment: int, arm: str, size: int | None) -> Interval:
    return lead(records["opponents"], experiment, "z_recorded", arm, size)


@pytest.mark.parametrize(
    ("experiment", "size", "said", "stated"),
    [
        (1, 5, "by 7.4 points with 5 images of a class", "higher"),
        (1, 20, "by 3.3 with 20", "higher"),
        (1, None, "trails by 1.4 with all 450", "lower"),
        (2, 5, "by 4.1 points with 5", "lower"),
        (2, 20, "by 3.7 with 20", "lower"),
        (2, None, "by 2.8 with 450", "lower"),
    ],
)
def test_what_chapter_10_says_of_a_head(
    experiment, size, said, stated, records, chapter
):
    found = z_less(records, experiment, "head", size)
    assert said in chapter and verdict(found) == stated and found.n == 5
    assert NUMBER.findall(said) == [f"{100 * abs(found.mean):.1f}"]


def test_where_chapter_10_calls_z_and_a_head_level(records, chapter):
    assert "It is level with 50 and 100" in chapter
    for size in (50, 100):
        assert verdict(z_less(records, 1, "head", size)) == "not told apart"
    for size in (5, 10, 20, 50, 100, None):
        assert verdict(z_less(records, 2, "head", size)) == "lower"
        assert verdict(z_less(records, 2, "head_32", size)) == "lower"
    few = [verdict(z_less(records, 1, "head_32", size)) for size in (5, 10, 20, 50)]
    assert few == ["higher"] * 4
    assert verdict(z_less(records, 1, "head_32", None)) == "not told apart"
    rows = heads_table(records).data.splitlines()[2:]
    sizes = [row.split(" | ")[0].strip("| ") for row in rows]
    assert sizes == ["5", "10", "20", "50", "100", "450"]


def test_what_chapter_10_says_of_the_lead_where_one_class_is_known(records, chapter):
    nothing = interval(reached(records["opponents"], 1, "no_adaptation").values())
    assert f"nothing fitted, reaches {100 * nothing.mean:.1f} %" in chapter
    assert "With 5 images a fitted z is not told apart from it" in chapter
    assert verdict(z_less(records, 1, "no_adaptation", 5)) == "not told apart"


def test_what_chapter_10_says_of_the_static_network(records, chapter):
    """The sign turns with the budget, and one seed allows no verdict."""
    said = (
        "behind a smaller ordinary one by 4.7 points after 5 epochs, and ahead of it by"
        " 0.9 after 40; that is one seed, and no verdict"
    )
    assert said in chapter
    found = {
        row.system: row.found
        for row in comparisons(records)
        if row.control == "a smaller one, directly"
    }
    short, long, other = (
        found[f"static WRN-{name} epochs"]
        for name in ("40-1, 5", "40-1, 40", "16-1, 7")
    )
    assert [f"{100 * abs(each.mean):.1f}" for each in (short, long)] == ["4.7", "0.9"]
    assert short.mean < 0 < long.mean and short.n == long.n == 1
    assert "After 7 epochs another, in three seeds, was behind by 3.0" in chapter
    assert f"{-100 * other.mean:.1f}" == "3.0" and verdict(other) == "lower"
    settings = records["static"][0]["settings"]
    epochs = settings["steps"] * settings["batch"] / (30_000 - settings["validation"])
    assert round(epochs) == 7


@pytest.mark.parametrize(
    ("system", "control", "stated"),
    [
        ("Net2Net, wider", "random units", "lower"),
        ("Net2Net, to 20 layers", "random layers", "higher"),
        ("Net2Net, to 20 layers", "from scratch", "higher"),
        ("HyperLSTM, images by rows", "an LSTM", "higher"),
        ("HyperLSTM, images by rows", "an LSTM, layer norm", "lower"),
        ("z, experiment 1, better", "from scratch, 300 steps", "higher"),
        ("z, experiment 2, better", "from scratch, 300 steps", "lower"),
        ("z, experiment 1, many tasks", "from scratch, 300 steps", "higher"),
        ("z, experiment 2, many tasks", "from scratch, 300 steps", "higher"),
        ("z, experiment 1, many tasks", "a head on one network", "lower"),
        ("z, experiment 2, many tasks", "a head on one network", "lower"),
        ("PudNet, unseen classes", "one network", "not told apart"),
        ("PudNet, CIFAR-10", "one network", "not told apart"),
    ],
)
def test_what_chapter_10_says_of_each_system(system, control, stated, records):
    (row,) = (
        row
        for row in comparisons(records)
        if (row.system, row.control) == (system, control)
    )
    assert verdict(row.found) == stated


def test_the_same_pairs_are_unseen_by_all(records):
    arms = same_pairs(records)
    units = [set(means) for means in arms.values()]
    assert all(each == units[0] == {(0, 0), (1, 1), (2, 2)} for each in units)
    heads = [run for run in records["opponents"] if run["group"] == "heads"]
    held_out = {
        run["fold"]: run["held_out"] for run in heads if run["of_experiment"] == 2
    }
    for run in records["pudnet"]:
        pairs = set(run["pairs"]["numbers"])
        assert pairs == {number % 50 for number in held_out[run["seed"]]}
        mine = [
            each
            for each in records["experiment_2"]
            if (each["setup"], each["fold"]) == ("unseen_pairs", run["seed"])
        ]
        assert all(pairs == {n % 50 for n in each["held_out"]} for each in mine)
    assert verdict(difference(arms[SUPERNET], arms[HEAD])) == "not told apart"
    assert verdict(difference(arms[SUPERNET], arms[NEAREST])) == "not told apart"
    assert verdict(difference(arms[SUPERNET], arms[PUDNET])) == "higher"
    assert verdict(difference(arms[PUDNET], arms[ONE])) == "not told apart"


def test_what_chapter_10_says_that_tasks_take_to_store(chapter):
    classifier = TaskClassifier()
    supernet = SuperNet(WeightSpec.of(classifier), z_dim=32, hidden=(64,))
    once = sum(each.numel() for each in supernet.parameters())
    whole = supernet.spec.size
    head = sum(each.numel() for each in classifier.output.parameters())
    body = whole - head
    fitted = {name: numbers for name, _, numbers in ON_PAIRS}
    assert (fitted[SUPERNET], fitted[HEAD]) == (supernet.z_dim, head)
    assert f"pays from {-(-once // (whole - 32))} tasks on" in chapter
    assert f"is {once // body} times as large as that network" in chapter
    assert f"needs {-(-(once - body) // (head - 32)):,} tasks against a head" in chapter
    assert "more than two million" in chapter and once - body - 3_200 > 2_000_000
