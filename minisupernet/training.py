"""The one training loop: plain PyTorch, a History, and below it the loop's care: a
progress bar, checkpoints, and a clear stop on a bad loss.

Randomness in this course is a function of the step: `step_generator(seed, step)` draws
the batch of that step and nothing else does. Two arms of an experiment with one seed
therefore see the same images in the same order, and a run resumed from a checkpoint is
the run that was never broken.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from minisupernet import __version__
from minisupernet.errors import TrainingError
from minisupernet.fast.memory import keep_memory
from minisupernet.files import whole_file

__all__ = [
    "History",
    "constant",
    "frozen",
    "one_cycle",
    "pick_device",
    "train",
    "wait_for",
]

CHECK_EVERY = 50  # steps between looks at the loss: looking makes a GPU wait


def pick_device(name: str = "auto") -> torch.device:
    """Choose a device: "auto" is cuda, else mps, else cpu; any other name is taken as
    it is.

    Raises:
        TrainingError: where that device is not on this machine.
    """
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise TrainingError(
                f"device '{name}' is not available here; use 'auto' or 'cpu'."
            ) from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def wait_for(device: torch.device) -> None:
    """Let a GPU finish what it was given, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def constant(done: float) -> float:
    """Schedule: the full learning rate at every fraction `done` of the run."""
    return 1.0


def one_cycle(done: float) -> float:
    """Schedule: a linear rise over the first quarter, then half a cosine down to 0."""
    return (
        max(done / 0.25, 0.02)
        if done < 0.25
        else 0.5 + 0.5 * math.cos(math.pi * (done - 0.25) / 0.75)
    )


@dataclass
class History:
    """What a run measured: one row a look, each a dict with `step`, `loss` (mean over
    the steps since the last row, on training batches), `seconds`, and whatever
    `evaluate` returned (on images no training saw)."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of one measurement, ready to plot."""
        rows = [row for row in self.rows if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]

    def last(self, name: str) -> float:
        """The newest value of one measurement."""
        return self.series(name)[1][-1]


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """Inside the block no parameter of `module` takes part in training; afterwards all
    is as before.
    """
    before = {parameter: parameter.requires_grad for parameter in module.parameters()}
    module.requires_grad_(False)
    try:
        yield module
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


def train(
    state: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_at: Callable[[int], Tensor],
    steps: int,
    *,
    schedule: Callable[[float], float] = constant,
    evaluate: Callable[[], dict[str, float]] | None = None,
    every: int = 100,
    checkpoint: str | Path | None = None,
    run: Mapping[str, str] | None = None,
    mixed: bool | None = None,
    label: str = "training",
) -> History:
    """Minimise `loss_at(step)` for a number of steps, in place, and return the History.

    Args:
        state: holds everything that is trained (saved in the checkpoint).
        loss_at: step number (from 0) to the scalar loss of that step's batch.
        schedule: fraction of the run done, 0 to 1, to a factor on every group's
            learning rate.
        evaluate: measurements on held-out images; called without gradients every
            `every` steps and at the end.
        checkpoint: safetensors file, written at every look; a run that finds it goes on
            from there, if it is the same run.
        run: what else makes this the run it is, such as its seed, tasks and the
            checksum of its images; kept in the checkpoint and compared.
        mixed: bfloat16 where autocast thinks it safe; None means on CUDA only.

    Raises:
        TrainingError: at the first step whose loss is not a finite number, for a
            checkpoint of another run, and for steps that are no whole number from 1.
    """
    _check(steps=steps, every=every)
    device = next(state.parameters()).device
    mixed = device.type == "cuda" if mixed is None else mixed
    told = {**(run or {}), "steps": steps, "every": every, "mixed": mixed}
    told |= {"device": device.type, "schedule": _name(schedule), **_settings(optimizer)}
    file = _Checkpoint(checkpoint, state, optimizer, told)
    history = file.resume()
    start = int(history.last("step")) if history.rows else 0
    clock = _Clock(history)
    keep_memory()
    with _rates(optimizer) as rates:
        losses = _Losses(start, rates)
        for step in _bar(start, steps, label):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(step / steps)
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                loss = loss_at(step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.add(loss)
            if (step + 1) % every == 0 or step + 1 == steps:
                row = {"step": step + 1, "loss": losses.mean()}
                row["seconds"] = clock.seconds()
                with torch.no_grad():
                    history.rows.append(row | (evaluate() if evaluate else {}))
                file.save(history)
    return history


def _check(**counts: int) -> None:
    for name, count in counts.items():
        if not isinstance(count, Integral) or count < 1:
            raise TrainingError(f"{name} must be a whole number from 1, not {count!r}.")


@contextmanager
def _rates(optimizer: torch.optim.Optimizer) -> Iterator[list[float]]:
    """The learning rates of the optimiser's groups, which get them back afterwards."""
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        yield rates
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _bar(start: int, steps: int, label: str) -> tqdm:
    """The steps, with a line of text as progress bar where somebody sees it move.

    It is gone afterwards. A widget would stay in a saved notebook, dead.
    """
    return tqdm(
        range(start, steps),
        initial=start,
        total=steps,
        desc=label,
        leave=False,
        file=sys.stdout if _kernel() else sys.stderr,
        disable=not _watched(),
    )


def _watched() -> bool:
    """Whether there is a terminal, or a notebook that a person runs.

    A front end with a person takes answers (`input()`); papermill, nbconvert and nbval
    say that they do not.
    """
    if os.environ.get("TQDM_DISABLE"):
        return False
    if kernel := _kernel():
        return getattr(kernel, "_allow_stdin", True)
    return sys.stderr.isatty()


def _kernel() -> object | None:
    """The kernel of the notebook that this runs in, if any."""
    shell = sys.modules.get("IPython")
    return shell and getattr(shell.get_ipython(), "kernel", None)


class _Clock:
    """Seconds of this run, those before an interruption included."""

    def __init__(self, history: History) -> None:
        before = history.last("seconds") if history.rows else 0.0
        self.start = time.perf_counter() - before

    def seconds(self) -> float:
        return time.perf_counter() - self.start


class _Losses:
    """Losses since the last look, kept on the device; stops the run at the first that
    is not a finite number.
    """

    def __init__(self, step: int, rates: list[float]) -> None:
        self.step, self.rates = step, rates  # step: that of the first loss in `recent`
        self.recent: list[Tensor] = []
        self.total, self.count = 0.0, 0

    def add(self, loss: Tensor) -> None:
        self.recent.append(loss.detach().float())
        if len(self.recent) == CHECK_EVERY:
            self._look()

    def mean(self) -> float:
        """Mean loss since the last call."""
        self._look()
        mean, self.total, self.count = self.total / self.count, 0.0, 0
        return mean

    def _look(self) -> None:
        values = torch.stack(self.recent).tolist() if self.recent else []
        for offset, value in enumerate(values):
            if not math.isfinite(value):
                raise TrainingError(
                    f"the loss became {value} at step {self.step + offset}: most likely"
                    f" a learning rate too high ({max(self.rates):g}); try a third of"
                    " it, and check that the inputs are normalised."
                )
        self.total, self.count = self.total + sum(values), self.count + len(values)
        self.step, self.recent = self.step + len(values), []


def _name(function: Callable) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def _settings(optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """The optimiser's name and the settings of each of its groups."""
    found: dict[str, object] = {"optimizer": type(optimizer).__name__}
    for number, group in enumerate(optimizer.param_groups):
        names = group.keys() - {"params"}
        found |= {f"{name} of group {number}": group[name] for name in sorted(names)}
    return found


class _Checkpoint:
    """Model, optimiser, random state and History of one run in a safetensors file, with
    what makes it this run; without a path nothing is kept.

    Args:
        run: everything by which runs are told apart; the versions are added here.
    """

    def __init__(
        self,
        path: str | Path | None,
        state: nn.Module,
        optimizer: torch.optim.Optimizer,
        run: Mapping[str, object],
    ) -> None:
        self.path, self.state, self.optimizer = path and Path(path), state, optimizer
        versions = {"minisupernet": __version__, "torch": torch.__version__}
        self.run = {name: str(value) for name, value in (versions | {**run}).items()}

    def save(self, history: History) -> None:
        """Write all, whole or not at all."""
        if self.path is None:
            return
        tensors = {
            f"state.{name}": own for name, own in self.state.state_dict().items()
        }
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {
                f"optimizer.{index}.{key}": torch.as_tensor(value)
                for key, value in slots.items()
                if value is not None
            }
        tensors["random"] = torch.get_rng_state()
        if self.run["device"] == "cuda":
            tensors["random on cuda"] = torch.cuda.get_rng_state()
        whole = {
            name: tensor.detach().cpu().contiguous().clone()
            for name, tensor in tensors.items()
        }
        notes = {"run": json.dumps(self.run), "history": json.dumps(history.rows)}
        with whole_file(self.path) as part:
            try:
                save_file(whole, part, notes)
            except SafetensorError as error:
                raise OSError(
                    f"the checkpoint could not be written ({error})"
                ) from error

    def resume(self) -> History:
        """Take over what the file holds; the History so far, empty without a file."""
        if self.path is None or not self.path.exists():
            return History()
        try:
            with safe_open(self.path, "pt") as file:
                notes = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            self._compare(notes)
            history = History(json.loads(notes["history"]))
            inside = 0 < history.last("step") <= int(self.run["steps"])
            if not (inside and 0 <= history.last("seconds") < math.inf):
                raise ValueError("its history does not end within the run")
            self._load(tensors)
        except (
            SafetensorError,
            LookupError,
            ValueError,
            TypeError,
            AttributeError,
            RuntimeError,
        ) as error:
            raise TrainingError(
                f"cannot go on from {self.path}: {error}; delete it to start anew."
            ) from error
        return history

    def _compare(self, notes: Mapping[str, str]) -> None:
        """Raise a ValueError that says in what the file's run differs from this one."""
        if "run" not in notes:
            raise ValueError("it does not say which run it is of")
        there = json.loads(notes["run"])
        differences = [
            _difference(
                name, there.get(name, "not given"), self.run.get(name, "not given")
            )
            for name in sorted(there.keys() | self.run.keys())
            if there.get(name) != self.run.get(name)
        ]
        if differences:
            raise ValueError(f"it is of another run ({', '.join(differences)})")

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        def part(kind: str) -> dict[str, Tensor]:
            own = [name for name in tensors if name.startswith(kind)]
            return {name.removeprefix(kind): tensors[name] for name in own}

        state, slots = part("state."), {}
        if _forms(state) != _forms(self.state.state_dict()):
            raise ValueError("its weights have other names, shapes or types")
        for name, tensor in part("optimizer.").items():
            index, key = name.split(".", 1)
            slots.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        torch.set_rng_state(tensors["random"])
        if self.run["device"] == "cuda":
            torch.cuda.set_rng_state(tensors["random on cuda"])
        self.state.load_state_dict(state)
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})


def _forms(tensors: Mapping[str, Tensor]) -> dict[str, tuple]:
    return {name: (own.shape, own.dtype) for name, own in tensors.items()}


def _difference(name: str, there: str, here: str) -> str:
    if len(there) + len(here) > 60:  # such as the list of all tasks
        return f"other {name}"
    return f"{name}: {there} there, {here} here"
