"""Losses of the judge.

Legend: B pictures, S sprite slots, N cells near a centre, G = 16 grid cells a side, K = 9 colours (natural first),
T tints, O objects.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mm.training.judge_pictures import JudgeBatch
from mm.world import vocabulary as v
from mm.world.judge import GRID, SIZE_UNIT, STRIDE, TINTS, Raw, bump

_NEAR = 0.25  # cells of at least this height are trained on object, colour, position and size


def answer_table() -> torch.Tensor:
    """(O, tints, K): whether an object in a tint answers to each colour."""
    return torch.tensor([[[v.counts_as(o, t, c) for c in TINTS] for t in TINTS] for o in v.ALL_OBJECTS]).float()


def losses(raw: Raw, batch: JudgeBatch, answers_OTK: torch.Tensor) -> dict[str, torch.Tensor]:
    """Weighted losses; unreadable pictures count for `readable` only."""
    good = batch.readable_B
    sprites_BS5, style_B = batch.sprites_BS5[good], batch.style_B[good]
    height_BGG, nearest_BGG, offset_BS2G = _targets(sprites_BS5)
    ground_B = torch.tensor([v.shows_background(s) for s in v.STYLES])[style_B]
    background_B = F.cross_entropy(raw.background_BN[good], batch.background_B[good], reduction="none") * ground_B
    return {
        "centre": 2 * _centre_loss(raw.centre_BGG[good], height_BGG, (sprites_BS5[..., 0] >= 0).sum()),
        **_cell_losses(raw, good, height_BGG, nearest_BGG, offset_BS2G, sprites_BS5, style_B, answers_OTK),
        "background": 0.3 * background_B.sum() / ground_B.sum().clamp_min(1),
        "style": 0.3 * F.cross_entropy(raw.style_BN[good], style_B),
        "readable": F.binary_cross_entropy_with_logits(raw.readable_B, good.float()),
    }


def _targets(sprites_BS5: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Target heights (B, G, G), the nearest sprite of each cell (B, G, G), and offsets (B, S, 2, G) in cells."""
    at = torch.arange(GRID) + 0.5
    present_BS = sprites_BS5[..., 0] >= 0
    dx_BSG = sprites_BS5[..., 2, None] / STRIDE - at
    dy_BSG = sprites_BS5[..., 3, None] / STRIDE - at
    distance2_BSGG = dx_BSG.square()[:, :, None, :] + dy_BSG.square()[:, :, :, None]
    distance2_BSGG = distance2_BSGG.masked_fill(~present_BS[..., None, None], 1e4)
    nearest2_BGG, nearest_BGG = distance2_BSGG.min(1)
    return bump(nearest2_BGG), nearest_BGG, torch.stack([dx_BSG, dy_BSG], 2)


def _centre_loss(logit_BGG: torch.Tensor, height_BGG: torch.Tensor, sprites: torch.Tensor) -> torch.Tensor:
    """Generalized focal loss (arXiv 2006.04388) a sprite: cells that are nearly right weigh little."""
    miss_BGG = F.binary_cross_entropy_with_logits(logit_BGG, height_BGG, reduction="none")
    return (miss_BGG * (logit_BGG.sigmoid() - height_BGG).square()).sum() / sprites.clamp_min(1)


def _cell_losses(
    raw: Raw,
    good: torch.Tensor,
    height_BGG: torch.Tensor,
    nearest_BGG: torch.Tensor,
    offset_BS2G: torch.Tensor,
    sprites_BS5: torch.Tensor,
    style_B: torch.Tensor,
    answers_OTK: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Losses of object, colour, position and size, in cells near a centre."""
    b, row, column = torch.nonzero(height_BGG > _NEAR, as_tuple=True)
    weight_N = height_BGG[b, row, column]
    weight_N = weight_N / weight_N.sum().clamp_min(1)
    which = nearest_BGG[b, row, column]
    sprite_N5 = sprites_BS5[b, which]
    object_N, tint_N = sprite_N5[:, 0].long(), sprite_N5[:, 1].long()
    object_loss = F.cross_entropy(raw.object_BOGG[good][b, :, row, column], object_N, reduction="none")
    answers_NK = answers_OTK[object_N, tint_N]
    colour_logits_NK = raw.colour_BKGG[good][b, :, row, column]
    hue_N = torch.tensor([v.shows_colour(s) for s in v.STYLES])[style_B[b]]
    colour_loss = F.binary_cross_entropy_with_logits(colour_logits_NK, answers_NK, reduction="none").sum(1) * hue_N
    true_offset_N2 = torch.stack([offset_BS2G[b, which, 0, column], offset_BS2G[b, which, 1, row]], 1)
    place_loss = F.smooth_l1_loss(raw.offset_B2GG[good][b, :, row, column], true_offset_N2, reduction="none").sum(1)
    size_loss = F.smooth_l1_loss(raw.size_BGG[good][b, row, column], sprite_N5[:, 4] / SIZE_UNIT, reduction="none")
    return {
        "object": (object_loss * weight_N).sum(),
        "colour": 0.5 * (colour_loss * weight_N).sum(),
        "place": 2 * (place_loss * weight_N).sum(),
        "size": 10 * (size_loss * weight_N).sum(),
    }
