"""The command line: `python -m minisupernet data | book | notebooks | run | sweep`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from minisupernet.errors import CourseError

__all__ = ["main"]

CHECKOUT = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status; an error of the package is one line
    and no traceback.
    """
    parser = argparse.ArgumentParser(
        prog="python -m minisupernet", description="Networks that make networks."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for add_command in (add_data, add_book, add_notebooks, add_run, add_sweep):
        add_command(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        return 130
    except CourseError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def add_data(commands: argparse._SubParsersAction) -> None:
    """`data`: download CIFAR-100 and CIFAR-10."""
    parser = commands.add_parser(
        "data", help="download CIFAR-100 and CIFAR-10 and check the files"
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
    parser = commands.add_parser("book", help="run the notebooks and build the book")
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
        help="take the stored outputs and run nothing",
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
    )
    parser.set_defaults(run=run_notebooks)


def run_notebooks(options: argparse.Namespace) -> None:
    """Refresh the stored outputs."""
    from minisupernet.course.book import refresh

    refresh(CHECKOUT)


def add_run(commands: argparse._SubParsersAction) -> None:
    """`run`: run one notebook with parameters."""
    parser = commands.add_parser(
        "run", help="run one notebook with parameters, into a folder of its own"
    )
    parser.add_argument("notebook", help="a number (5), a name (05_supernet) or a path")
    parser.add_argument(
        "-p",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        dest="parameters",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="the longest one cell may take (the profile's)",
    )
    parser.add_argument(
        "--out", type=Path, help="folder (_build/runs/<notebook and parameters>)"
    )
    parser.set_defaults(run=run_one)


def run_one(options: argparse.Namespace) -> None:
    """Check, run and keep one notebook; what has run with the same inputs is not run
    again.
    """
    from minisupernet.course.runs.jobs import make_job
    from minisupernet.course.runs.parameters import read_word
    from minisupernet.course.runs.workers import carry_out

    settings = {
        "notebook": options.notebook,
        **{name: read_word(word) for name, word in options.parameters},
    }
    job = make_job(settings, CHECKOUT)
    folder, name = (
        (options.out or CHECKOUT / "_build" / "runs" / job.label()).resolve(),
        Path(job.what).stem,
    )
    ran = carry_out(
        job, folder, name, job.inputs(), seconds=options.timeout, progress=True
    )
    print(
        f"{folder / name}.ipynb:"
        f" {'done' if ran else 'already done with the same inputs'}"
    )


def add_sweep(commands: argparse._SubParsersAction) -> None:
    """`sweep`: do the runs of a YAML file, here or on a cluster."""
    parser = commands.add_parser(
        "sweep", help="do many runs from a YAML file, here or on a Dask cluster"
    )
    parser.add_argument("file", type=Path, help="as in sweeps/")
    parser.add_argument(
        "--workers",
        type=int,
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
        type=int,
        default=2,
        help="how often a run whose process died is repeated (2)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="the longest one run may take (no limit)",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a run (1)")
    parser.add_argument("--out", type=Path, help="folder (_build/sweeps/<file>)")
    parser.add_argument(
        "--record", type=Path, help="result file, or the folder of the book's: results"
    )
    parser.set_defaults(run=run_sweep)


def run_sweep(options: argparse.Namespace) -> None:
    """Do what is not done, show a table of all that is, and name every failure."""
    from minisupernet.course.runs import summaries, sweeps
    from minisupernet.errors import RunError

    sweep = sweeps.read_sweep(options.file)
    runs = sweeps.runs_of(sweep, CHECKOUT, options.record)
    folder = options.out or CHECKOUT / "_build" / "sweeps" / options.file.stem
    folder = folder.resolve()

    def keep(run: sweeps.Run) -> None:
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
