"""What a sweep found: its runs recorded in a result file, a table of means with
intervals, and a figure of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from minisupernet.course.runs.sweeps import Run, Sweep
from minisupernet.course.runs.workers import finished
from minisupernet.errors import ResultError
from minisupernet.files import whole_file

if TYPE_CHECKING:
    from minisupernet.course.statistics import Interval

__all__ = ["lacking", "record", "summarise"]


def record(run: Run, folder: Path, place: Path) -> None:
    """Put a finished run into the result file `place`, or into the book's own file
    where `place` is a folder.

    It replaces an older one of the same experiment, set-up, profile, seed, fold,
    overrides and images, or of the same study, profile, seed, unit and images.

    Raises:
        RunError: for a run that does not belong there.
    """
    from minisupernet.course.records import record_run

    file, (_, keys) = run.job.record_file(place), run.job.recorded()
    if document := finished(folder, run.name, run.inputs):
        record_run(file, document["result"], keys)


def summarise(sweep: Sweep, runs: Sequence[Run], folder: Path) -> str:
    """A table of means with 95 % intervals, kept as `summary.md`, with a figure of it,
    `summary.png`.

    A run is the unit: where a value is a list, such as an arm's accuracy on each task,
    the run's mean of it counts.

    Raises:
        ResultError: where a run has no such value.
    """
    groups: dict[str, list[dict]] = {}
    for run in runs:
        if document := finished(folder, run.name, run.inputs):
            group = str(run.settings.get(sweep.by, "default"))
            groups.setdefault(group, []).append(document)
    if not groups:
        return "No run has finished."
    found = {
        name: [_mean(documents, value) for value in sweep.values]
        for name, documents in groups.items()
    }
    lines = [[sweep.by, "runs", *sweep.values], ["---"] * (2 + len(sweep.values))]
    lines += [
        [name, str(len(groups[name])), *map(_cell, means)]
        for name, means in found.items()
    ]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    with whole_file(folder / "summary.md") as part:
        part.write_text(text, encoding="utf-8")
    _draw(sweep, found, folder / "summary.png")
    return text


def lacking(sweep: Sweep, run: Run, folder: Path) -> str:
    """What the summary asks for and this finished run has not, in a sentence; empty
    where it has all.
    """
    document = finished(folder, run.name, run.inputs) or {"result": {}}
    try:
        for value in sweep.values:
            _pick(document | document["result"], value)
    except ResultError as error:
        return str(error)
    return ""


def _mean(documents: Sequence[dict], value: str) -> Interval:
    """The mean of a value over runs, with its interval."""
    from minisupernet.course.statistics import interval

    found = [_pick(document | document["result"], value) for document in documents]
    return interval([fmean(v) if isinstance(v, list) else v for v in found])


def _pick(document: Any, value: str) -> float | list[float]:
    """What lies at "arms.z_only.test" in a result."""
    found = document
    for name in value.split("."):
        if not isinstance(found, dict) or name not in found:
            known = ", ".join(found) if isinstance(found, dict) else "no more"
            raise ResultError(
                f"the runs have no value '{value}'; where '{name}' should be there is"
                f" {known}."
            )
        found = found[name]
    numbers = found if isinstance(found, list) and found else [found]
    if not all(type(each) in (int, float) and abs(each) < 1e300 for each in numbers):
        raise ResultError(
            f"the value '{value}' is neither a finite number nor a list of finite"
            " numbers."
        )
    return found


def _cell(found: Interval) -> str:
    if not isfinite(found.low):
        return f"{found.mean:.4g} (n={found.n})"
    return f"{found.mean:.4g} ({found.low:.4g} to {found.high:.4g}, n={found.n})"


def _draw(sweep: Sweep, found: Mapping[str, list[Interval]], path: Path) -> None:
    """One row of points with intervals a value, the groups side by side."""
    from matplotlib import pyplot

    from minisupernet.course.plots import new_figure

    figure, axes = new_figure()
    for number, value in enumerate(sweep.values):
        shift = 0.1 * (number - (len(sweep.values) - 1) / 2)
        for place, means in enumerate(found.values()):
            each, label = means[number], value if place == 0 else None
            if isfinite(each.low):
                ends, across = [each.low, each.high], [place + shift] * 2
                axes.plot(across, ends, color=f"C{number}", linewidth=3)
            axes.plot(
                place + shift,
                each.mean,
                "D",
                color=f"C{number}",
                markeredgecolor="white",
                label=label,
            )
    axes.set_xticks(range(len(found)), found)
    axes.set(xlabel=sweep.by, ylabel="mean and 95 % interval")
    axes.legend()
    with whole_file(path) as part:
        figure.savefig(part, format="png")
    pyplot.close(figure)
