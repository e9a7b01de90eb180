"""The longer study of chapter 3: what its record says, how it is drawn, and that the
chapter says the same.
"""

import json
import math

import pytest
from support import ROOT

from minisupernet.course.records import load_runs, results_file
from minisupernet.course.report import static_long
from minisupernet.course.report.static_long import LONG, SHORT, lead, reached
from minisupernet.errors import ResultError


@pytest.fixture(scope="module")
def runs() -> list[dict]:
    found = load_runs(results_file("03_static_long.json"))
    return [run for run in found if run["profile"] == "full"]


def unit(arm: str, seed: int, epochs: float, test: float) -> dict:
    sizes = {"parameters": 1000, "multiply_adds": 10**6, "images": 60}
    spent = {"rate": 0.1, "train_loss": 1.0, "train_seconds": 60.0}
    return {"arm": arm, "seed": seed, "epochs": epochs, "test": test} | sizes | spent


def made_up(seeds: int) -> list[dict]:
    """Three arms; the generated one is 2 points ahead of both after the long training,
    give or take a tenth, and 10 behind after the short one."""
    leads = {"generated": (0.52, 0.72), "smaller": (0.62, 0.70)}
    leads["as_many_numbers"] = leads["smaller"]
    return [
        unit(arm, seed, epochs, value + 0.001 * seed * (arm == "generated"))
        for arm, values in leads.items()
        for epochs, value in zip((SHORT, LONG), values, strict=True)
        for seed in range(seeds)
    ]


def test_every_rate_is_the_best_of_the_short_units(runs):
    for arm in {run["arm"] for run in runs if run["epochs"] == LONG}:
        short = [r for r in runs if (r["arm"], r["epochs"]) == (arm, SHORT)]
        best = max(short, key=lambda run: run["validation"])
        long = {r["rate"] for r in runs if (r["arm"], r["epochs"]) == (arm, LONG)}
        assert len(short) >= 4 and long == {best["rate"]}


def test_the_chapter_says_what_the_record_says(runs):
    """After 40 epochs "about a point ahead", "three ahead"; after 5 "behind both by
    four points or more"; "the steeper" between."""
    assert 0.005 < lead(runs, "generated", "smaller").mean < 0.016
    assert 0.024 < lead(runs, "generated", "as_many_numbers").mean < 0.038
    rise = {}
    for arm in ("generated", "smaller", "as_many_numbers"):
        short, long = (reached(runs, arm, epochs)[0] for epochs in (SHORT, LONG))
        rise[arm] = long - short
    assert max(rise, key=rise.get) == "generated"
    for other in ("smaller", "as_many_numbers"):
        assert lead(runs, "generated", other, SHORT).mean < -0.04


def test_sizes_and_costs_that_the_chapter_speaks_of(runs):
    """ "Five to seven times the multiplications", "several times as long to train"; no
    loss under label smoothing's floor of 0.50."""
    of = {run["arm"]: run for run in runs if run["epochs"] == LONG}
    generated = of["generated"]
    assert generated["parameters"] == 97_770
    for other, parameters in (("smaller", 77_850), ("as_many_numbers", 99_594)):
        assert of[other]["parameters"] == parameters
        assert 5 < generated["multiply_adds"] / of[other]["multiply_adds"] < 7
        assert generated["train_seconds"] > 2 * of[other]["train_seconds"]
    floor = -(0.91 * math.log(0.91) + 0.09 * math.log(0.01))
    assert round(floor, 2) == 0.50
    assert {run["settings"]["smoothing"] for run in runs} == {0.1}
    assert min(run["train_loss"] for run in runs) > floor
    assert {run["images"] for run in runs} == {27_000}


def test_the_verdict_has_its_budget_and_comes_from_the_record(runs):
    said = static_long.verdict_in_words(runs)
    assert said.startswith("After 40 epochs of 27,000 images of 16 x 16 pixels:\n")
    values = list(reached(runs, "generated", LONG).values())
    mean = 100 * sum(values) / len(values)
    assert f"97,770 numbers: {mean:.1f} %, n = {len(values)}" in said
    notebook = json.loads(
        (ROOT / "notebooks" / "03_static_hypernetworks.ipynb").read_text()
    )
    (shown,) = (
        "".join(cell["outputs"][0]["data"]["text/markdown"])
        for cell in notebook["cells"]
        if cell["id"] == "03-long-verdict"
    )
    assert shown.rstrip() == said


def test_an_interval_is_drawn_from_three_seeds_on():
    for seeds, word in ((2, "no verdict"), (3, "higher")):
        runs = made_up(seeds)
        assert word in static_long.verdict_in_words(runs)
        assert word in static_long.leads_table(runs).data
        assert ("no interval" in static_long.accuracy_table(runs).data) == (seeds < 3)
        figure = static_long.accuracy_figure(runs)
        drawn = [len(axes.containers) for axes in figure.axes]
        assert drawn == [0 if seeds < 3 else 6] * 2


def test_a_network_that_was_not_trained_for_long_is_left_out():
    runs = [*made_up(3), unit("direct", 0, SHORT, 0.6)]
    assert "WRN-40-1, direct" not in static_long.costs_table(runs).data
    with pytest.raises(ResultError, match="no recorded unit has the arm 'direct'"):
        reached(runs, "direct", LONG)


def test_seeds_are_paired():
    runs = [*made_up(3), unit("generated", 3, LONG, 0.99)]
    found = lead(runs, "generated", "smaller")
    assert found.n == 3 and abs(found.mean - 0.021) < 1e-9
