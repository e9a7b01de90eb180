"""The one training loop: plain PyTorch, a progress bar, a History, checkpoints, and a
clear stop on a bad loss.

Randomness in this course is a function of the step: `step_generator(seed, step)` draws
the batch of that step and nothing else does. Two arms of an experiment with one seed
therefore see the same images in the same order, and a run resumed from a checkpoint is
the run that was never broken.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

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
            from there.
        mixed: bfloat16 where autocast thinks it safe; None means on CUDA only.

    Raises:
        TrainingError: at the first step whose loss is not a finite number, or for a
            checkpoint of another run.
    """
    device = next(state.parameters()).device
    autocast = torch.autocast(
        device.type,
        torch.bfloat16,
        enabled=device.type == "cuda" if mixed is None else mixed,
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    keep_memory()
    start, history = _resume(checkpoint, state, optimizer, steps)
    losses, clock = _Losses(start, rates), _Clock(history)
    quiet = bool(
        os.environ.get("TQDM_DISABLE")
    )  # in a notebook tqdm does not look by itself
    for step in tqdm(
        range(start, steps),
        initial=start,
        total=steps,
        desc=label,
        leave=False,
        disable=quiet,
    ):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step / steps)
        with autocast:
            loss = loss_at(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.add(loss)
        if (step + 1) % every == 0 or step + 1 == steps:
            row = {"step": step + 1, "loss": losses.mean(), "seconds": clock.seconds()}
            with torch.no_grad():
                history.rows.append(row | (evaluate() if evaluate else {}))
            _save(checkpoint, state, optimizer, steps, history)
    return history


class _Clock:
    """Seconds of this run, those before an interruption included."""

    def __init__(self, history: History) -> None:
        self.start = time.perf_counter() - (
            history.last("seconds") if history.rows else 0.0
        )

    def seconds(self) -> float:
        return time.perf_counter() - self.start


class _Losses:
    """Losses since the last look, kept on the device; stops the run at the first that
    is not a finite number.
    """

    def __init__(self, step: int, rates: list[float]) -> None:
        self.step, self.rates = (
            step,
            rates,
        )  # step: number of the first loss in `recent`
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


def _save(
    path: str | Path | None,
    state: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    history: History,
):
    """Write model, optimiser and random state to `path`, whole or not at all."""
    if path is None:
        return
    tensors = {f"state.{name}": tensor for name, tensor in state.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer.{index}.{key}": torch.as_tensor(v)
            for key, v in slots.items()
            if v is not None
        }
    tensors["random"] = torch.get_rng_state()
    notes = {"steps": str(steps), "history": json.dumps(history.rows)}
    with whole_file(path) as part:
        try:
            save_file(
                {
                    name: tensor.detach().cpu().contiguous().clone()
                    for name, tensor in tensors.items()
                },
                part,
                notes,
            )
        except SafetensorError as error:
            raise OSError(f"the checkpoint could not be written ({error})") from error


def _resume(
    path: str | Path | None,
    state: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
):
    """(first step to do, History so far): from the checkpoint if there is one, else (0,
    empty).
    """
    if path is None or not Path(path).exists():
        return 0, History()
    try:
        with safe_open(path, "pt") as file:
            notes, tensors = (
                file.metadata() or {},
                {name: file.get_tensor(name) for name in file.keys()},
            )
        if int(notes["steps"]) != steps:
            raise ValueError(
                f"it is of a run of {notes['steps']} steps, this one has {steps}"
            )
        history = History(json.loads(notes["history"]))
        start = int(history.last("step"))
        state.load_state_dict(
            {
                n.removeprefix("state."): t
                for n, t in tensors.items()
                if n.startswith("state.")
            }
        )
        optimizer.load_state_dict(_optimizer_state(optimizer, tensors))
        torch.set_rng_state(tensors["random"])
    except (SafetensorError, LookupError, ValueError, TypeError, RuntimeError) as error:
        raise TrainingError(
            f"cannot go on from {path}: {error}; delete it to start anew."
        ) from error
    return start, history


def _optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> dict:
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            slots.setdefault(int(index), {})[key] = tensor
    return {"state": slots, "param_groups": optimizer.state_dict()["param_groups"]}
