"""Types of options that several commands share."""

from __future__ import annotations

from enum import StrEnum


class DrawingMode(StrEnum):
    """How pictures are drawn."""

    flow = "flow"
    codes = "codes"
