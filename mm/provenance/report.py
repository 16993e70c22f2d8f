"""What a picture says of where it comes from: settings in the file, a fingerprint in the pixels, content credentials.

Design choices
- The three are independent: a file can lose its settings and credentials, and pixels their fingerprint. Each is
  reported as found, absent, or not searched for, with the reason; an absent one proves nothing.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mm.core.errors import UserError
from mm.core.paths import weights_dir
from mm.core.pictures import read_picture
from mm.provenance.credentials import MISSING, Credentials, available, read_credentials
from mm.provenance.file_settings import read_file_settings
from mm.provenance.fingerprint import Fingerprint

_LONGEST = 1000  # characters of a value that are shown
FINGERPRINT = "fingerprint.safetensors"  # beside an embedded model's parts


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What was found.

    Attributes:
        settings: of the drawing; None where the file carries none.
        why_no_settings: why not.
        fingerprint: the bits as a number; None where there is none.
        fingerprint_bits: their count; 0 where no fingerprint was searched for.
        fingerprint_uncertain: how many of the bits are uncertain; 0 where there is no fingerprint.
        presence: probability that there is a fingerprint; None where none was searched for.
        credentials: of the file; None where it has none.
        why_no_credentials: why they were not read; empty where they were searched for.
    """

    settings: dict[str, Any] | None
    why_no_settings: str
    fingerprint: int | None
    fingerprint_bits: int
    fingerprint_uncertain: int
    presence: float | None
    credentials: Credentials | None
    why_no_credentials: str

    def lines(self) -> list[str]:
        """One line each."""
        if self.settings is None:
            first = f"settings: none ({self.why_no_settings})"
        else:
            first = "settings: " + ", ".join(f"{key} {_shown(value)}" for key, value in self.settings.items())
        if self.presence is None:
            second = "fingerprint: not searched for; give the fingerprint's file (--fingerprint)"
        elif self.fingerprint is None:
            second = "fingerprint: none"
        else:
            second = f"fingerprint: {self.fingerprint:#0{2 + self.fingerprint_bits // 4}x}"
            if self.fingerprint_uncertain:
                second += f" ({self.fingerprint_uncertain} of {self.fingerprint_bits} bits are uncertain)"
        third = self.why_no_credentials or ("none" if self.credentials is None else str(self.credentials))
        return [first, second, f"content credentials: {third}"]

    def as_json(self) -> dict[str, Any]:
        """The same as values that JSON holds: what is no number there is null, and what is no text is escaped."""
        found = _sound(asdict(self))
        assert isinstance(found, dict)
        return found


def _sound(value: Any) -> Any:
    """A value from a file as JSON holds it."""
    if isinstance(value, dict):
        return {str(_sound(key)): _sound(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_sound(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _shown(value: Any) -> str:
    """A value from a file on one line of a terminal, cut short."""
    text = value if isinstance(value, str) else json.dumps(_sound(value), ensure_ascii=False)
    text = " ".join(text[: _LONGEST + 1].split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def provenance(path: str | Path, fingerprint: Fingerprint | None = None) -> Provenance:
    """Reads what a picture says of where it comes from.

    Args:
        path: a PNG, JPEG or WebP file.
        fingerprint: that pictures may carry; None searches for none.

    Raises:
        UserError: for a file that is no picture.
    """
    picture = read_picture(path)
    settings, why = _settings(path)
    number, presence, uncertain = None, None, 0
    if fingerprint is not None:
        found = fingerprint.read(pixels(picture))
        number, presence = found.numbers()[0], float(found.present_B[0])
        uncertain = 0 if number is None else found.uncertain()[0]
    return Provenance(
        settings=settings, why_no_settings=why, fingerprint=number, presence=presence,
        fingerprint_bits=fingerprint.config.bits if fingerprint is not None else 0,
        fingerprint_uncertain=uncertain,
        credentials=read_credentials(path) if available() else None,
        why_no_credentials="" if available() else MISSING,
    )  # fmt: skip


def embedded_fingerprint(model: str = "mm-tiny") -> Fingerprint | None:
    """The fingerprint that comes with an embedded model; None without one."""
    file = weights_dir() / model / FINGERPRINT
    return Fingerprint.load(file) if file.is_file() else None


def pixels(picture: Image.Image) -> torch.Tensor:
    """A picture as (1, 3, H, W) in [0, 1]."""
    values = torch.from_numpy(np.asarray(picture.convert("RGB")).copy())
    return values.permute(2, 0, 1)[None].float() / 255


def _settings(path: str | Path) -> tuple[dict[str, Any] | None, str]:
    try:
        return read_file_settings(path), ""
    except UserError as error:
        return None, str(error)
