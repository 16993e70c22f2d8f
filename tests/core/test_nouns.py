"""Nouns in messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm.core.errors import UserError, shown
from mm.core.files import read_regular
from mm.core.nouns import counted, with_article


def test_a_number_has_its_noun() -> None:
    assert [counted(k, "layer") for k in (0, 1, 2)] == ["0 layers", "1 layer", "2 layers"]
    assert counted(2, "entry", "entries") == "2 entries" and counted(1, "entry", "entries") == "1 entry"


@pytest.mark.parametrize(
    ("noun", "text"),
    [
        ("adapter", "an adapter"), ("picture", "a picture"), ("int", "an int"), ("UNet2DConditionModel", "a UNet2D"),
        ("EulerDiscreteScheduler", "an EulerDiscrete"), ("Identity", "an Identity"), ("Embedding", "an Embedding"),
        ("unified model", "a unified"), ("unintended", "an unintended"),
    ],
)  # fmt: skip
def test_a_noun_has_its_article(noun: str, text: str) -> None:
    assert with_article(noun).startswith(text)


def test_messages_have_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder; give an adapter"):
        read_regular(tmp_path, "adapter", most=1)
    assert shown({1}.__iter__()).startswith("a set_iterator") and shown(object()) == "an object"
