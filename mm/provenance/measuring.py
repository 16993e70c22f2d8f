"""Measures a fingerprint: which bits are read after each attack, and what it costs in picture quality."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mm.provenance.attacks import MEASURED, rounded
from mm.provenance.fingerprint import PRESENT, Fingerprint
from mm.provenance.losses import squared_error
from mm.provenance.training import Decode


@torch.no_grad()
def measure(
    fingerprint: Fingerprint, module: nn.Module, decode: Decode, latents: Tensor, *, originals: Tensor | None = None,
    seed: int = 1, batch_size: int = 16,
) -> dict[str, Any]:  # fmt: skip
    """Share of bits read after each attack, and what the fingerprint costs in picture quality.

    Args:
        fingerprint: trained.
        module: that holds the convolutions.
        decode: as in training.
        latents: (N, ...), of pictures that were not trained on.
        originals: the pictures (N, 3, H, W) in [0, 1], for the loss of PSNR.
        seed: of bits and crops.
        batch_size: at once.

    Returns:
        "read" by attack, "found" (share of pictures in which a fingerprint is seen), "found_in_plain", "all_bits"
        (share of pictures without a wrong bit) by attack, "psnr" of the change in dB, and
        with originals "psnr_plain" and "psnr_marked", means over pictures.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for at in _slices(len(latents), batch_size):
        bits_BK = torch.randint(2, (len(latents[at]), fingerprint.config.bits), generator=generator).float()
        plain, marked = _pictures(fingerprint, module, decode, latents[at], bits_BK.to(latents.device))
        part = _read(fingerprint, plain, marked, bits_BK.to(latents.device), generator) | {"psnr": _psnr(marked, plain)}
        if originals is not None:
            part |= {"psnr_plain": _psnr(plain, originals[at]), "psnr_marked": _psnr(marked, originals[at])}
        parts.append(part)
    means = {key: float(torch.cat([part[key] for part in parts]).mean()) for key in parts[0]}
    report: dict[str, Any] = {"n": len(latents), "found_in_plain": round(means["found_in_plain"], 4)}
    for key in ("read", "all_bits", "found"):
        report[key] = {name: round(means[f"{key} {name}"], 4) for name in MEASURED}
    return report | {key: round(value, 2) for key, value in means.items() if key.startswith("psnr")}


def _pictures(
    fingerprint: Fingerprint, module: nn.Module, decode: Decode, latents: Tensor, bits_BK: Tensor
) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, H, W) in [0, 1] without and with the bits."""
    plain = (decode(latents) / 2 + 0.5).clamp(0, 1)
    with fingerprint.modulating(module, bits_BK):
        return plain, (decode(latents) / 2 + 0.5).clamp(0, 1)


def _read(
    fingerprint: Fingerprint, plain: Tensor, marked: Tensor, bits_BK: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """What is read of each picture (B, or B x K for "read"), by the report's key and the attack."""
    part = {"found_in_plain": (fingerprint.read(rounded(plain)).present_B > PRESENT).float()}
    for name, attack in MEASURED.items():
        found = fingerprint.read(attack(marked, generator))
        right_BK = (found.bits_BK > 0.5) == (bits_BK > 0.5)
        part[f"read {name}"], part[f"all_bits {name}"] = right_BK.float(), right_BK.all(1).float()
        part[f"found {name}"] = (found.present_B > PRESENT).float()
    return part


def _psnr(given: Tensor, wanted: Tensor) -> Tensor:
    return -10 * squared_error(given, wanted).clamp_min(1e-10).log10()


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(k, min(k + size, count)) for k in range(0, count, size))
