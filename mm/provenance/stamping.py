"""Copies of a model whose decoder puts a number into every picture."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from mm.core.errors import UserError
from mm.core.model_parts import bring_the_rest
from mm.provenance.fingerprint import Fingerprint

DECODERS = ("autoencoder", "vae")  # components that decode latents, by their names in pipelines


def decoder_of(pipe: Any) -> nn.Module:
    """The component of a pipeline that decodes. Raises UserError where there is none."""
    for name in DECODERS:
        found = getattr(pipe, "components", {}).get(name)
        if isinstance(found, nn.Module):
            return found
    raise UserError(f"{type(pipe).__name__} has no {' or '.join(DECODERS)}, whose convolutions a fingerprint changes")


def stamped_copy(
    pipe: Any, fingerprint: Fingerprint, number: int, folder: str | Path, *, source: Path | None = None
) -> None:  # fmt: skip
    """Writes a copy of a model whose pictures carry a number; the pipeline keeps its own weights.

    Args:
        pipe: of diffusers' layout.
        fingerprint: of its decoder.
        number: of as many bits as the fingerprint has.
        folder: a new one; it is written whole or not at all.
        source: folder that the pipeline was loaded from, whose other components (those that read) are copied as well;
            None copies none.

    Raises:
        UserError: for a folder that exists, a number that does not fit, and another decoder.
    """
    target = Path(folder)
    if target.exists():
        raise UserError(f"{target} exists; give a new folder")
    module = decoder_of(pipe)
    before = {name: value.detach().clone() for name, value in module.state_dict().items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        fingerprint.stamp(module, number)
        pipe.save_pretrained(place)
        if source is not None:
            bring_the_rest(source, place)
        place.chmod(0o777 & ~_umask())
        os.replace(place, target)
    finally:
        module.load_state_dict(before)
        shutil.rmtree(place, ignore_errors=True)


def number_of(text: str) -> int:
    """A number as a user writes it: 3735928559, 0xDEADBEEF or 0b1010. Raises UserError."""
    try:
        return int(text, 0)
    except ValueError as error:
        raise UserError(f"{text!r} is no number; give one such as 1234 or 0xC0FFEE01") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
