"""Recorded results: JSON files with provenance, and the intervals drawn from them."""

import hashlib
import json
import platform
import subprocess
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn

from minisupernet.data import ImageSet
from minisupernet.data.text import Text
from minisupernet.errors import ResultError
from minisupernet.files import whole_file

__all__ = [
    "device_name",
    "fingerprint",
    "load_runs",
    "one_of_a_pair",
    "provenance",
    "record_run",
    "results_file",
    "once",
    "rounded",
    "rounded_rows",
    "task_means",
    "task_values",
    "unit_means",
]


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over every parameter and buffer, byte for byte: equal before and after
    means nothing moved.
    """
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(
            name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes()
        )
    return digest.hexdigest()


def provenance(images: ImageSet | Text, device: torch.device) -> dict:
    """Where a result comes from: commit, package versions, device and image set, or
    text, with its checksum.
    """
    packages = ("torch", "numpy", "safetensors")
    return {
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "device": (
            f"{device.type}: {device_name(device)}, threads: {torch.get_num_threads()}"
        ),
        "data": {"name": images.name, "sha256": images.checksum()},
    }


def device_name(device: torch.device) -> str:
    """What a device is called: the name of a GPU, or the kind of CPU."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} CPU"
    )


def _commit() -> str:
    """The commit, with "+" behind it where the package has uncommitted changes;
    "unknown" outside git.
    """
    folder = Path(__file__).parents[1]
    try:
        ask = {"cwd": folder, "capture_output": True, "text": True, "check": True}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **ask).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", "."], **ask
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed else "")


def rounded(values: torch.Tensor) -> list[float]:
    """The values of a tensor (N,) as they are recorded, to four digits."""
    return [round(value, 4) for value in values.tolist()]


def rounded_rows(rows: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """The rows of a history as they are recorded, to four digits."""
    return [{name: round(value, 4) for name, value in row.items()} for row in rows]


def once(kept: Path | None, name: str, measure: Callable[[], dict]) -> dict:
    """What `measure` returns, kept under its name in a JSON file, so that a run that is
    killed does not measure it again; None keeps nothing."""
    if kept is None:
        return measure()
    done = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if name not in done:
        done[name] = measure()
        with whole_file(kept) as part:
            part.write_text(json.dumps(done), encoding="utf-8")
    return done[name]


def load_runs(path: str | Path) -> list[dict]:
    """The runs recorded in a result file, one dict each.

    Raises:
        ResultError: where the file is missing, is not JSON, or holds no runs.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        commands = "`python -m minisupernet sweep FILE --record results`"
        raise ResultError(f"there is no {path}; record it with {commands}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ResultError(
            f"{path} cannot be read as JSON ({error}); restore it or record it anew."
        ) from error
    runs = document.get("runs") if isinstance(document, dict) else None
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise ResultError(
            f"{path} is no result file: it has no list of runs; restore it or record it"
            " anew."
        )
    return runs


def record_run(path: str | Path, run: dict, keys: tuple[str, ...]) -> None:
    """Add one run to a result file, in place of an older one with the same values of
    `keys`; safe side by side.

    A run that does not say its profile is full: runs of experiments did not, once.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        runs = load_runs(path) if path.exists() else []
        others = [{"profile": "full"} | old for old in runs]
        other = [any(old.get(key) != run[key] for key in keys) for old in others]
        runs = [old for old, differs in zip(runs, other, strict=True) if differs]
        runs.append(run)
        runs.sort(key=lambda each: [str(each.get(key)) for key in keys])
        with whole_file(path) as part:
            part.write_text(
                json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8"
            )


def results_file(name: str) -> Path:
    """Where a recorded result lies: in the repository, or with the installed
    package.
    """
    here = Path(__file__).parents[1]
    in_repository = here.parent / "results" / name
    return in_repository if in_repository.exists() else here / "recorded" / name


def task_means(
    runs: Sequence[dict],
    setup: str,
    arm: str,
    size: int | None = None,
    measure: str = "test",
) -> dict[int, float]:
    """The accuracy of each task under one arm, a mean over the runs that measured it:
    {task number: accuracy}.

    Where both orientations of a pair are held out they count as one task, numbered as
    the first: they share images, and an interval over them as if they were two would be
    too narrow.

    Args:
        runs: as `load_runs` gives them, of one experiment.
        setup: the name of a set-up, such as "original".
        arm: a key of a run's "arms" (held-out tasks), or "right_z" or "wrong_z"
            (trained tasks).
        size: training images of each class, for the arms measured with few; None for
            all.
        measure: "test", or "validation_each" for the images on which choices are made.

    Raises:
        ResultError: where no run has it.
    """
    found: dict[int, list[float]] = {}
    for run in _with_arm(runs, setup, arm, size):
        for number, value in task_values(run, arm, size, measure).items():
            found.setdefault(one_of_a_pair(number, run), []).append(value)
    return {
        number: sum(values) / len(values) for number, values in sorted(found.items())
    }


def unit_means(
    runs: Sequence[dict],
    setup: str,
    arm: str,
    size: int | None = None,
    less: str | None = None,
) -> dict[tuple[int, int], float]:
    """The test accuracy of one arm in each run, a mean over its tasks: {(fold, seed):
    accuracy}. A run is a generator with tasks of its own, the unit of an interval.

    Args:
        runs, setup, arm, size: as `task_means` takes them.
        less: another arm, whose accuracy is taken off task by task, over the tasks that
            both measured; only runs that have both count.

    Raises:
        ResultError: where no run has it.
    """
    found = {}
    for run in _with_arm(runs, setup, arm, size):
        values = task_values(run, arm, size)
        if less is not None:
            others = task_values(run, less, size)
            values = {t: values[t] - others[t] for t in values if t in others}
        if values:
            found[run["fold"], run["seed"]] = sum(values.values()) / len(values)
    if not found:
        raise _no_arm(less or arm, size, setup)
    return found


def task_values(
    run: dict, arm: str, size: int | None = None, measure: str = "test"
) -> dict[int, float]:
    """What one run measured of an arm: {task number: accuracy}, empty where it did
    not."""
    arms = run["arms"] if size is None else run.get("few", {}).get(str(size), {})
    if arm in arms:  # the unfrozen arm stops after a few tasks
        return dict(zip(run["held_out"], arms[arm][measure], strict=False))
    if size is None and arm in run["trained"]:
        return dict(zip(_trained_tasks(run), run["trained"][arm], strict=True))
    return {}


def _with_arm(
    runs: Sequence[dict], setup: str, arm: str, size: int | None
) -> list[dict]:
    """The runs of a set-up that measured an arm, with so many images a class."""
    mine = [run for run in runs if run["setup"] == setup]
    if found := [run for run in mine if task_values(run, arm, size)]:
        return found
    raise _no_arm(arm, size, setup)


def _no_arm(arm: str, size: int | None, setup: str) -> ResultError:
    images = "" if size is None else f" with {size} images a class"
    return ResultError(
        f"no recorded run has the arm '{arm}'{images} under the set-up '{setup}'."
    )


def one_of_a_pair(number: int, run: dict) -> int:
    """The number that a held-out task of a run counts as: where both orientations of a
    pair are, that of the first.
    """
    half = (len(run["held_out"]) + len(run["trained"]["right_z"])) // 2
    return number % half if run["settings"].get("pairs") else number


def _trained_tasks(run: dict) -> list[int]:
    total = len(run["held_out"]) + len(run["trained"]["right_z"])
    return [number for number in range(total) if number not in run["held_out"]]
