"""Exercises that check themselves: whether an answer is right, why, and if not, a hint.

A chapter keeps what is expected in a folded cell, so that the cell to answer in gives
nothing away.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from textwrap import fill

import torch
from torch import Tensor

__all__ = ["Exercise", "FunctionExercise"]

Answer = float | int | str | bool | Tensor | None


@dataclass(frozen=True)
class Exercise:
    """A question whose answer is a value.

    Args:
        expected: the right answer.
        hint: what to think about, shown on a wrong try.
        because: why the right answer is right, one clause, shown with it.
        tolerance: by how much a number, or each number of a tensor, may be off.
    """

    expected: Answer
    hint: str
    because: str
    tolerance: float = 0.0

    def check(self, answer: Answer) -> None:
        """Print whether `answer` is right; None counts as not given yet."""
        if answer is None:
            _say("No answer yet.")
        elif _same(answer, self.expected, self.tolerance):
            _say(f"Right: {_shown(self.expected)}, because {self.because}.")
        else:
            _say(f"Not yet: {self.hint}{_about_shapes(answer, self.expected)}")


@dataclass(frozen=True)
class FunctionExercise:
    """A question whose answer is a function, which is tried on some inputs.

    Args:
        expected: the function that is right.
        inputs: the arguments of each trial.
        hint, because, tolerance: as in `Exercise`.
    """

    expected: Callable
    inputs: Sequence[tuple]
    hint: str
    because: str
    tolerance: float = 1e-5

    def check(self, answer: Callable) -> None:
        """Print whether the function gives what is expected on each of the inputs.

        One that returns None, as an unfinished one does, counts as not given yet.
        """
        for arguments in self.inputs:
            try:
                got = answer(*arguments)
            except (
                Exception
            ) as error:  # whatever the reader's code raises is the answer
                kind = type(error).__name__
                return _say(f"Not yet: your function stops with {kind}: {error}")
            if got is None:
                return _say("No answer yet.")
            if not _same(got, right := self.expected(*arguments), self.tolerance):
                return _say(f"Not yet: {self.hint}{_about_shapes(got, right)}")
        trials = (
            f"all {len(self.inputs)} trials" if len(self.inputs) > 1 else "the trial"
        )
        return _say(f"Right on {trials}: {self.because}.")


def _say(verdict: str) -> None:
    print(fill(verdict, width=76))  # as wide as a page of the book


def _shown(value: Answer) -> str:
    """A value in few digits."""
    if isinstance(value, Tensor):
        return str([round(number, 4) for number in value.flatten().tolist()])
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"


def _about_shapes(answer: Answer, expected: Answer) -> str:
    both = isinstance(answer, Tensor) and isinstance(expected, Tensor)
    if not both or answer.shape == expected.shape:
        return ""
    found, right = tuple(answer.shape), tuple(expected.shape)
    return f" Your shape is {found}, the right one {right}."


def _same(answer: Answer, expected: Answer, tolerance: float) -> bool:
    if getattr(answer, "shape", None) == ():  # a tensor or array of one number is it
        answer = answer.item()
    if isinstance(expected, bool | str) or isinstance(answer, bool | str):
        return type(answer) is type(expected) and answer == expected
    try:
        first = torch.as_tensor(answer).double()
        second = torch.as_tensor(expected).double()
    except (TypeError, ValueError, RuntimeError):
        return False
    if first.shape != second.shape:
        return False
    return bool(((first - second).abs() <= tolerance).all())
