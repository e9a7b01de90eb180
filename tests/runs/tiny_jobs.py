"""Jobs of milliseconds that go wrong on demand; this file is also the process that does
one, and a sweep of many.

`python tiny_jobs.py serve` does what `python -m minisupernet.course.runs.workers` does;
`python tiny_jobs.py sweep FOLDER COUNT` does COUNT counting jobs on two workers.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from minisupernet.course.runs.jobs import Job
from minisupernet.course.runs.sweeps import Run, do_runs, open_executor
from minisupernet.course.runs.workers import serve
from minisupernet.files import whole_file

COMMAND = [sys.executable, __file__, "serve"]
STEPS = 6


class TinyJob(Job):
    """Counts in steps with a checkpoint, or does what `what` says."""

    def inputs(self) -> str:
        return f"{self.parameters.get('code', 'first')} {self.what}"

    def measure(self, folder: Path, name: str, **options) -> dict:
        with (folder / "starts.txt").open("a") as file:
            file.write(f"{name}\n")
        return getattr(self, self.what)(folder, name)

    def count(self, folder: Path, name: str) -> dict:
        """The sum of squares, going on from a checkpoint; leaves a complaint where it
        runs twice at once or again.
        """
        running, checkpoint = folder / f"{name}.running", folder / f"{name}.checkpoint"
        if (folder / f"{name}.json").exists() or alive(running):
            (folder / f"{name}.complaint").write_text("it runs twice")
        running.write_text(str(os.getpid()))
        step, total = (
            json.loads(checkpoint.read_text()) if checkpoint.exists() else (0, 0)
        )
        while step < STEPS:
            time.sleep(0.01)
            step, total = step + 1, total + (self.parameters["number"] + step) ** 2
            with whole_file(checkpoint) as part:
                part.write_text(json.dumps([step, total]))
        return {"value": total, "pid": os.getpid()}

    def die(self, folder: Path, name: str) -> dict:
        """Die as many times as `deaths` says."""
        if (folder / "starts.txt").read_text().count(name) <= self.parameters["deaths"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"value": 1}

    def hang(self, folder: Path, name: str) -> dict:
        (folder / f"{name}.running").write_text(str(os.getpid()))
        time.sleep(600)

    def wait(self, folder: Path, name: str) -> dict:
        """Wait until another run was kept."""
        while not (folder / "kept").exists():
            time.sleep(0.01)
        return {"value": 1}

    def nan(self, folder: Path, name: str) -> dict:
        return {"value": float("nan")}

    def large(self, folder: Path, name: str) -> dict:
        return {"value": "x" * 100_000}

    def stray(self, folder: Path, name: str) -> dict:
        raise OSError(
            f"no such file: {folder}/deep/lost.txt in {Path.home()}/secret/place.txt"
        )


def alive(running: Path) -> bool:
    """Whether the process whose number stands in this file is there and is not this
    one.
    """
    try:
        number = int(running.read_text() or 0)
        os.kill(number, 0)
        state = Path(f"/proc/{number}/stat")
        zombie = (
            state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] == "Z"
        )
        return number not in (0, os.getpid()) and not zombie
    except (OSError, ValueError):
        return False


def make_tiny(settings: Mapping, root: Path) -> TinyJob:
    return TinyJob(
        settings["what"],
        {name: value for name, value in settings.items() if name != "what"},
        root,
    )


def tiny_task(what: str, **parameters) -> Run:
    settings = {"what": what, **parameters}
    job = make_tiny(settings, Path())
    return Run(job, settings, job.label(), job.inputs())


def counting(count: int) -> list[Run]:
    return [tiny_task("count", number=number) for number in range(count)]


def run_tiny(
    tasks: Sequence[Run], folder: Path, executor=None, workers: int = 2, **options
) -> dict[str, str]:
    if executor is not None:
        return do_runs(tasks, folder, Path(), executor, command=COMMAND, **options)
    with open_executor(workers) as (pool, slots):
        return do_runs(tasks, folder, Path(), pool, slots, command=COMMAND, **options)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(make_tiny)
    else:
        sys.exit(
            bool(run_tiny(counting(int(sys.argv[3])), Path(sys.argv[2]), retries=50))
        )
