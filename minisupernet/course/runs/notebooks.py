"""Runs of the course's notebooks with parameters, by papermill.

A run writes into a folder of its own; the notebooks in the repository change only by
`refresh`.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from minisupernet.course.runs.outputs import keep_outputs
from minisupernet.course.runs.parameters import plain, suggestion
from minisupernet.course.status import note_run
from minisupernet.errors import FileError, RunError
from minisupernet.files import data_folder

if TYPE_CHECKING:
    from nbformat import NotebookNode

__all__ = [
    "check_parameters",
    "course_notebooks",
    "execute",
    "find_notebook",
    "environment",
    "stand_in_folder",
    "writing",
]

CELL_SECONDS = {
    "quick": 600,
    "full": 8 * 3600,
}  # profile -> longest that one cell may take


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
            near = suggestion(name, known)
            raise RunError(f"{path.stem} has no parameter '{name}'{near}")
        kind, given = type(known[name]), type(plain(name, value))
        if given is not kind and (given, kind) != (int, float):
            near = str(value).capitalize()
            fits = kind is bool and near in ("True", "False")
            raise RunError(
                f"parameter {name} of {path.stem} must be of type {kind.__name__}, as"
                f" {known[name]!r} is, not {value!r}"
                f"{f'; did you mean {near}?' if fits else '.'}"
            )
    if (profile := parameters.get("profile", "quick")) not in CELL_SECONDS:
        raise RunError(
            f"there is no profile '{profile}'; use {' or '.join(CELL_SECONDS)}."
        )


def _defaults(path: Path) -> dict[str, Any]:
    """What the notebook's parameters cell says, name to value; nothing without one.

    Raises:
        RunError: for a file that is no notebook, or is not in Python; for a second such
            cell, and for one that does not give plain values.
    """
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        about = notebook["metadata"].get("kernelspec", {})
        language = about.get("language", "python")
        sources = [
            "".join(cell["source"])
            for cell in notebook["cells"]
            if "parameters" in cell["metadata"].get("tags", ())
        ]
    except Exception as error:  # a damaged notebook fails in many ways
        raise RunError(f"{path} is no notebook; restore it.") from error
    if language.lower() != "python":
        raise RunError(f"{path} is a notebook in {language}; only Python runs here.")
    if len(sources) > 1:
        raise RunError(
            f"{path} has {len(sources)} cells with the tag 'parameters'; leave one."
        )
    try:
        return dict(map(_assigned, ast.parse("".join(sources)).body))
    except (SyntaxError, ValueError, AttributeError) as error:
        raise RunError(
            f"the cell of {path} with the tag 'parameters' must hold lines such as"
            " `seed = 0` and nothing else."
        ) from error


def _assigned(line: ast.stmt) -> tuple[str, Any]:
    """Name and value of `name = value` or `name: kind = value`."""
    targets = [line.target] if isinstance(line, ast.AnnAssign) else line.targets
    (target,) = targets
    return target.id, ast.literal_eval(line.value)


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
        progress: show how many cells are done: a bar at a terminal, elsewhere a line a
            minute.

    Returns:
        The seconds of each code cell.

    Raises:
        RunError: for a cell that fails, takes too long or ends the kernel: the
            notebook, the cell as Jupyter numbers it, the error.
    """
    import nbformat

    began, told = time.perf_counter(), {**_defaults(path), **parameters}
    longest = seconds or CELL_SECONDS[told.get("profile", "quick")]
    done = _papermill_run(path, output, parameters, threads, longest, progress)
    keep_outputs(done)
    note_run(done, told, time.perf_counter() - began, threads)
    nbformat.write(done, output)
    return [
        round(cell.metadata.papermill.duration or 0, 2)
        for cell in done.cells
        if cell.cell_type == "code"
    ]


def _papermill_run(
    path: Path,
    output: Path,
    parameters: Mapping[str, Any],
    threads: int | None,
    longest: float,
    progress: bool,
) -> NotebookNode:
    """The notebook that has run; nothing of the environment of this process changes."""
    papermill = _papermill()
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    settings = {"MINISUPERNET_DATA": str(data_folder().resolve()), "TQDM_DISABLE": "1"}
    if threads:
        settings["OMP_NUM_THREADS"] = str(threads)
    try:
        with environment(**settings):
            return papermill.execute_notebook(
                path,
                output,
                dict(parameters),
                kernel_name="python3",
                language="python",
                cwd=path.parent,
                progress_bar=_bar() if progress else False,
                start_timeout=120,
                execution_timeout=longest,
                extra_arguments=["--log-level=CRITICAL"],
            )
    except (
        papermill.PapermillExecutionError,
        CellTimeoutError,
        DeadKernelError,
    ) as error:
        raise RunError(
            f"{path.stem}, {_failed_cell(output)}: {_one_line(error)}"
        ) from error


def _bar() -> dict[str, Any]:
    """How papermill's bar looks: a bar at a terminal, in a log a line a minute."""
    if sys.stderr.isatty():
        return {"disable": False}  # whatever the environment says to the notebook's own
    look = "{n_fmt} of {total_fmt} cells, {elapsed}"
    lines = {"bar_format": look, "file": _Lines(), "mininterval": 60}
    return {**lines, "disable": False}


class _Lines:
    """A file for a bar: what it shows is printed, each time on a line of its own."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


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


def _failed_cell(unfinished: Path) -> str:
    """The last cell that was started, with its first line, by the number that Jupyter
    and papermill give it in that notebook: empty cells have none.
    """
    cells = json.loads(unfinished.read_text(encoding="utf-8"))["cells"]
    code = [
        ("".join(cell["source"]).strip(), cell["metadata"].get("papermill", {}))
        for cell in cells
        if cell["cell_type"] == "code" and "".join(cell["source"]).strip()
    ]
    number = max(n for n, (_, note) in enumerate(code) if note.get("start_time"))
    return f"In [{number + 1}] `{code[number][0].splitlines()[0][:60]}`"


def _one_line(error: Exception) -> str:
    name = getattr(error, "ename", type(error).__name__)
    lines = str(getattr(error, "evalue", error)).strip().splitlines()
    return f"{name}: {lines[0]}" if lines else name


@contextmanager
def environment(**settings: str) -> Iterator[None]:
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
