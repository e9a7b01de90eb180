"""How a job is done so that nothing is lost: alone, in a process of its own, its result
a file that is whole or absent.

A job holds a lock of the operating system while it runs, which ends with its process
however that ends; and the process ends with the one that started it. Death, a full disk
or a hang of one job therefore touches no other.
"""

import glob
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from minisupernet.course.runs.jobs import Job, make_job
from minisupernet.course.runs.notebooks import writing
from minisupernet.errors import CourseError, RunError
from minisupernet.files import whole_file

__all__ = [
    "Claimed",
    "Outcome",
    "attempt",
    "carry_out",
    "finished",
    "limits",
    "one_line",
    "serve",
]


class Claimed(RunError):
    """A run that another process is busy with."""


class Outcome(NamedTuple):
    """How one try ended: "done", "claimed" by another process, "failed", or "died"; and
    why, in one line.
    """

    status: str
    reason: str = ""


def finished(folder: Path, name: str, inputs: str) -> dict | None:
    """The kept result of a run with these inputs, None where there is none, or one that
    is damaged or failed.
    """
    try:
        document = json.loads((folder / f"{name}.json").read_bytes())
        return (
            document
            if (document["status"], document["inputs"]) == ("done", inputs)
            else None
        )
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None


def carry_out(job: Job, folder: Path, name: str, inputs: str, **options: Any) -> bool:
    """Do a job and keep its result as `<name>.json` in `folder`; False where that is
    there already.

    A failure is kept too, with status "failed" and its error, and is tried again the
    next time.

    Raises:
        Claimed: where another process is busy with it.
        RunError: where code or images are no longer those of `inputs`, and whatever the
            job raises.
        FileError: where `folder` cannot be written.
    """
    with _claim(folder, name):
        if finished(folder, name, inputs) and job.whole(folder, name):
            return False
        if job.inputs() != inputs:
            raise RunError(
                f"{name}: its code or images changed, or are others on this machine;"
                " start the sweep again."
            )
        began = time.perf_counter()
        try:
            result = job.measure(folder, name, **options)
        except Exception as error:
            outcome = {"status": "failed", "error": _without_folders(one_line(error))}
            _keep(job, folder, name, inputs, began, outcome)
            raise
        _keep(job, folder, name, inputs, began, {"status": "done", "result": result})
        (folder / f"{name}.safetensors").unlink(missing_ok=True)
    return True


def attempt(
    order: Mapping[str, Any],
    command: Sequence[str],
    timeout: float | None,
    threads: int,
) -> Outcome:
    """Do one job in a process of its own, here or on a Dask worker, and say how it
    ended; raises nothing of the job.

    Args:
        order: settings, root, folder, name and inputs of the job, as plain values.
        command: starts a process that calls `serve`.
        timeout: seconds after which the process is killed.
        threads: CPU threads of the process.
    """
    quiet = {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | limits(threads) | quiet,
        text=True,
    ) as process:
        try:
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()  # and it stays open: the process ends when it closes
            process.wait(timeout)
        except BrokenPipeError:
            process.wait()
        except subprocess.TimeoutExpired:
            return Outcome(
                "failed",
                f"{order['name']}: stopped, as it took more than {timeout:g} s.",
            )
        finally:
            process.kill()
        answer = process.stdout.read()
    if answer:
        return Outcome(*json.loads(answer))
    hint = ", often for want of memory" if process.returncode == -9 else ""
    return Outcome(
        "died",
        f"{order['name']}: its process died with exit status"
        f" {process.returncode}{hint}.",
    )


def limits(threads: int) -> dict[str, str]:
    """The environment of a process that computes on so many CPU threads."""
    libraries = ("OMP", "MKL", "OPENBLAS")
    return {f"{library}_NUM_THREADS": str(threads) for library in libraries}


def serve(make: Callable[[Mapping[str, Any], Path], Job] = make_job) -> None:
    """Do the one job that stands on the standard input, for `attempt`; its prints go to
    `<name>.log` in the folder.
    """
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with os.fdopen(os.dup(1), "w") as answer:
        folder, name = Path(order["folder"]), order["name"]
        try:
            with writing(folder):
                _print_to(folder / f"{name}.log")
            job = make(order["settings"], Path(order["root"]))
            carry_out(job, folder, name, order["inputs"])
            outcome = Outcome("done")
        except Claimed:
            outcome = Outcome("claimed")
        except Exception as error:
            said = one_line(error)
            named = said.startswith((f"{name}:", f"{name},"))
            outcome = Outcome("failed", said if named else f"{name}: {said}")
            with suppress(OSError):
                traceback.print_exc()
        json.dump(outcome, answer)


def _end_with_parent() -> None:
    """Wait for the end of the standard input, which comes when the parent ends, and end
    at once.
    """
    while os.read(0, 1024):
        pass
    os._exit(1)


def _print_to(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)


@contextmanager
def _claim(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock of one run, and clear away what a killed holder left half
    written.
    """
    with writing(folder):
        (folder / ".claims").mkdir(exist_ok=True)
        lock = FileLock(folder / ".claims" / f"{name}.lock")
        try:
            lock.acquire(timeout=1)
        except Timeout as error:
            raise Claimed(
                f"{name} is being run by another process; wait for it."
            ) from error
        for part in folder.glob(f".{glob.escape(name)}.*.part"):
            part.unlink()
    try:
        yield
    finally:
        lock.release()


def _keep(
    job: Job, folder: Path, name: str, inputs: str, began: float, outcome: dict
) -> None:
    """Write `<name>.json`."""
    versions = {each: metadata.version(each) for each in ("torch", "numpy")} | {
        "python": platform.python_version()
    }
    about = {"run": job.settings(), "inputs": inputs, "versions": versions}
    document = about | {"seconds": round(time.perf_counter() - began, 2)} | outcome
    try:
        text = json.dumps(document, indent=1, allow_nan=False)
    except ValueError as error:
        raise RunError(
            f"{name}: its result holds a value that is not a finite number; lower the"
            " rate."
        ) from error
    with whole_file(folder / f"{name}.json") as part:
        part.write_text(text + "\n", encoding="utf-8")


def one_line(error: Exception) -> str:
    """What went wrong, in one line; errors of the package say it themselves, others
    need their name."""
    line = (str(error).strip().splitlines() or [""])[0]
    ours = isinstance(error, CourseError)
    return line if ours else f"{type(error).__name__}: {line}"


def _without_folders(text: str) -> str:
    """The text with every path cut to its last part."""
    return re.sub(
        r"(?<![\w.:/])(?:~|[A-Za-z]:)?[\\/](?:[^\s'\"\\/:,;]+[\\/])+",
        "",
        text.replace(str(Path.home()), "~"),
    )


if __name__ == "__main__":
    serve()
