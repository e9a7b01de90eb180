"""The book: the pages and the notebooks that have run, assembled in a folder of their
own and built by Jupyter Book.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from minisupernet.course.runs.jobs import short_digest
from minisupernet.course.runs.notebooks import (
    course_notebooks,
    environment,
    find_notebook,
    stand_in_folder,
    writing,
)
from minisupernet.course.runs.sweeps import run_notebooks
from minisupernet.course.status import NOTES, status_page
from minisupernet.errors import RunError
from minisupernet.files import whole_file

__all__ = ["make_book", "refresh"]

PAPERMILL_NOTES = ("papermill", "execution")  # metadata that a run by papermill leaves


def assemble(root: Path, notebooks: Sequence[Path], target: Path) -> Path:
    """Put the book's settings, its pages, these notebooks and the status of their runs
    into the folder `target`, made anew, and return it."""
    with writing(target):
        shutil.rmtree(target)
        shutil.copytree(
            root / "book", target / "book", ignore=shutil.ignore_patterns("__pycache__")
        )
        (target / "notebooks").mkdir()
        for file in (root / "_config.yml", root / "_toc.yml"):
            shutil.copy(file, target)
        for notebook in notebooks:
            shutil.copy(notebook, target / "notebooks")
        page = status_page(notebooks, sorted((root / "results").glob("*.json")))
        (target / "book" / "status.md").write_text(page, encoding="utf-8")
    return target


def build_html(source: Path, target: Path) -> Path:
    """Build the assembled book, where every warning is an error, and return its first
    page `target/index.html`.

    Raises:
        RunError: for a warning or an error; `target` then stays as it was.
    """
    jupyter_book = [
        sys.executable,
        "-c",
        "from jupyter_book.cli.main import main; main()",
    ]
    command = [*jupyter_book, "build", "--all", "-W", "-n", "--keep-going", str(source)]
    print("Building the pages ...", flush=True)
    done = subprocess.run(
        command, stdout=subprocess.DEVNULL
    )  # warnings and errors come on stderr
    if done.returncode:
        raise RunError("the book was not built; the warnings and errors above say why.")
    with writing(target):
        shutil.rmtree(target)
        (source / "_build" / "html").replace(target)
    return target / "index.html"


def make_book(
    root: Path,
    profile: str = "quick",
    data: str = "auto",
    seed: int = 0,
    committed: bool = False,
) -> Path:
    """Run every notebook, build the book from the runs, and return its first page.

    All of it lies in `_build/<profile>-<data>`, behind the name of an .npz file six
    letters that stand for its folder. With `committed` nothing is run: the stored
    outputs are taken, and it lies in `_build/committed`.
    """
    notebooks = course_notebooks(root)
    name = f"{profile}-{data}"
    if data.endswith(".npz"):
        data = str(Path(data).expanduser().resolve())
        name = f"{profile}-{Path(data).stem}-{short_digest(data)}"
    folder = root / "_build" / ("committed" if committed else name)
    if not committed:
        parameters = {"profile": profile, "data": data, "seed": seed}
        run_notebooks(notebooks, folder / "notebooks", parameters, root)
        notebooks = [folder / "notebooks" / notebook.name for notebook in notebooks]
    return build_html(assemble(root, notebooks, folder / "source"), folder / "html")


def refresh(root: Path, names: Sequence[str] = ()) -> None:
    """Run the notebooks of these names or numbers, or every one, as they stand, quick
    and on Shapes-100, and store outputs and notes of the run in them."""
    import nbformat

    notebooks = [find_notebook(name, root) for name in names] or course_notebooks(root)
    folder = root / "_build" / "refresh"
    with environment(MINISUPERNET_DATA=str(stand_in_folder(root))):
        run_notebooks(notebooks, folder, {}, root)
    for path in notebooks:
        stored, ran = nbformat.read(path, 4), nbformat.read(folder / path.name, 4)
        for cell, ran_cell in zip(stored.cells, ran.cells, strict=True):
            if cell.cell_type == "code":
                cell.outputs = ran_cell.outputs
                cell.execution_count = ran_cell.execution_count
        for holder in (stored, *stored.cells):
            for name in PAPERMILL_NOTES:
                holder.metadata.pop(name, None)
        stored.metadata[NOTES] = ran.metadata[NOTES]
        with whole_file(path) as part:
            nbformat.write(stored, part)
