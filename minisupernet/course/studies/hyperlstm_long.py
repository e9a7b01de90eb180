"""Chapter 4's verdict at a size that counts: half a million numbers read millions of
characters, nothing twice.

The text is the source of Python's standard library. A unit is one arm and one seed,
trained on so many characters at the rate whose short run ended best on validation text.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minisupernet.course.records import rounded_rows
from minisupernet.course.studies.hyperlstm import matched_sizes, parameters
from minisupernet.course.studies.rates import best_rate_once
from minisupernet.data.text import CharacterModel, Text, bits_per_character, streams
from minisupernet.errors import StudyError
from minisupernet.hyperlstm import HyperLSTM
from minisupernet.recurrent import (
    LayerNormLSTM,
    LayerNormLSTMCell,
    LSTMUpdate,
    Recurrent,
)
from minisupernet.training import History, one_cycle, train

__all__ = ["ARMS", "PlainLSTMCell", "Reader", "Settings", "check_unit", "measure"]


@dataclass(frozen=True)
class Settings:
    """How an arm is trained; the same for all.

    `hidden`, `hyper_size`, `n_z` and `spread` are those of the HyperLSTM; the other
    arms get as many units as give equally many numbers. Each of `rates` is tried for
    the share `trial` of the steps, and one more where the best is at the edge. A step
    reads a `window` of `streams` places in the text. `glance` characters of the
    validation text are read at each of the `looks`, `most` of the validation and the
    test text at the end.
    """

    hidden: int = 280
    hyper_size: int = 48
    n_z: int = 4
    spread: float = 0.1
    dropout: float = 0.1
    rates: tuple[float, ...] = (2e-3, 6e-3, 1.8e-2)
    trial: float = 0.1
    streams: int = 32
    window: int = 100
    clip: float = 1.0
    glance: int = 50_000
    most: int = 500_000
    looks: int = 8


QUICK = Settings(
    hidden=24,
    hyper_size=8,
    streams=4,
    window=20,
    rates=(1e-2,),
    glance=2_000,
    most=2_000,
    looks=2,
)


class PlainLSTMCell(LayerNormLSTMCell):
    """The same step without layer normalisation, so that recurrent dropout is where the
    other arms have it, which nn.LSTM cannot do.
    """

    def __init__(
        self, input_size: int, hidden_size: int, *, recurrent_dropout: float = 0.0
    ) -> None:
        super().__init__(input_size, hidden_size)
        self.update = LSTMUpdate(hidden_size, recurrent_dropout, layer_norm=False)
        with torch.no_grad():
            self.bias[hidden_size : 2 * hidden_size] = 1.0  # of the forget gate


def _hyper(layer_norm: bool = True, apart: bool = False) -> Callable:
    def make(size: int, hidden: int, settings: Settings) -> Recurrent:
        return HyperLSTM(
            size,
            hidden,
            hyper_size=settings.hyper_size,
            n_z=settings.n_z,
            spread=settings.spread if apart else 0.0,
            layer_norm=layer_norm,
            recurrent_dropout=settings.dropout,
        )

    return make


ARMS: dict[str, Callable[[int, int, Settings], Recurrent]] = {
    "lstm": lambda size, hidden, settings: Recurrent(
        PlainLSTMCell, size, hidden, recurrent_dropout=settings.dropout
    ),
    "layer_norm_lstm": lambda size, hidden, settings: LayerNormLSTM(
        size, hidden, recurrent_dropout=settings.dropout
    ),
    "hyperlstm_plain": _hyper(layer_norm=False),
    "hyperlstm": _hyper(),
    "hyperlstm_spread": _hyper(apart=True),
}


class Reader(nn.Module):
    """A model that reads on through a text, window after window.

    The state that goes on from step to step is kept in buffers, and so in a checkpoint.
    """

    def __init__(self, model: CharacterModel, read: Tensor, window: int) -> None:
        super().__init__()
        self.model, self.read, self.window = model, read, window
        for number, size in enumerate(model.recurrent.cells[0].sizes):
            self.register_buffer(
                f"carried_{number}", torch.zeros(1, read.shape[1], size)
            )

    def loss(self, step: int) -> Tensor:
        """The mean cross-entropy, in nats, of one window of all streams; at the start
        of the streams the state starts anew, and no gradient goes back over its edge.
        """
        start = step % ((len(self.read) - 1) // self.window) * self.window
        state = tuple(kept.clone() * (start > 0) for kept in self.buffers())
        end = start + self.window
        logits, state = self.model(self.read[start:end], state)
        for kept, new in zip(self.buffers(), state, strict=True):
            kept.copy_(new.detach())
        truth = self.read[start + 1 : end + 1]
        return F.cross_entropy(logits.flatten(0, 1), truth.flatten())


def check_unit(arm: str, characters: int) -> None:
    """Raise a StudyError where there is no such unit."""
    if arm not in ARMS:
        raise StudyError(f"there is no arm '{arm}'; choose one of {', '.join(ARMS)}.")
    if characters < 1:
        raise StudyError(f"characters must be from 1, not {characters}.")


def measure(
    text: Text,
    seed: int,
    profile: str,
    report: Callable[[str], None],
    checkpoint: Path | None,
    arm: str,
    characters: int,
) -> dict:
    """Choose a rate, train one network and measure it once on test text; a dict ready
    for JSON.

    Args:
        profile: "full", or "quick" to try it.
        checkpoint: a safetensors file from which a killed run goes on.
        arm: a key of `ARMS`.
        characters: how many are read in training.

    Raises:
        StudyError: for a unit that does not exist.
    """
    check_unit(arm, characters)
    settings = QUICK if profile == "quick" else Settings()
    unit = Unit(arm, text, seed, settings, _hidden(arm, len(text.alphabet), settings))
    steps = max(1, round(characters / settings.streams / settings.window))
    kept = checkpoint and checkpoint.with_suffix(".rate")
    chosen = unit.choose(max(1, round(settings.trial * steps)), kept)
    model, history = unit.train(chosen["rate"], steps, checkpoint)
    found = {
        part: round(_bits(model, getattr(text, part), settings.most), 4)
        for part in ("validation", "test")
    }
    report(f"{arm}, {characters:,} characters, seed {seed}: {found}")
    if kept:
        kept.unlink(missing_ok=True)
    return {
        "arm": arm,
        "characters": characters,
        "settings": asdict(settings),
        "hidden": unit.hidden,
        "parameters": parameters(model),
        **chosen,
        "steps": steps,
        "text": _described(text),
        **found,
        "train_bits": round(history.last("loss") / math.log(2), 4),
        "train_seconds": round(history.last("seconds"), 1),
        "history": rounded_rows(history.rows),
    }


def _described(text: Text) -> dict:
    parts = {part: len(getattr(text, part)) for part in ("train", "validation", "test")}
    return {"source": text.source, "alphabet": len(text.alphabet), **parts}


def _hidden(arm: str, size: int, settings: Settings) -> int:
    """Units of an arm: as many as bring its numbers nearest to the HyperLSTM's."""

    def make(name: str, hidden: int) -> CharacterModel:
        return CharacterModel(ARMS[name](size, hidden, settings), size, hidden)

    if arm.startswith("hyperlstm"):
        return settings.hidden
    return matched_sizes(make, settings.hidden)[arm]


def _bits(model: CharacterModel, codes: Tensor, most: int, count: int = 50) -> float:
    """Bits a character on `most` characters, from as many places of the text as there
    are streams."""
    places = streams(codes, count)[: max(2, most // count)]
    return bits_per_character(model, places.t().flatten(), count)


@dataclass(frozen=True, eq=False)
class Unit:
    """One arm with `hidden` units, and what it is trained on."""

    arm: str
    text: Text
    seed: int
    settings: Settings
    hidden: int

    def choose(self, steps: int, kept: Path | None) -> dict:
        """The rate whose run of so many steps ends best, and all that were tried."""

        def trial(rate: float) -> float:
            model = self.train(rate, steps)[0]
            most = self.settings.most // 4
            return -round(_bits(model, self.text.validation, most), 4)

        rates = self.settings.rates
        most = len(rates) + 1 if len(rates) > 1 else None
        chosen = best_rate_once(kept, rates, trial, most)
        tried = [
            {"rate": each["rate"], "validation": -each["validation"]}
            for each in chosen["tried"]
        ]
        return {"rate": chosen["rate"], "tried": tried}

    def train(
        self, rate: float, steps: int, checkpoint: Path | None = None
    ) -> tuple[CharacterModel, History]:
        """A network from the seed's start after so many steps, and what was measured on
        the way."""
        settings, text, size = self.settings, self.text, len(self.text.alphabet)
        with torch.random.fork_rng():
            # of the start, then of the dropout, which a checkpoint goes on with
            torch.manual_seed(self.seed)
            recurrent = ARMS[self.arm](size, self.hidden, settings)
            model = CharacterModel(recurrent, size, self.hidden)
            read = streams(text.train, settings.streams)
            reader = Reader(model, read, settings.window).to(read.device)
            optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
            optimizer.register_step_pre_hook(self.clip)
            history = train(
                reader,
                optimizer,
                reader.loss,
                steps,
                schedule=one_cycle,
                evaluate=lambda: {
                    "validation": _bits(model, text.validation, settings.glance)
                },
                every=math.ceil(steps / settings.looks),
                checkpoint=checkpoint,
                run={"seed": str(self.seed), "text": text.sha256},
                mixed=False,
            )
        return model, history

    def clip(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Bound the gradient before a step."""
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], self.settings.clip)
