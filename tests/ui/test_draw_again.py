"""Settings of a picture that is drawn again on the page: what has no field there is said."""

from __future__ import annotations

from typing import Any

import pytest

import mm
from mm.engine.capabilities import Capabilities
from mm.engine.settings import request_of
from mm.ui.draw_tab import usual_steps, without_field

FIELDS = ("prompt", "seed", "fast", "apart", "stand_ins")


@pytest.fixture(scope="module")
def can() -> Capabilities:
    return mm.load("mm-tiny").capabilities


@pytest.mark.parametrize(
    ("settings", "fields", "wanted"),
    [
        ({}, FIELDS, []),
        ({"apart": True, "refine": 0.45}, FIELDS, []),
        ({"apart": {}, "refine": 0.45}, FIELDS, []),
        ({"apart": {}}, FIELDS, ["with refine 0, and the page draws with 0.45"]),
        ({"apart": True}, FIELDS, ["with refine 0, and the page draws with 0.45"]),
        ({"apart": True}, FIELDS[:-2], ["it was drawn apart; start the page"]),
        ({"apart": {"<mug>": "cup"}, "refine": 0.45}, FIELDS, []),
        (
            {"apart": {"<mug>": "cup, red"}, "refine": 0.45},
            FIELDS,
            ["<mug>=cup, red; the page's field cannot hold commas"],
        ),
        ({"fast": True}, FIELDS, []),
        ({"fast": {"guided": 0.5}}, FIELDS, ["other settings of fast"]),
        ({"options": {"eta": 0.5}}, FIELDS, ["the page does not take: eta"]),
    ],
)
def test_what_the_page_has_no_field_for_is_said(
    settings: dict[str, Any], fields: tuple[str, ...], wanted: list[str], can: Capabilities
) -> None:
    found = without_field(request_of({"prompt": "a cat", "seed": 1} | settings, can), can, fields)
    assert len(found) == len(wanted) and all(part in line for part, line in zip(wanted, found, strict=True)), found


def test_all_settings_of_the_measured_mix_are_the_page_s_own(can: Capabilities) -> None:
    """A picture's file names every setting."""
    first = request_of({"prompt": "a cat", "seed": 1, "fast": True}, can)
    assert without_field(request_of({"prompt": "a cat", "seed": 1, "fast": can.fast_of(first)}, can), can, FIELDS) == []


def test_the_steps_of_the_mix_are_those_of_the_command(can: Capabilities) -> None:
    """The page always sends steps, so that those of the full drawing would replace the mix's."""
    found = {(mode, fast): usual_steps(can, mode, fast) for mode in can.modes for fast in (False, True)}
    assert found == {("flow", False): 12, ("flow", True): 8, ("codes", False): 32, ("codes", True): 9}
