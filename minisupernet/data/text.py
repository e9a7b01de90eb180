"""Text that every Python installation carries, as characters to predict: the language
reference behind `help()`.
"""

import hashlib
import math
import platform
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minisupernet.errors import TextError

__all__ = [
    "CharacterModel",
    "Text",
    "UNKNOWN",
    "bits_per_character",
    "language_loss",
    "python_help",
    "streams",
]

UNKNOWN = "\ufffd"  # stands for every character too rare to have a place of its own


@dataclass(frozen=True, eq=False)
class Text:
    """A text in three parts, as positions in its alphabet (N,) int64; `sha256` is that
    of the whole text, `name` what a record calls it.
    """

    alphabet: str
    train: Tensor
    validation: Tensor
    test: Tensor
    sha256: str
    source: str
    name: str = "python_help"

    def checksum(self) -> str:
        """The sha256 of the whole text, as an image set has one."""
        return self.sha256

    def to(self, device: torch.device) -> "Text":
        """The same text with its parts on `device`."""
        parts = {part: getattr(self, part) for part in ("train", "validation", "test")}
        return replace(self, **{part: own.to(device) for part, own in parts.items()})

    def decode(self, codes: Tensor) -> str:
        """Positions in the alphabet (N,) back to characters."""
        return "".join(self.alphabet[code] for code in codes.tolist())

    def encode(self, characters: str) -> Tensor:
        """Characters to positions in the alphabet (N,); those not in it to that of the
        mark for unknown ones.
        """
        place = {character: number for number, character in enumerate(self.alphabet)}
        return torch.tensor(
            [place.get(character, place[UNKNOWN]) for character in characters]
        )


def python_help(rare: int = 50) -> Text:
    """The topics of Python's `help()`, each paragraph once, cut by position: 80 %
    train, 10 % validation, 10 % test.

    Many topics repeat whole sections of others. A paragraph is kept where it comes
    first, so that no held-out paragraph was trained on. The text differs between Python
    versions; `source` says which this is.

    Args:
        rare: characters seen fewer times than this in the training part share one sign.
    """
    from pydoc_data.topics import topics

    paragraphs: dict[str, str] = {}  # without its spaces -> as it stands first
    for part in (
        part
        for name in sorted(topics)
        for part in topics[name].split("\n\n")
        if part.strip()
    ):
        paragraphs.setdefault("".join(part.split()), part)
    text = "\n\n".join(paragraphs.values())
    cuts = 0, int(0.8 * len(text)), int(0.9 * len(text)), len(text)
    alphabet = (
        "".join(
            sorted(
                sign
                for sign, count in Counter(text[: cuts[1]]).items()
                if count >= rare
            )
        )
        + UNKNOWN
    )
    whole = Text(
        alphabet,
        *[torch.empty(0)] * 3,
        hashlib.sha256(text.encode()).hexdigest(),
        f"pydoc_data.topics of Python {platform.python_version()}",
    )
    parts = (
        whole.encode(text[start:end])
        for start, end in zip(cuts, cuts[1:], strict=False)
    )
    return Text(alphabet, *parts, whole.sha256, whole.source)


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, Integral) or value < 1:
        raise TextError(f"{name} must be a whole number from 1, not {value}.")


def streams(codes: Tensor, count: int) -> Tensor:
    """Cut a text (N,) into `count` streams of equal length that are read side by side,
    (length, count).

    Raises:
        TextError: where a stream would have fewer than two characters.
    """
    _check_count("count", count)
    length = len(codes) // count
    if length < 2:
        raise TextError(
            f"{len(codes)} characters are too few for {count} streams; ask for fewer"
            " streams."
        )
    return codes[: length * count].view(count, length).t().contiguous()


class CharacterModel(nn.Module):
    """Predicts the next character: one-hot characters, a recurrent network, and a
    linear layer.

    Characters (T, B) and the recurrent network's state to logits (T, B, alphabet) and
    the next state.

    Args:
        recurrent: any module with the interface of nn.LSTM, for inputs of size
            `alphabet` and outputs of size `hidden`.
    """

    def __init__(self, recurrent: nn.Module, alphabet: int, hidden: int) -> None:
        super().__init__()
        self.recurrent, self.alphabet = recurrent, alphabet
        self.output = nn.Linear(hidden, alphabet)

    def forward(
        self, codes: Tensor, state: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        inputs = F.one_hot(codes, self.alphabet).to(
            self.output.weight.dtype
        )  # (T, B, alphabet)
        outputs, state = self.recurrent(inputs, state)
        return self.output(outputs), state


def language_loss(
    model: CharacterModel, read: Tensor, window: int
) -> Callable[[int], Tensor]:
    """The loss of step s: the mean cross-entropy, in nats, of the s-th window of all
    streams `read` (length, B).

    The state goes on from window to window, its gradient does not; at the end of the
    streams both start anew.

    Raises:
        TextError: where there is no whole window; from the loss itself, for a step that
            follows on none that it has seen, as after a checkpoint.
    """
    _check_count("window", window)
    windows = (len(read) - 1) // window
    if windows < 1:
        raise TextError(
            f"streams of {len(read)} characters have no window of {window}; ask for"
            " fewer streams."
        )
    before: dict[int, tuple[Tensor, ...]] = {}  # a step -> the state that it starts in

    def loss_at(step: int) -> Tensor:
        start, last = step % windows * window, step - step % windows
        if start and step not in before:
            raise TextError(
                f"step {step} goes on from step {step - 1}, which was not run; begin at"
                f" step {last} or {last + windows}, where the streams start anew."
            )
        state = before.get(step) if start else None
        logits, state = model(read[start : start + window], state)
        now = {step: before[step]} if start else {}
        before.clear()
        before.update(now | {step + 1: tuple(tensor.detach() for tensor in state)})
        return F.cross_entropy(
            logits.flatten(0, 1), read[start + 1 : start + window + 1].flatten()
        )

    return loss_at


@torch.no_grad()
def bits_per_character(
    model: CharacterModel, codes: Tensor, count: int = 16, window: int = 100
) -> float:
    """The mean number of bits that the model needs for a character of the text (N,),
    read as `count` streams.

    Every character but the first of each stream is predicted, with the state carried
    along, not in training mode.

    Raises:
        TextError: for a count or window below 1, or too few characters.
    """
    _check_count("window", window)
    read, total, state = streams(codes, count), 0.0, None
    before = model.training
    model.eval()
    for start in range(0, len(read) - 1, window):
        inputs, targets = (
            read[start : start + window],
            read[start + 1 : start + window + 1],
        )
        logits, state = model(inputs[: len(targets)], state)
        total += F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="sum"
        ).item()
    model.train(before)
    return total / ((len(read) - 1) * count) / math.log(2)
