"""When each notebook ran last and on what, as the run itself notes it, and the page of
the book that shows it.
"""

import json
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["NOTES", "note_run", "status_page"]

NOTES = "minisupernet"  # the entry of a notebook's metadata that says how it ran
PACKAGES = ("torch", "torchvision", "numpy", "jupyter-book")
CHOSEN = re.compile(
    r"^Images: ([\w-]+)", re.MULTILINE
)  # what "auto" took, as the notebook prints it
PAGE = """# Status of the runs

## The notebooks of this book

When each notebook ran last, for how long, and on what. A run notes this in the
notebook when it ends. Where a notebook reads no images, none are named.

{}

## The recorded runs

The full runs on real data that the chapters draw, from the folder `results`; a file's
number is that of its chapter. Hours are summed over all runs.

{}

## The set-ups

What the tables above name by its number: a device, and the versions on it.

{}
"""


def note_run(
    notebook: dict,
    parameters: Mapping[str, Any],
    seconds: float,
    threads: int | None = None,
) -> None:
    """Write into the notebook's metadata that it ran today (UTC) for so many seconds on
    `threads` CPU threads (all).

    Kept are its profile and images, the device and versions; no folder and no name of a
    user or machine.
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    notebook["metadata"][NOTES] = {
        "ran": datetime.now(UTC).date().isoformat(),
        "seconds": round(seconds),
        "profile": parameters.get("profile", ""),
        "data": Path(parameters.get("data", "")).name,
        "device": _device(threads or os.cpu_count()),
        "versions": versions,
    }


def status_page(notebooks: Sequence[Path], results: Iterable[Path]) -> str:
    """The page in Markdown: a line for each notebook, and one for each result file that
    holds runs.

    Raises:
        ResultError: for a result file that is damaged.
    """
    from minisupernet.course.plots import table
    from minisupernet.course.records import load_runs

    header = [
        "Chapter",
        "Ran (UTC)",
        "Seconds",
        "Profile",
        "Images",
        "Code cells",
        "Set-up",
    ]
    setups: list[str] = []
    ran = [_notebook_line(path, setups) for path in notebooks]
    records_header = ["File", "Runs", "Hours", "Images", "Set-up", "Commits"]
    records = [
        _record_line(path, load_runs(path), setups)
        for path in results
        if b'"runs"' in path.read_bytes()
    ]
    tables = table(header, ran).data, table(records_header, records).data
    named = "\n".join(f"{number}. {setup}" for number, setup in enumerate(setups, 1))
    return PAGE.format(*tables, named)


def _notebook_line(path: Path, setups: list[str]) -> list[str]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    notes = notebook["metadata"].get(NOTES)
    if not notes:
        return [_link(path), "not recorded", "", "", "", str(len(cells)), ""]
    said = CHOSEN.search(
        "\n".join(
            "".join(output.get("text", ""))
            for cell in cells
            for output in cell["outputs"]
        )
    )
    images = notes["data"] if notes["data"] != "auto" else said[1] if said else ""
    ran = [
        notes["ran"],
        str(notes["seconds"]),
        notes["profile"],
        images,
        str(len(cells)),
        _number(notes, setups),
    ]
    return [_link(path), *ran]


def _record_line(path: Path, runs: list[dict], setups: list[str]) -> list[str]:
    hours = f"{sum(run['seconds'] for run in runs) / 3600:.1f}"
    kinds = [
        (run["data"]["name"], _number(run, setups), run["commit"][:7]) for run in runs
    ]
    named = ("; ".join(sorted(set(each))) for each in zip(*kinds, strict=True))
    return [path.stem.replace("_", " "), str(len(runs)), hours, *named]


def _device(cores: int) -> str:
    from minisupernet.course.records import device_name
    from minisupernet.training import pick_device

    device = pick_device()
    return (
        device_name(device)
        if device.type == "cuda"
        else f"{device_name(device)}, cores: {cores}"
    )


def _number(run: Mapping[str, Any], setups: list[str]) -> str:
    """The number of the run's set-up among `setups`, which it joins where it is new."""
    versions = (f"{name} {version}" for name, version in run["versions"].items())
    setup = f"{run['device']}; {', '.join(versions)}"
    if setup not in setups:
        setups.append(setup)
    return str(setups.index(setup) + 1)


def _link(path: Path) -> str:
    return f"[](../notebooks/{path.stem}.ipynb)"
