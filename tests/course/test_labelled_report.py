"""Tables and figures of one look are drawn from the records, fold by fold."""

import pytest

from minisupernet.course.report.labelled import (
    LOOK_NAMES,
    arms_of_looks,
    examples_figure,
    look_leads_table,
    looks_table,
)
from minisupernet.course.statistics import paired


def unit(fold: int, group: str, **few: dict) -> dict:
    about = {"of_experiment": 2, "fold": fold, "seed": fold, "group": group}
    return {**about, "channels": 16, "steps": 2_000, "few": few}


@pytest.fixture
def runs() -> list[dict]:
    own, others = [], []
    for fold, shift in enumerate((0.0, 0.01, 0.05)):
        look, fitted = 0.8 + shift, 0.83 + 1.5 * shift
        arms = {"look": {"test": [look, look + 0.1]}, "look_fitted": {"test": [fitted]}}
        own.append(unit(fold, "look", **{"5": {**arms, "z_only": {"test": [0.7]}}}))
        beside = {"head": {"test": [0.75]}, "head_32": {"test": [0.7]}}
        others.append(unit(fold, "heads", **{"5": beside}))
        others.append(unit(fold, "prior", **{"5": {"z_only": {"test": [0.1]}}}))
    others.append(unit(4, "heads", **{"5": {"head": {"test": [0.1]}}}))
    return arms_of_looks(own, others)


def test_tables_have_every_arm_that_was_measured(runs):
    lines = looks_table(runs, 2).data.splitlines()
    assert lines[2] == "| one look | – | 87.0 ± 6.6 | – | – | – |"
    assert "| z fitted from the mean z | – | 70.0 ± 0.0 | – | – | – |" in lines
    assert "| a head on one shared network | – | 75.0 ± 0.0 | – | – | – |" in lines
    assert len(lines) == 2 + 4


def test_differences_are_paired_by_fold(runs):
    expected = paired([0.83, 0.845, 0.905], [0.85, 0.86, 0.9]).percent()
    lines = look_leads_table(runs, 2).data.splitlines()
    row = f"| one look, then z fitted − one look | – | {expected}: not told apart | – |"
    assert row in lines
    assert any(line.endswith(": higher | – |") for line in lines)


def test_the_figure_draws_what_there_is(runs):
    axes = examples_figure(runs, 2).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert LOOK_NAMES["look"] in labels and axes.get_xlabel() == "examples of a class"
    look = next(line for line in axes.lines if line.get_label() == LOOK_NAMES["look"])
    assert list(look.get_xdata()) == [5] and look.get_ydata()[0] == pytest.approx(87.0)
