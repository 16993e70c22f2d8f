"""Checks of single values that a user gives; each raises `UserError` with the name and the value."""

from __future__ import annotations

from collections.abc import Callable

from mm.core.errors import UserError
from mm.core.errors import shown as shown_of_file

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
