"""Checks of single values: what is refused, and how the message writes the value."""

from __future__ import annotations

import pytest

from mm.core.checks import MAX_SEED, number, whole
from mm.core.errors import UserError


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (True, "True"), (1.0, "1.0"), ("1", "'1'"), (None, "None"), (0, "0"), (MAX_SEED + 1, "4294967296"),
        (2**100, "a whole number of 101 bits"), ("x" * 99, "'" + "x" * 56 + r"\.\.\."),
    ],
)  # fmt: skip
def test_what_is_no_whole_number(value, said):
    with pytest.raises(UserError, match=f"^seed is {said}; give a whole number from 1 to 4294967295$"):
        whole("seed", value, 1, MAX_SEED)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (False, "False"), ("1", "'1'"), (float("nan"), "nan"), (float("inf"), "inf"), (-1, "-1"), (2.5, r"2\.5"),
        (2**2000, "a whole number of 2001 bits"),
    ],
)  # fmt: skip
def test_what_is_no_number(value, said):
    with pytest.raises(UserError, match=f"^guidance is {said}; give a number from 0 to 2$"):
        number("guidance", value, 0, 2)


def test_the_ends_of_a_range_belong_to_it():
    for value in (0, 2, 0.0, 2.0):
        number("guidance", value, 0, 2)
    for value in (1, MAX_SEED):
        whole("seed", value, 1, MAX_SEED)
