"""The command line: `python -m minisupernet data | book | notebooks | run | sweep |
experiment | study`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

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
    for add_command in (
        add_data,
        add_book,
        add_notebooks,
        add_run,
        add_sweep,
        add_experiment,
        add_study,
    ):
        add_command(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not type(error).__module__.startswith("minisupernet."):
            raise
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
    from minisupernet.course.runs.notebooks import refresh

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
    tasks = sweeps.tasks_of(sweep, CHECKOUT, to_record=options.record is not None)
    folder = (
        options.out or CHECKOUT / "_build" / "sweeps" / options.file.stem
    ).resolve()
    limits = {
        "retries": options.retries,
        "timeout": options.timeout,
        "threads": options.threads,
    }
    with sweeps.open_executor(options.workers, options.scheduler) as (executor, slots):
        failures = sweeps.run_tasks(tasks, folder, CHECKOUT, executor, slots, **limits)
    if options.record:
        summaries.record_sweep(tasks, folder, options.record)
    print(
        summaries.summarise(sweep, tasks, folder),
        f"Results, table and figure are in {folder}.",
        sep="\n",
    )
    if failures:
        raise RunError(
            f"{len(failures)} of {len(tasks)} runs failed, as said above; the same"
            " command repeats them."
        )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What every recorded run can be told: how large it is, and on what it runs."""
    parser.add_argument("--profile", choices=("quick", "full"), default="full")
    parser.add_argument(
        "--device", default="auto", help="auto, cuda, mps or cpu (auto)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (all)")


def add_experiment(commands: argparse._SubParsersAction) -> None:
    """`experiment`: run experiment 1 or 2 and record what it measured."""
    parser = commands.add_parser(
        "experiment",
        help="run experiment 1 or 2 and record it as JSON; needs no Jupyter",
    )
    parser.add_argument("number", type=int, choices=(1, 2))
    parser.add_argument(
        "--setup",
        default="many_tasks",
        help="which settings (many_tasks; see minisupernet.course.studies.setups)",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="one run a seed (0)"
    )
    parser.add_argument(
        "--folds",
        type=int,
        nargs="+",
        help="which tasks are held out (fold s for seed s)",
    )
    parser.add_argument(
        "--data",
        default="cifar100",
        help="auto, cifar100, shapes100 or a .npz file (cifar100)",
    )
    add_run_options(parser)
    parser.add_argument(
        "--out", type=Path, help="result file (results/0?_experiment_?.json)"
    )
    parser.set_defaults(run=run_experiment_command)


def run_experiment_command(options: argparse.Namespace) -> None:
    """Run each seed and fold and record it as soon as it is done; one already recorded
    is run again and replaced.
    """
    import torch

    from minisupernet.course.records import record_run
    from minisupernet.course.studies import arms as experiments
    from minisupernet.course.studies import setups
    from minisupernet.data import load
    from minisupernet.training import pick_device

    if options.threads:
        torch.set_num_threads(options.threads)
    setup = setups.make_setup(options.setup, options.number, options.profile)
    out = (
        options.out
        or CHECKOUT
        / "results"
        / f"{options.number + 5:02d}_experiment_{options.number}.json"
    )
    images = load(options.data, pick_device(options.device))
    for seed, fold in [
        (each, fold)
        for each in options.seeds
        for fold in options.folds or [each % setup.folds]
    ]:
        parts = (
            options.number,
            options.setup,
            options.profile,
            images.name,
            seed,
            fold,
        )
        name = "-".join(map(str, parts))
        checkpoint = CHECKOUT / "_build" / "checkpoints" / f"{name}.safetensors"
        run = experiments.run_experiment(setup, images, seed, fold, checkpoint)
        record_run(out, run, keys=("setup", "seed", "fold"))
        checkpoint.unlink(missing_ok=True)
        print(f"{name}: recorded in {out}")


def add_study(commands: argparse._SubParsersAction) -> None:
    """`study`: measure the system of chapter 2, 3, 4 or 8 and record it."""
    parser = commands.add_parser(
        "study", help="measure the system of chapter 2, 3, 4 or 8 and record it as JSON"
    )
    parser.add_argument("name", help="net2net, static_hypernet, hyperlstm or pudnet")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="one run a seed (0)"
    )
    parser.add_argument(
        "--data",
        help="auto, cifar10, cifar100, shapes100 or a .npz file (the study's own)",
    )
    add_run_options(parser)
    parser.add_argument(
        "--out", type=Path, help="result file (the study's own in results/)"
    )
    parser.set_defaults(run=run_study)


def run_study(options: argparse.Namespace) -> None:
    """Measure each seed and record it as soon as it is done; a seed already recorded is
    replaced.
    """
    import torch

    from minisupernet.course.studies import record_study

    if options.threads:
        torch.set_num_threads(options.threads)
    for seed in options.seeds:
        path = record_study(
            options.name,
            seed,
            options.profile,
            options.data,
            options.device,
            options.out,
        )
        print(f"{options.name}, seed {seed}: recorded in {path}")


if __name__ == "__main__":
    sys.exit(main())
