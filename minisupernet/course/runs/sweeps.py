"""Many runs from one YAML file: expanded, checked, done by an executor of
`concurrent.futures`, and summed up.

    fixed: {experiment: 1, profile: full, data: cifar100}  # the same in every run
    grid: {z_dim: [2, 4, 8], seed: [0, 1, 2]}      # every combination of these
    list: [{setup: better}, {setup: original}]     # sets of parameters, one by one
    summary: {values: [arms.z_only.test], by: z_dim}   # what is shown against what

The executor is a pool of threads, each with one process at a time, or a Dask cluster;
both do the same jobs.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ThreadPoolExecutor,
    wait,
)
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisupernet.course.runs.jobs import Job, make_job
from minisupernet.course.runs.parameters import plain, suggestion
from minisupernet.course.runs.workers import Outcome, attempt, finished, one_line
from minisupernet.errors import CourseError, RunError

__all__ = [
    "Run",
    "Sweep",
    "do_runs",
    "open_executor",
    "read_sweep",
    "run_notebooks",
    "runs_of",
]

MOST_RUNS = 10_000
SERVE = (sys.executable, "-m", "minisupernet.course.runs.workers")


@dataclass(frozen=True)
class Sweep:
    """What a YAML file asks for: the settings of each run, and what of their results is
    shown against what.
    """

    runs: tuple[dict[str, Any], ...]
    values: tuple[str, ...]
    by: str


@dataclass(frozen=True)
class Run:
    """A job with its settings, the name of its files, and the checksum of its
    inputs.
    """

    job: Job
    settings: dict[str, Any]
    name: str
    inputs: str


def read_sweep(path: str | Path) -> Sweep:
    """Read and expand a YAML file; a run that it describes twice counts once.

    Raises:
        RunError: where the file is missing, is no YAML, or is not of the form above.
    """
    document = _read_yaml(Path(path))
    _check_entries(path, document)
    grid = {
        name: value if isinstance(value, list) else [value]
        for name, value in document.get("grid", {}).items()
    }
    fixed, chosen = document.get("fixed", {}), document.get("list", [{}])
    if not 0 < (count := len(chosen) * math.prod(map(len, grid.values()))) <= MOST_RUNS:
        raise RunError(
            f"{path} describes {count} runs; a sweep has 1 to {MOST_RUNS:,}."
        )
    runs = {}
    for each, values in itertools.product(chosen, itertools.product(*grid.values())):
        run = fixed | each | dict(zip(grid, values, strict=True))
        run = {_name(path, name): plain(name, value) for name, value in run.items()}
        runs[repr(sorted(run.items()))] = run
    summary = document.get("summary", {})
    values = summary.get("values", ["seconds"])
    by = summary.get("by", next(iter(grid), "seed"))
    _check_summary(
        path, summary, values, by, {name for run in runs.values() for name in run}
    )
    return Sweep(tuple(runs.values()), tuple(values), by)


def _check_entries(path: str | Path, document: dict) -> None:
    """Refuse an entry that is not known, of another kind, or that another overrules."""
    keys = {"fixed": dict, "grid": dict, "list": list, "summary": dict}
    for key, value in document.items():
        if key not in keys:
            near = suggestion(str(key), keys)
            raise RunError(f"{path} has the unknown entry '{key}'{near}")
        if not isinstance(value, keys[key]):
            wanted, found = keys[key].__name__, type(value).__name__
            raise RunError(f"{path}: '{key}' must be a {wanted}, not {found}.")
    chosen = document.get("list", [])
    if not all(isinstance(each, dict) for each in chosen):
        raise RunError(
            f"{path}: each entry of 'list' must be a set of parameters, as in {{seed:"
            " 0}."
        )
    listed = {name for each in chosen for name in each}
    if both := sorted(map(str, listed & document.get("grid", {}).keys())):
        raise RunError(f"{path}: {both[0]} is in 'list' and in 'grid'; leave one out.")


def _check_summary(
    path: str | Path, summary: dict, values: object, by: object, known: set[str]
) -> None:
    """Refuse a summary that no run could fill."""
    texts = [*values, by] if isinstance(values, list) else []
    if not (texts[1:] and all(isinstance(each, str) for each in texts)):
        raise RunError(
            f"{path}: 'summary' must be like {{values: [arms.z_only.test], by: seed}}."
        )
    for name in summary.keys() - {"values", "by"}:
        near = suggestion(str(name), ("values", "by"))
        raise RunError(f"{path}: 'summary' has the unknown entry '{name}'{near}")
    if "by" in summary and by not in known:
        near = suggestion(by, known)
        raise RunError(f"{path}: no run has the parameter '{by}' to sum up by{near}")


def runs_of(sweep: Sweep, root: Path, to_record: Path | None = None) -> list[Run]:
    """Every run of a sweep, checked, with the place `to_record` it.

    Raises:
        RunError: for the first run that cannot start, or that cannot be recorded where
            it is to be.
        ResultError: where that place holds no runs.
    """
    runs = []
    for settings in sweep.runs:
        job = make_job(settings, root)
        job.check_images()
        for value in sweep.values:
            job.check_value(value)
        if to_record:
            job.record_file(to_record)
        inputs = job.inputs()
        runs.append(Run(job, settings, f"{job.label()}-{inputs[:12]}", inputs))
    return runs


@contextmanager
def open_executor(
    workers: int, scheduler: str | None = None
) -> Iterator[tuple[Executor, int]]:
    """An executor and how many runs it does at once: threads of this process, or the
    Dask cluster at `scheduler`.

    Raises:
        RunError: where `distributed` is not installed, the cluster does not answer or
            goes away, or has no workers.
    """
    if scheduler is None:
        if workers < 1:
            raise RunError(f"a sweep needs at least one worker, not {workers}.")
        pool = ThreadPoolExecutor(workers)
        try:
            yield pool, workers
        finally:
            pool.shutdown(cancel_futures=True)  # interrupted, it starts no more runs
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise RunError(
            'a cluster needs Dask; run `python -m pip install -e ".[cluster]"`.'
        ) from error
    try:
        client = Client(scheduler, timeout=10)
    except (OSError, ValueError) as error:
        raise RunError(
            f"no Dask scheduler answers at {scheduler}; start one with `dask"
            " scheduler`."
        ) from error
    with client:
        if not (slots := sum(client.nthreads().values())):
            raise RunError(
                f"the cluster at {scheduler} has no workers; start one with `dask"
                f" worker {scheduler}`."
            )
        try:
            yield client.get_executor(pure=False), slots
        except Exception as error:
            if client.status != "closed":
                raise
            raise RunError(
                f"the cluster at {scheduler} went away; start it and this sweep again."
            ) from error


def do_runs(
    runs: Sequence[Run],
    folder: Path,
    root: Path,
    executor: Executor,
    slots: int = 1,
    retries: int = 2,
    timeout: float | None = None,
    threads: int = 1,
    command: Sequence[str] = SERVE,
    keep: Callable[[Run], None] = lambda run: None,
) -> dict[str, str]:
    """Do every run that is not finished, say how it goes, and return the failures:
    {name: why}.

    Args:
        slots: how many the executor does at once; only shown.
        retries: how often a run whose process died is started again.
        timeout: seconds that one run may take.
        command: starts a process that calls `workers.serve`.
        keep: called with each run as it ends well, and at the start with those that had
            ended before; a run that it refuses, by an error of the package, has failed.
    """
    over = [run for run in runs if _is_over(run, folder)]
    todo = [run for run in runs if run not in over]
    progress = _Progress(runs, over, folder, slots)
    failures: dict[str, str] = {}
    deaths: Counter[str] = Counter()

    def submit(run: Run) -> Future:
        settings = run.settings | run.job.parameters  # with whole paths
        order = {"settings": settings, "root": str(root), "folder": str(folder)}
        order |= {"name": run.name, "inputs": run.inputs}
        return executor.submit(attempt, order, list(command), timeout, threads)

    def end(run: Run, reason: str = "") -> None:
        if reason := reason or _refused(keep, run):
            failures[run.name] = reason
        progress.ended(run, reason)

    for run in over:
        end(run)
    pending = {submit(run): run for run in todo}
    while pending:
        for future in wait(pending, timeout=1, return_when=FIRST_COMPLETED).done:
            run = pending.pop(future)
            status, reason = _outcome(future)
            deaths[run.name] += status == "died"
            again = status == "died" and deaths[run.name] <= retries
            if again or status == "claimed":
                pending[submit(run)] = run
            else:
                end(run, reason)
    return failures


def _refused(keep: Callable[[Run], None], run: Run) -> str:
    """Why a run that ended well could not be kept; empty where it was."""
    try:
        keep(run)
    except CourseError as error:
        return f"{run.name}: {one_line(error)}"
    return ""


def _is_over(run: Run, folder: Path) -> bool:
    found = finished(folder, run.name, run.inputs)
    return found is not None and run.job.whole(folder, run.name)


class _Progress:
    """Lines for a terminal and a log alike: what there is to do, and each run as it
    ends."""

    def __init__(
        self, runs: Sequence[Run], over: Sequence[Run], folder: Path, slots: int
    ) -> None:
        self.total, self.done, self.began = len(runs), 0, time.perf_counter()
        self.before = {run.name for run in over}
        number = f"{self.total} run{'s' if self.total > 1 else ''}"
        self._print(f"{number}, {len(over)} done before, results in {folder}")
        if at_once := min(slots, self.total - len(over)):
            self._print(f"{at_once} at once; what each says is in its .log there")

    def ended(self, run: Run, reason: str) -> None:
        self.done += 1
        minutes = (time.perf_counter() - self.began) / 60
        part = f"[{self.done}/{self.total}, {minutes:.1f} minutes]"
        if reason:
            self._print(f"{part} failed: {reason}")
        elif run.name not in self.before:
            self._print(f"{part} {run.name}: done")

    def _print(self, line: str) -> None:
        print(line, flush=True)  # at once, also into a file


def _outcome(future: Future) -> Outcome:
    try:
        return future.result()
    except Exception as error:  # the worker itself died, or the cluster went away
        return Outcome("died", one_line(error))


def _read_yaml(path: Path) -> dict:
    try:
        import yaml
    except ImportError as error:
        raise RunError(
            "a sweep needs PyYAML; run `python -m pip install pyyaml`."
        ) from error
    try:
        document = yaml.load(path.read_bytes(), _loader(path))
    except RunError:
        raise
    except OSError as error:
        raise RunError(
            f"the sweep {path} cannot be read ({error.strerror}); check the path."
        ) from error
    except Exception as error:  # damaged YAML fails in many ways
        raise RunError(f"{path} is no YAML: {one_line(error)}") from error
    if not isinstance(document, dict):
        raise RunError(f"{path} must have entries such as 'fixed' and 'grid'.")
    return document


def _loader(path: Path) -> type:
    """YAML's safe loader, which takes the last of two equal keys: here it refuses."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: Loader, node: yaml.MappingNode) -> dict:
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for place, key in enumerate(keys) if key in keys[:place]]:
            line = node.start_mark.line + 1
            raise RunError(
                f"{path}: '{twice[0]}' stands twice in the set at line {line}."
            )
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    return Loader


def _name(path: str | Path, name: Any) -> str:
    if not isinstance(name, str):
        raise RunError(
            f"{path}: the parameter name {name!r} is no text; write it in quotes."
        )
    return name


def run_notebooks(
    paths: Sequence[Path], folder: Path, parameters: Mapping[str, Any], root: Path
) -> None:
    """Run notebooks to `folder/<name>.ipynb`, two at a time where there are the cores,
    each as a run of a sweep is done.

    Raises:
        RunError: before any runs, for wrong parameters; after all have been tried, a
            line for each that failed.
    """
    runs = []
    for path in paths:
        settings = {"notebook": str(path), **parameters}
        job = make_job(settings, root)
        runs.append(Run(job, settings, path.stem, job.inputs()))
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    at_once = min(2, cores, len(paths))
    with open_executor(at_once) as (pool, slots):
        threads = {"threads": cores // at_once, "retries": 0}
        failures = do_runs(runs, folder, root, pool, slots, **threads)
    if failures:
        raise RunError("\n".join(failures[name] for name in sorted(failures)))
