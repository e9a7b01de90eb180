"""Chapter 4: LSTM, LSTM with layer normalisation and HyperLSTM with equally many
parameters, on text and on images.

For more than two CPU cores can do, call `measure` with larger `Settings`.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minisupernet.classification import accuracy
from minisupernet.course.studies.rates import best_rate
from minisupernet.data import ImageSet, augment, normalise
from minisupernet.data.images import held_back
from minisupernet.data.text import (
    CharacterModel,
    Text,
    bits_per_character,
    language_loss,
    python_help,
    streams,
)
from minisupernet.hyperlstm import HyperLSTM
from minisupernet.recurrent import LayerNormLSTM
from minisupernet.seeds import step_generator
from minisupernet.training import History, one_cycle, train, wait_for

__all__ = [
    "MODELS",
    "Settings",
    "Task",
    "final_run",
    "image_task",
    "matched_sizes",
    "measure",
    "measure_task",
    "parameters",
    "text_task",
]

MODELS = ("lstm", "layer_norm_lstm", "hyperlstm")


@dataclass(frozen=True)
class Settings:
    """How much is trained; the same for every model.

    `text_steps`, `image_steps`: training steps of the final run; the trial of each of
    the `rates` has `trial` of them. `hidden`: units of the HyperLSTM; the others get as
    many as give equally many parameters. `spread`: that of the HyperLSTM whose numbers
    in z start apart.
    """

    text_steps: int = 800
    image_steps: int = 600
    trial: float = 0.2
    rates: tuple[float, ...] = (5e-3, 1.25e-2, 3e-2)
    hidden: int = 96
    hyper_size: int = 32
    n_z: int = 4
    spread: float = 0.1
    streams: int = 32
    window: int = 64
    images: int = 64
    held_back: int = 2_000
    looks: int = 8
    clip: float = 1.0


QUICK = Settings(
    text_steps=24,
    image_steps=16,
    trial=0.5,
    rates=(5e-3, 1.25e-2),
    hidden=32,
    hyper_size=8,
    held_back=500,
    looks=2,
)


class RowClassifier(nn.Module):
    """Reads an image row by row from the top: images (B, 3, 32, 32) to logits (B,
    classes), from the last output.
    """

    def __init__(self, recurrent: nn.Module, classes: int, hidden: int) -> None:
        super().__init__()
        self.recurrent, self.output = recurrent, nn.Linear(hidden, classes)

    def forward(self, images: Tensor) -> Tensor:
        rows = images.permute(2, 0, 3, 1).flatten(
            2
        )  # (32, B, 96): 32 steps of 32 pixels in 3 colours
        return self.output(self.recurrent(rows)[0][-1])


def make_recurrent(
    model: str, inputs: int, hidden: int, settings: Settings
) -> nn.Module:
    """One recurrent layer of the kind `model`, one of `MODELS` or "hyperlstm_spread";
    nn.LSTM gets a forget bias of 1, as the others have."""
    if model.startswith("hyperlstm"):
        spread = settings.spread if model == "hyperlstm_spread" else 0.0
        return HyperLSTM(
            inputs,
            hidden,
            hyper_size=settings.hyper_size,
            n_z=settings.n_z,
            spread=spread,
        )
    if model == "layer_norm_lstm":
        return LayerNormLSTM(inputs, hidden)
    lstm = nn.LSTM(inputs, hidden)
    with torch.no_grad():
        lstm.bias_hh_l0.zero_()
        lstm.bias_ih_l0.zero_()[hidden : 2 * hidden] = 1.0
    return lstm


def parameters(module: nn.Module) -> int:
    """The number of trained numbers in a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def matched_sizes(make: Callable[[str, int], nn.Module], hidden: int) -> dict[str, int]:
    """For each model the units that bring its parameters nearest to those of a
    HyperLSTM with `hidden` units.

    Args:
        make: a model's name and its units to the whole network, output layer included.
    """
    goal = parameters(make("hyperlstm", hidden))
    with torch.device("meta"):
        sizes = {
            model: min(
                range(hidden, 2 * hidden),
                key=lambda size: abs(parameters(make(model, size)) - goal),
            )
            for model in MODELS[:2]
        }
    return {**sizes, "hyperlstm": hidden}


@dataclass(frozen=True)
class Task:
    """One task: how its network is made and trained, and what is measured; `sign` is 1
    where more is better.
    """

    make: Callable[[str, int], nn.Module]
    loss: Callable[[nn.Module, int], Callable[[int], Tensor]]
    validate: Callable[[nn.Module], float]
    test: Callable[[nn.Module], float]
    steps: int
    sign: int


def text_task(text: Text, settings: Settings, device: torch.device) -> Task:
    """Predict the next character; measured in bits per character, less is better."""
    size = len(text.alphabet)
    train_streams = streams(text.train.to(device), settings.streams)
    validation, test = text.validation.to(device), text.test.to(device)
    return Task(
        lambda model, hidden: CharacterModel(
            make_recurrent(model, size, hidden, settings), size, hidden
        ),
        lambda network, seed: language_loss(network, train_streams, settings.window),
        lambda network: bits_per_character(network, validation),
        lambda network: bits_per_character(network, test),
        settings.text_steps,
        -1,
    )


def image_task(images: ImageSet, settings: Settings) -> Task:
    """Classify images read row by row; measured in accuracy, more is better."""
    order = torch.randperm(
        len(images.train_labels), generator=torch.Generator().manual_seed(0)
    ).to(images.device)
    aside, kept = order.tensor_split([held_back(len(order), settings.held_back)])

    def prepare(pictures: Tensor) -> Tensor:
        return normalise(pictures, images.mean, images.std)

    def loss(network: nn.Module, seed: int) -> Callable[[int], Tensor]:
        def loss_at(step: int) -> Tensor:
            draw = step_generator(seed, step)
            chosen = kept[
                torch.randint(len(kept), (settings.images,), generator=draw).to(
                    images.device
                )
            ]
            pictures = augment(images.train_images[chosen], draw, crop=0)
            logits = network(prepare(pictures))
            return F.cross_entropy(logits, images.train_labels[chosen])

        return loss_at

    return Task(
        lambda model, hidden: RowClassifier(
            make_recurrent(model, 96, hidden, settings), images.classes, hidden
        ),
        loss,
        lambda net: accuracy(
            net, prepare, images.train_images[aside], images.train_labels[aside]
        ),
        lambda net: accuracy(net, prepare, images.test_images, images.test_labels),
        settings.image_steps,
        1,
    )


def fit(
    task: Task,
    model: str,
    hidden: int,
    rate: float,
    steps: int,
    seed: int,
    settings: Settings,
    device: torch.device,
) -> tuple[nn.Module, History]:
    """Train one network from the seed's start: (network, History, whose `train_seconds`
    leave the looks out).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = task.make(model, hidden).to(device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    spent, start = 0.0, clock()

    def evaluate() -> dict[str, float]:
        nonlocal spent, start
        wait_for(device)
        spent += clock() - start
        values = {"validation": task.validate(network), "train_seconds": spent}
        start = clock()
        return values

    def clip(*_) -> None:
        nn.utils.clip_grad_norm_(network.parameters(), settings.clip)

    optimizer = torch.optim.Adam(network.parameters(), lr=rate, fused=True)
    optimizer.register_step_pre_hook(clip)
    history = train(
        network,
        optimizer,
        task.loss(network, seed),
        steps,
        schedule=one_cycle,
        evaluate=evaluate,
        every=math.ceil(steps / settings.looks),
        mixed=False,
        label=model,
    )
    return network, history


def measure_model(
    task: Task,
    model: str,
    hidden: int,
    seed: int,
    settings: Settings,
    device: torch.device,
) -> dict:
    """Try the rates in short runs, train at the one best on validation data, and test
    that network once.
    """
    short = math.ceil(settings.trial * task.steps)

    def trial(rate: float) -> tuple[float, None]:
        _, history = fit(task, model, hidden, rate, short, seed, settings, device)
        return task.sign * round(history.last("validation"), 4), None

    chosen = best_rate(settings.rates, trial)
    tried = [
        {"rate": each["rate"], "validation": task.sign * each["validation"]}
        for each in chosen.tried
    ]
    return {"hidden": hidden, "tried": tried} | final_run(
        task, model, hidden, chosen.rate, task.steps, seed, settings, device
    )


def final_run(
    task: Task,
    model: str,
    hidden: int,
    rate: float,
    steps: int,
    seed: int,
    settings: Settings,
    device: torch.device,
) -> dict:
    """One training run as it is recorded: parameters, rate, steps, curve, seconds of
    training, and the test value.
    """
    network, history = fit(task, model, hidden, rate, steps, seed, settings, device)
    names = ("step", "loss", "validation", "train_seconds")
    return {
        "parameters": parameters(network),
        "rate": rate,
        "steps": steps,
        "test": round(task.test(network), 4),
        "train_seconds": round(history.last("train_seconds"), 2),
        "curve": [
            {name: round(row[name], 4) for name in names} for row in history.rows
        ],
    }


def measure_task(
    task: Task,
    seed: int,
    settings: Settings,
    device: torch.device,
    report: Callable[[str], None],
) -> dict:
    """Every model, then two arms that take another's rate.

    They are the HyperLSTM whose numbers in z start apart, and the plain LSTM with as
    many steps as the HyperLSTM's seconds allow.
    """
    found = {}
    for model, hidden in matched_sizes(task.make, settings.hidden).items():
        found[model] = measure_model(task, model, hidden, seed, settings, device)
        report(
            f"  {model}: {found[model]['test']} after {found[model]['train_seconds']} s"
        )
    lstm, hyper = found["lstm"], found["hyperlstm"]
    longer = round(lstm["steps"] * hyper["train_seconds"] / lstm["train_seconds"])
    for arm, model, like, steps in (
        ("hyperlstm_spread", "hyperlstm_spread", hyper, hyper["steps"]),
        ("lstm_equal_seconds", "lstm", lstm, longer),
    ):
        run = final_run(
            task, model, like["hidden"], like["rate"], steps, seed, settings, device
        )
        found[arm] = {"hidden": like["hidden"], **run}
        report(
            f"  {arm}: {run['test']} after {run['train_seconds']} s and {steps} steps"
        )
    return found


def measure(
    images: ImageSet,
    seed: int,
    profile: str,
    report: Callable[[str], None],
    settings: Settings | None = None,
) -> dict:
    """Both tasks for one seed, which draws the starts and the images of each step.

    Args:
        profile: "full", or "quick" to try it.
        settings: instead of those of the profile.
    """
    settings = settings or (QUICK if profile == "quick" else Settings())
    text = python_help()
    found = {}
    for name, task in (
        ("text", text_task(text, settings, images.device)),
        ("images", image_task(images, settings)),
    ):
        report(f"seed {seed}, {name}")
        found[name] = measure_task(task, seed, settings, images.device, report)
    parts = {name: len(getattr(text, name)) for name in ("train", "validation", "test")}
    described = {
        "source": text.source,
        "sha256": text.sha256,
        "alphabet": len(text.alphabet),
        **parts,
    }
    return {"settings": asdict(settings), "text_data": described, **found}
