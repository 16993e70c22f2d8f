"""What a fingerprint is trained for: bits that can be read, its place, and little loss of picture quality.

Legend: B pictures, K bits, P places.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.provenance.attacks import random_attacks, rounded
from mm.provenance.fingerprint import Fingerprint


def squared_error(given: Tensor, wanted: Tensor) -> Tensor:
    """Mean squares (B,) of the difference of pictures (B, 3, H, W)."""
    return (given - wanted).square().flatten(1).mean(1)


def quality_lost(plain: Tensor, marked: Tensor, originals: Tensor | None, *, psnr: float, decibels: float) -> Tensor:
    """What picture quality loses, in dB, a mean over the pictures.

    Args:
        plain: what the decoder makes without a fingerprint, (B, 3, H, W) in [0, 1].
        marked: the same with one. Values outside of [0, 1] count as clamped, and their gradient passes unchanged.
        originals: the true pictures; None counts from the change of `plain` alone.
        psnr: in dB, of that change, at which `decibels` are lost; used without originals.
        decibels: see `psnr`.

    Returns:
        The loss of PSNR, a scalar with a gradient.
    """
    plain, marked = plain.clamp(0, 1), marked + (marked.clamp(0, 1) - marked).detach()
    if originals is None:
        error = 10 ** (-psnr / 10) / (10 ** (decibels / 10) - 1)
        ratio_B = 1 + squared_error(marked, plain) / error
    else:
        ratio_B = squared_error(marked, originals) / squared_error(plain, originals).clamp_min(1e-6)
    return (10 * ratio_B.log10()).mean()


def reading_losses(
    fingerprint: Fingerprint, marked: Tensor, plain: Tensor, generator: torch.Generator, strength: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The bits that are read after attacks, and the losses of their place.

    Args:
        fingerprint: whose reader is trained.
        marked: pictures with a fingerprint, (B, 3, H, W) in [0, 1].
        plain: the same without one.
        generator: of the attacks.
        strength: of the attacks, 0 (none) to 1.

    Returns:
        Logits of bits (B, K), the loss of the true place among all places and none, and that of none in a quarter of
        the plain pictures.
    """
    reader, side = fingerprint.reader, fingerprint.config.side
    with torch.autocast(marked.device.type, enabled=False):  # JPEG's rounding needs its transform in float32
        parts = random_attacks(marked, side, generator, strength) if strength else [(rounded(marked), (0, 0))]
    found = [reader.places(part, shift) for part, shift in parts]
    scores_BP = torch.cat([each[..., -1] for each in found])
    count = max(1, len(plain) // 4)
    free_BP = reader.places(rounded(plain[:count]))[..., -1]
    place = (_with_none(scores_BP).logsumexp(1) - scores_BP[:, 0]).mean()
    return torch.cat([each[:, 0, :-1] for each in found]), place, _with_none(free_BP).logsumexp(1).mean()


def _with_none(scores_BP: Tensor) -> Tensor:
    """Scores of the places, and 0 for the case that there is no fingerprint."""
    return F.pad(scores_BP, (0, 1))
