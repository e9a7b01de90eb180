"""Runs of the course's notebooks with parameters, by papermill.

A run writes into a folder of its own; the notebooks in the repository change only by
`refresh`.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

from minisupernet.course.runs.inputs import notebook_fingerprint
from minisupernet.course.runs.outputs import keep_outputs
from minisupernet.course.runs.parameters import plain, suggestion
from minisupernet.course.status import NOTES, note_run
from minisupernet.errors import FileError, RunError
from minisupernet.files import data_folder, whole_file

__all__ = [
    "check_parameters",
    "course_notebooks",
    "execute",
    "find_notebook",
    "refresh",
    "run_all",
    "run_notebook",
    "stand_in_folder",
    "writing",
]

CELL_SECONDS = {
    "quick": 600,
    "full": 8 * 3600,
}  # profile -> longest that one cell may take
PAPERMILL_NOTES = ("papermill", "execution")  # metadata that a run by papermill leaves
PAPERMILL_TAGS = {
    "injected-parameters",
    "papermill-error-cell-tag",
}  # cells that papermill adds


def course_notebooks(root: Path) -> list[Path]:
    """The notebooks of the course in the checkout `root`, in the order of their
    numbers.

    Raises:
        RunError: where `root` is no checkout of the course.
    """
    notebooks = sorted((root / "notebooks").glob("*.ipynb"))
    if not notebooks or not (root / "_config.yml").is_file():
        raise RunError(
            f"{root} has no notebooks or no _config.yml; run this in a clone of the"
            " repository."
        )
    return notebooks


def find_notebook(name: str | int, root: Path) -> Path:
    """A notebook by its path, or one of the course by its name ("05_supernet",
    "supernet") or number (5).

    Raises:
        RunError: where there is none; the message lists the course's.
    """
    if str(name).endswith(".ipynb"):
        return Path(str(name)).expanduser().resolve()
    course = {path.stem: path for path in course_notebooks(root)}
    for stem, path in course.items():
        number, _, title = stem.partition("_")
        if str(name) in (stem, title) or (
            str(name).isdecimal() and int(name) == int(number)
        ):
            return path
    raise RunError(
        f"there is no notebook '{name}'; give a path or one of {', '.join(course)}."
    )


def stand_in_folder(root: Path) -> Path:
    """The data folder, without CIFAR, of all runs whose outputs are stored or
    compared.
    """
    return root / "_build" / "stand-in"


def check_parameters(path: Path, parameters: Mapping[str, Any]) -> None:
    """Check names and types against the notebook's own parameters cell, and that the
    profile exists.

    Raises:
        RunError: for a missing notebook, an unknown name or profile, or a value of
            another type than the default.
    """
    if not path.is_file():
        raise RunError(f"there is no notebook {path}; check the path.")
    known = _defaults(path)
    for name, value in parameters.items():
        if name not in known:
            raise RunError(
                f"{path.stem} has no parameter '{name}'{suggestion(name, known)}"
            )
        if type(plain(name, value)) is not type(default := known[name]):
            kind, near = type(default).__name__, str(value).capitalize()
            hint = (
                f"; did you mean {near}?"
                if kind == "bool" and near in ("True", "False")
                else "."
            )
            message = (
                f"parameter {name} of {path.stem} must be of type {kind}, as"
                f" {default!r} is, not {value!r}{hint}"
            )
            raise RunError(message)
    if (profile := parameters.get("profile", "quick")) not in CELL_SECONDS:
        raise RunError(
            f"there is no profile '{profile}'; use {' or '.join(CELL_SECONDS)}."
        )


def _defaults(path: Path) -> dict[str, Any]:
    """What the notebook's parameters cell says, name to value."""
    papermill = _papermill()
    try:
        known = papermill.inspect_notebook(str(path))
        return {name: ast.literal_eval(each["default"]) for name, each in known.items()}
    except Exception as error:  # a damaged notebook fails in many ways
        raise RunError(
            f"{path} is no notebook whose parameters are plain values; restore it."
        ) from error


def run_notebook(
    path: Path,
    out_dir: Path,
    parameters: Mapping[str, Any],
    root: Path,
    threads: int | None = None,
) -> bool:
    """Run one notebook to `out_dir/<name>.ipynb`, and return False where that is
    already there with the same inputs.

    Beside it lie `<name>.inputs`, its fingerprint, and after a failure
    `<name>.unfinished.ipynb`. `threads` limits the cores that the notebook's arithmetic
    uses.

    Raises:
        RunError: for wrong parameters, and for a cell that fails: the notebook, the
            cell's number and the error.
        FileError: where `out_dir` cannot be written.
    """
    path, out_dir = Path(path).resolve(), Path(out_dir).resolve()
    check_parameters(path, parameters)
    output, unfinished, stamp = (
        out_dir / (path.stem + end)
        for end in (".ipynb", ".unfinished.ipynb", ".inputs")
    )
    inputs = notebook_fingerprint(path, parameters, root)
    if output.exists() and stamp.exists() and stamp.read_text() == inputs:
        return False
    with writing(out_dir):
        execute(path, unfinished, parameters, threads)
        stamp.unlink(missing_ok=True)  # killed from here on, the notebook runs again
        unfinished.replace(output)
        with whole_file(stamp) as part:
            part.write_text(inputs)
    return True


def execute(
    path: Path,
    output: Path,
    parameters: Mapping[str, Any],
    threads: int | None = None,
    seconds: float | None = None,
    progress: bool = False,
) -> list[float]:
    """Run the notebook where it lies, as Jupyter and nbval do; what it has done so far
    is in `output` all the time.

    Args:
        seconds: the longest that one cell may take; by default that of the profile.
        progress: show a bar of the cells done.

    Returns:
        The seconds of each code cell.

    Raises:
        RunError: for a cell that fails, takes too long or ends the kernel: the
            notebook, the cell's number, the error.
    """
    papermill = _papermill()
    import nbformat
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    settings = {"MINISUPERNET_DATA": str(data_folder().resolve()), "TQDM_DISABLE": "1"}
    if threads:
        settings["OMP_NUM_THREADS"] = str(threads)
    began = time.perf_counter()
    try:
        with _environment(**settings):
            done = papermill.execute_notebook(
                path,
                output,
                dict(parameters),
                kernel_name="python3",
                cwd=path.parent,
                progress_bar=progress,
                start_timeout=120,
                execution_timeout=seconds
                or CELL_SECONDS[parameters.get("profile", "quick")],
                extra_arguments=["--log-level=CRITICAL"],
            )
    except (
        papermill.PapermillExecutionError,
        CellTimeoutError,
        DeadKernelError,
    ) as error:
        raise RunError(
            f"{path.stem}, cell {_failed_cell(output)}: {_one_line(error)}"
        ) from error
    keep_outputs(done)
    note_run(
        done, {**_defaults(path), **parameters}, time.perf_counter() - began, threads
    )
    nbformat.write(done, output)
    return [
        round(cell.metadata.papermill.duration or 0, 2)
        for cell in done.cells
        if cell.cell_type == "code"
    ]


def run_all(
    notebooks: Sequence[Path],
    out_dir: Path,
    parameters: Mapping[str, Any],
    root: Path,
    at_once: int = 2,
) -> None:
    """Run notebooks, `at_once` at a time where there are the cores, and print a line
    for each.

    Raises:
        RunError: before any runs, for wrong parameters; after all have been tried, a
            line for each that failed.
    """
    for path in notebooks:
        check_parameters(path, parameters)
    cores = (
        len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1
    )
    at_once = min(at_once, cores, len(notebooks))
    failures = []
    with ProcessPoolExecutor(at_once, mp_context=get_context("spawn")) as pool:
        share = cores // at_once
        futures = {
            pool.submit(_timed_run, path, out_dir, parameters, root, share): path
            for path in notebooks
        }
        for future in as_completed(futures):
            try:
                ran, seconds = future.result()
                print(
                    f"{futures[future].stem}:"
                    f" {f'ran in {seconds:.0f} s' if ran else 'unchanged'}",
                    flush=True,
                )
            except RunError as error:
                failures.append(str(error))
    if failures:
        raise RunError("\n".join(sorted(failures)))


def refresh(root: Path) -> None:
    """Run every notebook as it stands, quick and on Shapes-100, and store outputs and
    notes of the run in it.
    """
    import nbformat

    notebooks, folder = course_notebooks(root), root / "_build" / "refresh"
    with _environment(MINISUPERNET_DATA=str(stand_in_folder(root))):
        run_all(notebooks, folder, {}, root)
    for path in notebooks:
        stored, ran = nbformat.read(path, 4), nbformat.read(folder / path.name, 4)
        for cell, ran_cell in zip(stored.cells, ran.cells, strict=True):
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = (
                    ran_cell.outputs,
                    ran_cell.execution_count,
                )
        for holder in (stored, *stored.cells):
            for name in PAPERMILL_NOTES:
                holder.metadata.pop(name, None)
        stored.metadata[NOTES] = ran.metadata[NOTES]
        with whole_file(path) as part:
            nbformat.write(stored, part)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Make the folder, and say in one sentence if it, or something in it, cannot be
    written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except FileError:
        raise
    except OSError as error:
        reason = (
            error.args[0][0][2]
            if isinstance(error, shutil.Error)
            else error.strerror or error
        )
        raise FileError(
            f"cannot write {folder}: {reason}; free space or make the folder writable."
        ) from error


def _papermill() -> ModuleType:
    try:
        import papermill
    except ImportError as error:
        cure = '`python -m pip install -c constraints.txt -e ".[notebooks,book,test]"`'
        raise RunError(
            f"running notebooks needs papermill, which is not installed; run {cure}."
        ) from error
    return papermill


def _timed_run(*arguments: Any) -> tuple[bool, float]:
    start = time.perf_counter()
    return run_notebook(*arguments), time.perf_counter() - start


def _failed_cell(unfinished: Path) -> int:
    """The number, from 1, of the last cell that was started, among the cells of the
    notebook itself.
    """
    cells = json.loads(unfinished.read_text(encoding="utf-8"))["cells"]
    own = [
        cell["metadata"]
        for cell in cells
        if not PAPERMILL_TAGS & set(cell["metadata"].get("tags", ()))
    ]
    return max(
        number
        for number, notes in enumerate(own, 1)
        if notes["papermill"]["status"] != "pending"
    )


def _one_line(error: Exception) -> str:
    name = getattr(error, "ename", type(error).__name__)
    lines = str(getattr(error, "evalue", error)).strip().splitlines()
    return f"{name}: {lines[0]}" if lines else name


@contextmanager
def _environment(**settings: str) -> Iterator[None]:
    """Inside the block these environment variables are set, also for the processes
    started there.
    """
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
