"""Checks of single values that a user gives; each raises `UserError` with the name and the value."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping

from mm.core.errors import UserError
from mm.core.errors import shown as shown_of_file
from mm.core.nouns import with_article

MAX_SEED = 2**32 - 1  # what other programs read from a PNG's text
MAX_SIDE = 8192  # pixels of a picture that is drawn or trained on


def shown(value: object) -> str:
    """A value of Python in an error message, shortened; `mm.core.errors.shown` is for what was read from a file."""
    if isinstance(value, int) and value.bit_length() > 64:
        return shown_of_file(value)  # Python refuses to write a number of thousands of digits
    written = repr(value)
    return written if len(written) <= 60 else f"{written[:57]}..."


def whole(name: str, value: object, low: int, high: int, *, said: Callable[[object], str] = shown) -> None:
    """Raises UserError unless `value` is a whole number from `low` to `high`; `said` writes it in the message."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UserError(f"{name} is {said(value)}; give a whole number from {low} to {high}")


def number(name: str, value: object, low: float, high: float) -> None:
    """Raises UserError unless `value` is a finite number from `low` to `high`."""
    wrong = isinstance(value, bool) or not isinstance(value, int | float)
    if wrong or not low <= value <= high:  # type: ignore[operator]  # a NaN fails here too
        said = f"{value:g}" if isinstance(value, float) else shown(value)
        raise UserError(f"{name} is {said}; give a number from {low:g} to {high:g}")


def texts(name: str, value: object) -> tuple[str, ...]:
    """A list of texts; one text alone is a list of one, and not its letters.

    Raises:
        UserError: where `value` is no list, or holds something that is no text.
    """
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable) or isinstance(value, bytes | Mapping):
        raise UserError(f"{name} is {shown(value)}; give a text, or a list of texts")
    found = tuple(value)
    wrong = [one for one in found if not isinstance(one, str)]
    if wrong:
        raise UserError(f"{name} holds {shown(wrong[0])}; give texts alone")
    return found


def check_text(name: str, value: object) -> None:
    """Raises UserError unless `value` is a text."""
    if not isinstance(value, str):
        raise UserError(f"{name} is {given(value)}; give a text")


def check_path(name: str, value: object) -> None:
    """Raises UserError unless `value` is the path of a file or folder, as a text or a `Path`."""
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"{name} is {given(value)}; give the path of a file or folder")


def check_kind(name: str, value: object, kind: type, wanted: str) -> None:
    """Raises UserError unless `value` is of a class; `wanted` says what is to be given."""
    if not isinstance(value, kind):
        raise UserError(f"{name} is {given(value)}; give {wanted}")


def given(value: object) -> str:
    """What was given, for a message: a plain value as Python writes it, any other object by its class."""
    if value is None or isinstance(value, str | bool | int | float | os.PathLike):
        return shown(value)
    return f"the class {value.__name__}" if isinstance(value, type) else with_article(type(value).__name__)
