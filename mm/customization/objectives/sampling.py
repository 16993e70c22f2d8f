"""Clean pictures of a denoiser's prediction, and pictures drawn again from a noise level, for any objective.

Design choices
- A prediction and the noisy latents are both linear in the clean latents and the noise. Their factors are read off the
  objective itself, so that velocity, epsilon, v and sample prediction need no cases here.

Legend: B pictures, C channels, H x W latents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mm.customization.objectives.protocol import Objective


def split(objective: Objective, noisy_BCHW: Tensor, level_B: Tensor, given_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """The clean latents and the noise that a prediction stands for.

    Args:
        objective: of the denoiser.
        noisy_BCHW: a c + b n, with clean latents c and noise n.
        level_B: noise levels.
        given_BCHW: the prediction, p c + q n.

    Returns:
        c and n, each (B, C, H, W): the solution of the two equations.
    """
    one = torch.ones(len(level_B), 1, 1, 1, device=noisy_BCHW.device)
    none = torch.zeros_like(one)
    a, b = objective.noised(one, none, level_B), objective.noised(none, one, level_B)
    p, q = objective.target(one, none, level_B), objective.target(none, one, level_B)
    apart = a * q - b * p
    return (q * noisy_BCHW - b * given_BCHW) / apart, (a * given_BCHW - p * noisy_BCHW) / apart


@torch.no_grad()
def redrawn(
    objective: Objective, clean_BCHW: Tensor, prompts: Sequence[str], *, strength: float, guidance: float,
    steps: int, generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """Pictures under other prompts that keep the layout: noised, and denoised again (SDEdit, Meng et al. 2021).

    Source: arXiv 2108.01073; the steps are DDIM's (Song et al. 2020, arXiv 2010.02502), without noise of their own.

    Args:
        objective: of the denoiser.
        clean_BCHW: latents of the pictures, on its device.
        prompts: one a picture.
        strength: of the noise, above 0 to 1; 1 keeps nothing of the pictures.
        guidance: scale of classifier-free guidance.
        steps: levels over the whole range, of which those below `strength` are used.
        generator: of the noise, on the CPU.

    Returns:
        Latents (B, C, H, W).
    """
    levels = [level for level in objective.fixed_levels(steps).flip(0) if objective.strength(level) <= strength]
    levels = levels or [objective.fixed_levels(steps)[0]]
    noise = torch.randn(clean_BCHW.shape, generator=generator).to(clean_BCHW)
    clean = clean_BCHW
    with_text, without = objective.encode_prompts(prompts), objective.encode_prompts([""] * len(prompts))
    for level in levels:
        level_B = level.expand(len(clean)).to(clean.device)
        noisy = objective.noised(clean, noise, level_B)
        plain = objective.predict(noisy, level_B, without)
        given = plain + guidance * (objective.predict(noisy, level_B, with_text) - plain)
        clean, noise = split(objective, noisy, level_B, given)
    return clean
