"""The command line: `python -m minisupernet data | book | notebooks | run | sweep`."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from minisupernet.errors import CourseError

__all__ = ["main", "make_parser"]

CHECKOUT = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status; an error of the package is one line
    and no traceback.
    """
    options = make_parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        return 130
    except CourseError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Every command and option; the book's page of them is drawn from it."""
    parser = argparse.ArgumentParser(
        prog="python -m minisupernet", description="Networks that make networks."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for add_command in (add_data, add_book, add_notebooks, add_run, add_sweep):
        add_command(commands)
    return parser


def at_least(least: int) -> Callable[[str], int]:
    """Reads a whole number for an option, and refuses one below `least`."""

    def whole(word: str) -> int:
        if (number := int(word)) < least:
            raise argparse.ArgumentTypeError(f"{word} is less than {least}")
        return number

    return whole


def seconds(word: str) -> float:
    """Reads a time for an option."""
    if not 0 < (number := float(word)) < math.inf:
        raise argparse.ArgumentTypeError(f"{word} is no time in seconds")
    return number


def add_data(commands: argparse._SubParsersAction) -> None:
    """`data`: download CIFAR-100 and CIFAR-10."""
    parser = commands.add_parser(
        "data",
        help="download CIFAR-100 and CIFAR-10 and check the files",
        description="Downloads what is missing into the data folder, which is"
        " MINISUPERNET_DATA or lies in the user's cache folder, and says where it is.",
    )
    parser.set_defaults(run=run_data)


def run_data(options: argparse.Namespace) -> None:
    """Load both sets, which downloads what is missing, and say where they are."""
    from minisupernet.data import load
    from minisupernet.files import data_folder

    for name in ("cifar100", "cifar10"):
        images = load(name)
        print(
            f"{name}: {len(images.train_labels):,} + {len(images.test_labels):,}"
            f" images; {images.source}"
        )
    print(f"They are in {data_folder()}")


def add_book(commands: argparse._SubParsersAction) -> None:
    """`book`: run the notebooks and build the HTML."""
    parser = commands.add_parser(
        "book",
        help="run the notebooks and build the book",
        description="Writes into _build/PROFILE-DATA: the notebooks that ran in"
        " notebooks, the pages in html. A notebook that ran with the same inputs is not"
        " run again.",
    )
    parser.add_argument("--profile", default="quick", help="quick or full (quick)")
    parser.add_argument(
        "--data",
        default="auto",
        help="auto, cifar100, cifar10, shapes100 or a .npz file (auto)",
    )
    parser.add_argument("--seed", default=0, type=int, help="a whole number (0)")
    parser.add_argument(
        "--committed",
        action="store_true",
        help="take the stored outputs and run nothing, into _build/committed",
    )
    parser.set_defaults(run=run_book)


def run_book(options: argparse.Namespace) -> None:
    """Build the book and print the address of its first page."""
    from minisupernet.course.book import make_book

    page = make_book(
        CHECKOUT, options.profile, options.data, options.seed, options.committed
    )
    print(f"The book: {page.as_uri()}")


def add_notebooks(commands: argparse._SubParsersAction) -> None:
    """`notebooks`: store the outputs of a quick run on Shapes-100 in the notebooks
    themselves.
    """
    parser = commands.add_parser(
        "notebooks",
        help="run the notebooks on Shapes-100 and store their outputs in place",
        description="Runs in _build/refresh, and then writes the outputs into the"
        " notebooks of the repository.",
    )
    parser.add_argument(
        "names", nargs="*", help="such as 5 or supernet; without one, every chapter"
    )
    parser.set_defaults(run=run_notebooks)


def run_notebooks(options: argparse.Namespace) -> None:
    """Refresh the stored outputs."""
    from minisupernet.course.book import refresh

    refresh(CHECKOUT, options.names)


def add_run(commands: argparse._SubParsersAction) -> None:
    """`run`: run one notebook with parameters."""
    parser = commands.add_parser(
        "run",
        help="run one notebook with parameters, into a folder of its own",
        description="Writes into its folder NAME.ipynb, the notebook with its outputs,"
        " and NAME.json, whether it is done, its seconds and versions; after a failure"
        " NAME.unfinished.ipynb.",
    )
    parser.add_argument("notebook", help="a number (5), a name (05_supernet) or a path")
    parser.add_argument(
        "-p",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        dest="parameters",
        help="a parameter of the notebook, as often as there are any",
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        metavar="SECONDS",
        help="the longest one cell may take (the profile's)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where to (_build/runs/<notebook and parameters>)",
    )
    parser.set_defaults(run=run_one)


def run_one(options: argparse.Namespace) -> None:
    """Check, run and keep one notebook; what has run with the same inputs is not run
    again.
    """
    from minisupernet.course.runs.jobs import make_job
    from minisupernet.course.runs.parameters import read_word
    from minisupernet.course.runs.workers import carry_out
    from minisupernet.errors import RunError

    names = [name for name, _ in options.parameters]
    if twice := [name for place, name in enumerate(names) if name in names[:place]]:
        raise RunError(f"parameter {twice[0]} is given twice; leave one out.")
    given = {name: read_word(word) for name, word in options.parameters}
    job = make_job({"notebook": options.notebook, **given}, CHECKOUT)
    folder = options.out or CHECKOUT / "_build" / "runs" / job.folder()
    folder, name = folder.resolve(), Path(job.what).stem
    print(f"{name} runs in {folder}", flush=True)
    limits = {"seconds": options.timeout, "progress": True}
    ran = carry_out(job, folder, name, job.inputs(), **limits)
    how = "done" if ran else "already done with the same inputs"
    print(f"{folder / name}.ipynb: {how}")


def add_sweep(commands: argparse._SubParsersAction) -> None:
    """`sweep`: do the runs of a YAML file, here or on a cluster."""
    parser = commands.add_parser(
        "sweep",
        help="do many runs from a YAML file, here or on a Dask cluster",
        description="Writes into a folder: of each run RUN.json, its result, and"
        " RUN.log, what it says; of all summary.md and summary.png. What is done is not"
        " done again.",
    )
    parser.add_argument("file", type=Path, help="a YAML file, such as those in sweeps")
    add_workers(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where to (_build/sweeps/<file>)",
    )
    parser.add_argument(
        "--record",
        type=Path,
        metavar="PLACE",
        help="record each run as it ends, in this file (mine.json) or in those of the"
        " book (results)",
    )
    parser.set_defaults(run=run_sweep)


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Where runs are done, how many at once, and for how long at most."""
    parser.add_argument(
        "--workers",
        type=at_least(1),
        metavar="COUNT",
        default=os.cpu_count(),
        help="processes on this machine (its cores)",
    )
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="use the Dask cluster with this scheduler instead",
    )
    parser.add_argument(
        "--retries",
        type=at_least(0),
        metavar="COUNT",
        default=2,
        help="how often a run whose process died is repeated (2)",
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        metavar="SECONDS",
        help="the longest one run may take (no limit)",
    )
    parser.add_argument(
        "--threads",
        type=at_least(1),
        default=1,
        metavar="COUNT",
        help="CPU threads a run (1)",
    )


def run_sweep(options: argparse.Namespace) -> None:
    """Do what is not done, show a table of all that is, and name every failure."""
    from minisupernet.course.runs import summaries, sweeps
    from minisupernet.errors import RunError

    sweep = sweeps.read_sweep(options.file)
    runs = sweeps.runs_of(sweep, CHECKOUT, options.record)
    folder = options.out or CHECKOUT / "_build" / "sweeps" / sweep_name(options.file)
    folder, warned = folder.resolve(), False

    def keep(run: sweeps.Run) -> None:
        nonlocal warned
        if not warned and (lack := summaries.lacking(sweep, run, folder)):
            print(f"There will be no summary: {lack}", flush=True)
            warned = True
        if options.record:
            summaries.record(run, folder, options.record)

    limits = {"retries": options.retries, "timeout": options.timeout}
    limits |= {"threads": options.threads, "keep": keep}
    with sweeps.open_executor(options.workers, options.scheduler) as (executor, slots):
        failures = sweeps.do_runs(runs, folder, CHECKOUT, executor, slots, **limits)
    print(summaries.summarise(sweep, runs, folder))
    print(f"Results, table and figure are in {folder}.")
    if failures:
        raise RunError(
            f"{len(failures)} of {len(runs)} runs failed, as said above; the same"
            " command repeats them."
        )


def sweep_name(file: Path) -> str:
    """The folder of a sweep; behind the name of a file that is not the course's stand
    six letters, which tell it from others of that name."""
    from minisupernet.course.runs.jobs import short_digest

    file = file.resolve()
    if file.parent == CHECKOUT / "sweeps":
        return file.stem
    return f"{file.stem}-{short_digest(str(file))}"
