"""Checks for the exercises: they say whether an answer is right and, if not, what to
think about.
"""

from collections.abc import Callable
from textwrap import fill

import torch
from torch import Tensor

__all__ = ["check", "check_function"]

Answer = float | int | str | bool | Tensor | None


def check(answer: Answer, expected: Answer, hint: str, tolerance: float = 0.0) -> None:
    """Print whether `answer` is right: equal to `expected`, or for numbers and tensors
    within `tolerance` of it.

    An answer of None counts as not given yet.
    """
    _say(
        "No answer yet."
        if answer is None
        else _verdict(answer, expected, hint, tolerance)
    )


def check_function(
    answer: Callable,
    expected: Callable,
    inputs: list[tuple],
    hint: str,
    tolerance: float = 1e-5,
) -> None:
    """Print whether the reader's function gives what `expected` gives on each of the
    `inputs`.

    A function that returns None, as an unfinished one does, counts as not given yet.
    """
    for arguments in inputs:
        try:
            got = answer(*arguments)
        except (
            Exception
        ) as error:  # whatever the reader's code raises is the answer to show
            _say(f"Not yet: your function stops with {type(error).__name__}: {error}")
            return
        said = (
            "No answer yet."
            if got is None
            else _verdict(got, expected(*arguments), hint, tolerance)
        )
        if said != "Right.":
            _say(said)
            return
    _say("Right.")


def _say(verdict: str) -> None:
    print(fill(verdict, width=76))  # as wide as a page of the book


def _verdict(answer: Answer, expected: Answer, hint: str, tolerance: float) -> str:
    if _same(answer, expected, tolerance):
        return "Right."
    if (
        isinstance(answer, Tensor)
        and isinstance(expected, Tensor)
        and answer.shape != expected.shape
    ):
        hint += (
            f" Your shape is {tuple(answer.shape)}, the right one"
            f" {tuple(expected.shape)}."
        )
    return f"Not yet: {hint}"


def _same(answer: Answer, expected: Answer, tolerance: float) -> bool:
    if (
        getattr(answer, "shape", None) == ()
    ):  # a tensor or an array of one number is that number
        answer = answer.item()
    if isinstance(expected, bool | str) or isinstance(answer, bool | str):
        return type(answer) is type(expected) and answer == expected
    try:
        first, second = (
            torch.as_tensor(answer).double(),
            torch.as_tensor(expected).double(),
        )
    except (TypeError, ValueError, RuntimeError):
        return False
    return first.shape == second.shape and bool(
        (first - second).abs().max() <= tolerance
    )
