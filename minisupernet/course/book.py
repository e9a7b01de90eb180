"""The book: the pages and the notebooks that have run, assembled in a folder of their
own and built by Jupyter Book.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from minisupernet.course.runs.notebooks import course_notebooks, run_all, writing
from minisupernet.course.status import status_page
from minisupernet.errors import RunError

__all__ = ["make_book"]


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

    All of it lies in `_build/<profile>-<data>`. With `committed` nothing is run: the
    stored outputs are taken, and it lies in `_build/committed`.
    """
    notebooks = course_notebooks(root)
    if data.endswith(".npz"):
        data = str(Path(data).expanduser().resolve())
    folder = (
        root / "_build" / ("committed" if committed else f"{profile}-{Path(data).stem}")
    )
    if not committed:
        run_all(
            notebooks,
            folder / "notebooks",
            {"profile": profile, "data": data, "seed": seed},
            root,
        )
        notebooks = [folder / "notebooks" / notebook.name for notebook in notebooks]
    return build_html(assemble(root, notebooks, folder / "source"), folder / "html")
