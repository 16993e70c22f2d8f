"""Copies of a model whose decoder puts a number into every picture."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm.core.errors import UserError
from mm.core.model_parts import bring_the_rest, save_pipeline
from mm.provenance.fingerprint import PRESENT, Fingerprint

_DECODED = 8  # pictures by which a decoder is known that marks them already
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
        UserError: for a folder that exists, a number that does not fit, another decoder, and one that marks its
            pictures already: of two numbers neither could be read.
    """
    target = Path(folder)
    if target.exists():
        raise UserError(f"{target} exists; give a new folder")
    module = decoder_of(pipe)
    if marks(module, fingerprint):
        raise UserError(
            "this model marks its pictures already, and of two numbers neither could be read; stamp the model that it "
            "is a copy of"
        )
    before = {name: value.detach().clone() for name, value in module.state_dict().items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        fingerprint.stamp(module, number)
        save_pipeline(pipe, place)
        if source is not None:
            bring_the_rest(source, place)
        place.chmod(0o777 & ~_umask())
        os.replace(place, target)
    finally:
        module.load_state_dict(before)
        shutil.rmtree(place, ignore_errors=True)


@torch.no_grad()
def marks(module: nn.Module, fingerprint: Fingerprint) -> bool:
    """Whether most of some pictures that a decoder draws from noise carry a number."""
    pictures = _drawn(module, fingerprint.config.side)
    return pictures is not None and float((fingerprint.read(pictures).present_B > PRESENT).float().mean()) > 0.5


def _drawn(module: Any, side: int) -> Tensor | None:
    """Pictures in [0, 1] of latents of noise; None for a decoder whose latents are not known."""
    config = getattr(module, "config", None)
    channels, widths = getattr(config, "latent_channels", None), getattr(config, "block_out_channels", ())
    smaller = getattr(module, "scale_factor", 2 ** (len(widths) - 1) if widths else None)
    if channels is None or smaller is None or not hasattr(module, "decode"):
        return None
    shape = (_DECODED, channels, side // smaller, side // smaller)
    weight = next(module.parameters())
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight)
    made = module.decode(latents)
    pictures: Tensor = getattr(made, "sample", made)
    return (pictures.float().cpu() / 2 + 0.5).clamp(0, 1)


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
