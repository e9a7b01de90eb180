"""What a run may be told: plain values under known names, checked before anything
starts.
"""

import difflib
import math
import types
from collections.abc import Iterable
from dataclasses import is_dataclass, replace
from typing import Any, get_args, get_origin, get_type_hints

from minisupernet.errors import RunError

__all__ = ["override", "plain", "read_word", "suggestion"]

LARGEST_SEED = 2**31 - 1
LARGEST = 2**63 - 1  # what one number of a tensor can hold
NOT_OVERRIDDEN = {
    "name",
    "experiment",
    "seed",
}  # a run has parameters of its own for these


def plain(name: str, value: Any) -> Any:
    """Give back a parameter that is a str, int, finite float or bool, or a list of
    those.

    Raises:
        RunError: for anything else: a value reaches a notebook as data, never as code.
    """
    if type(value) is list and not any(isinstance(each, list) for each in value):
        return [plain(name, each) for each in value]
    least, most = (0, LARGEST_SEED) if name == "seed" else (-LARGEST, LARGEST)
    if type(value) is int and not least <= value <= most:
        raise RunError(
            f"parameter {name} must be a whole number from {least} to {most}."
        )
    text = (
        type(value) is str
        and "\0" not in value
        and value == value.encode(errors="ignore").decode()
    )
    number = type(value) in (int, bool) or type(value) is float and math.isfinite(value)
    if not (text or number):
        raise RunError(
            f"parameter {name} must be text, a finite number, true or false, or a list"
            " of these."
        )
    return value


def read_word(word: str) -> str | int | float | bool:
    """A value typed on the command line, read as papermill does: True and False, whole
    and other numbers, else text.
    """
    if word in ("True", "False"):
        return word == "True"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            pass
    return word


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest of those known."""
    return (
        "".join(
            f"; did you mean '{near}'?"
            for near in difflib.get_close_matches(name, known, 1, 0.0)
        )
        or "."
    )


def override(settings: Any, name: str, value: Any) -> Any:
    """The frozen dataclass `settings` with one field changed; dots lead to fields of
    fields, as in "training.steps".

    Raises:
        RunError: for a field that does not exist, and for a value that is not of the
            field's type.
    """
    return _override(settings, type(settings), name, value, name)


def _override(settings: Any, hint: Any, path: str, value: Any, whole: str) -> Any:
    if not path:
        return _as_type(hint, value, settings, whole)
    first, _, rest = path.partition(".")
    if is_dataclass(settings):
        hints = {
            field: each
            for field, each in get_type_hints(type(settings)).items()
            if field not in NOT_OVERRIDDEN
        }
    else:
        hints = (
            dict.fromkeys(settings, get_args(hint)[-1])
            if isinstance(settings, dict)
            else {}
        )
    if first not in hints:
        before = whole.removesuffix(path)
        raise RunError(
            "there is no setting"
            f" '{whole}'{suggestion(whole, [before + each for each in hints])}"
        )
    old = settings[first] if isinstance(settings, dict) else getattr(settings, first)
    new = _override(old, hints[first], rest, value, whole)
    return (
        {**settings, first: new}
        if isinstance(settings, dict)
        else replace(settings, **{first: new})
    )


def _as_type(hint: Any, value: Any, old: Any, name: str) -> Any:
    """A plain value as a field of type `hint` takes it: lists become tuples, whole
    numbers become floats.
    """
    inner = get_args(hint)
    for kind in inner if get_origin(hint) in (types.UnionType,) else (hint,):
        if type(value) is kind:
            return value
        if kind is float and type(value) is int:
            return float(value)
        if get_origin(kind) is tuple and isinstance(value, list):
            return tuple(_as_type(inner[0], each, old, name) for each in value)
    raise RunError(
        f"setting {name} must be like {old!r}, not {value!r}{_number_hint(value)}"
    )


def _number_hint(value: Any) -> str:
    try:
        number = repr(float(value)) if isinstance(value, str) else ""
    except ValueError:
        number = ""
    return (
        f"; in YAML write {number if '.' in number else number.replace('e', '.0e')}."
        if number
        else "."
    )
