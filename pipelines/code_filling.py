"""Drawing in codes: some tokens a step until the picture is full, then revisions of those that were not sure.

Design choices
- Guidance mixes the trunk's features and grows with the share of known tokens (TokenBridge, arXiv 2503.16430). The
  unconditional features are computed only where they count: not for an empty picture, where guidance is zero, and
  within `guided_from` and `guided_until` alone (an interval of guidance, Kynkaanniemi et al. 2024, arXiv 2404.07724).
- Confident neighbours (as in LocalLeap): what a masked token will be is often certain once a token beside it is known.
  At each step the masked neighbours of known and of planned tokens are sampled, too. Those whose codes are likely
  enough stay, so that fewer steps are left. Each picture has its own count of steps.
- A revision masks some tokens and draws them again: random ones, but only of those that were not sure, so that fewer
  revisions reach each of them.
- Local steps (ReCAP, arXiv 2505.19089): between two full steps only those tokens pass the trunk that are sampled now or
  changed at the step before (`mm.models.local_steps`).

Legend: B pictures, L tokens, K channels, V levels, D features, M tokens sampled in all pictures, R rows (B a branch),
A pictures that are not finished, G of these the guided ones, N tokens of a step.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence

import torch

from mm.models.codes import CodeHead
from mm.models.local_steps import PictureCache
from mm.pipelines.drawing_parts import DrawingParts
from mm.pipelines.fast import FULL_CODES, FastCodes
from mm.pipelines.guidance import CODES_GUIDANCE
from mm.pipelines.sampling import CodeStep, code_steps, gumbel_noise, masked_steps
from mm.tokenizers import Bridge

_DECIDING = 8  # channels, in the order of decisions, whose probabilities say how sure a token is


class _Filling:
    """The state of a picture batch that is being filled."""

    def __init__(
        self, parts: DrawingParts, code_head: CodeHead, bridge: Bridge, shape: tuple[int, int], settings: FastCodes
    ) -> None:  # fmt: skip
        self.trunk, self.branches, self.run = parts.trunk, parts.branches, parts.run
        self.code_head, self.bridge, self.shape, self.settings = code_head, bridge, shape, settings
        self.dtype = parts.trunk.dtype  # asked once: diffusers goes through all parameters
        device, (height, width) = parts.branches.cache.mask_BT.device, shape
        pictures, tokens, channels = len(parts.generators), height * width, bridge.config.channels
        self.gumbel_BLKV = gumbel_noise(parts.generators, (tokens, channels, bridge.config.levels)).to(device)
        self.codes_BLK = torch.zeros(pictures, tokens, channels, dtype=torch.int64, device=device)
        self.known_BL = torch.zeros(pictures, tokens, dtype=torch.bool)
        self.log_BL = torch.full((pictures, tokens), -math.inf)  # how likely the codes of each token were
        self.latents = torch.zeros(pictures, channels, height, width, device=device)
        self._cache: PictureCache | None = None
        self._age = 0  # steps since the last full one
        self._changed_BL = torch.zeros_like(self.known_BL)

    def draw(self, masked_BL: torch.Tensor, now_BL: torch.Tensor, maybe_BL: torch.Tensor, heat: float) -> None:
        """Samples the tokens of `now_BL`, and those of `maybe_BL` that are likely enough; both on the CPU."""
        asked_BL = now_BL | maybe_BL
        row_M, token_M = asked_BL.nonzero(as_tuple=True)
        features_MD = self._features(masked_BL, asked_BL)
        codes_MK, log_MK = self.code_head.sample_with_likelihood(
            features_MD, self.gumbel_BLKV[row_M, token_M], temperature=heat * self.run.temperature
        )
        log_M, keep_M = log_MK[:, :_DECIDING].mean(1).cpu(), now_BL[row_M, token_M]
        if self.settings.confidence is not None:
            keep_M = keep_M | (log_M > self.settings.confidence)
        row_M, token_M = row_M[keep_M], token_M[keep_M]
        self.codes_BLK[row_M, token_M] = codes_MK[keep_M.to(codes_MK.device)]
        self.known_BL[row_M, token_M] = True
        self.log_BL[row_M, token_M] = log_M[keep_M]
        self._changed_BL = torch.zeros_like(self.known_BL)
        self._changed_BL[row_M, token_M] = True
        codes_BKHW = self.codes_BLK.transpose(1, 2).unflatten(-1, self.shape)
        open_B1HW = ~self.known_BL.unflatten(1, (1, *self.shape)).to(self.latents.device)
        self.latents = self.bridge.dequantize(codes_BKHW).float().masked_fill(open_B1HW, 0.0)

    def _features(self, masked_BL: torch.Tensor, asked_BL: torch.Tensor) -> torch.Tensor:
        """Guided features (M, D) of the tokens that are sampled."""
        if self.settings.full_every == 1:
            return self._full_features(masked_BL, asked_BL)
        device, count = self.latents.device, len(self.branches)
        latents = self.latents.repeat(count, 1, 1, 1).to(self.dtype)
        masked_RL = masked_BL.to(device).repeat(count, 1)
        row_M, token_M = asked_BL.nonzero(as_tuple=True)
        if self._cache is not None and self._age + 1 < self.settings.full_every:
            self._age += 1
            places_BN, token_M = _places(asked_BL, asked_BL | self._changed_BL)
            features_RND = self.trunk.local_step(latents, masked_RL, self._cache, places_BN.to(device).repeat(count, 1))
        else:
            self._age = 0
            features_RND, self._cache = self.trunk.full_step(latents, masked_RL, self.branches.cache)
        return self._mixed(features_RND, masked_BL)[row_M, token_M]

    def _full_features(self, masked_BL: torch.Tensor, asked_BL: torch.Tensor) -> torch.Tensor:
        """The same where every step is a full one; rows that count nothing do not pass the trunk."""
        device, count, size = self.latents.device, len(self.branches), len(asked_BL)
        active_A = asked_BL.any(1).nonzero()[:, 0]
        masked_AL = masked_BL[active_A]
        guided_G = self._guided(masked_AL).nonzero()[:, 0]
        row_R = torch.cat([active_A, *(active_A[guided_G] + size * branch for branch in range(1, count))])
        cache = self.branches.cache
        if len(row_R) < count * size:
            cache = cache.select(row_R.to(device))
        picture_R = row_R % size
        masked_RL, latents = masked_BL[picture_R].to(device), self.latents[picture_R.to(device)].to(self.dtype)
        features_RLD = self.trunk(latents, masked_RL.float(), cache, "codes", masked_RL)
        features_ALD, others = features_RLD[: len(active_A)], features_RLD[len(active_A) :]
        if len(guided_G) and count > 1:
            at_G = guided_G.to(device)
            mixed_GLD = self._mixed(torch.cat([features_ALD[at_G], others]), masked_AL[guided_G])
            features_ALD = features_ALD.index_copy(0, at_G, mixed_GLD)
        row_M, token_M = asked_BL[active_A].nonzero(as_tuple=True)
        return features_ALD[row_M, token_M]

    def _guided(self, masked_BL: torch.Tensor) -> torch.Tensor:
        """For which pictures (B,) the other branches are computed, by the share that is known."""
        known_B = (~masked_BL).float().mean(1)
        return (known_B > 0) & (known_B >= self.settings.guided_from) & (known_B <= self.settings.guided_until)

    def _mixed(self, features_RND: torch.Tensor, masked_BL: torch.Tensor) -> torch.Tensor:
        """Guided features (B, N, D); guidance grows with the known share of a picture."""
        share_B = (CODES_GUIDANCE * (~masked_BL).float().mean(1)).to(features_RND.device)
        mixed_BND = self.branches.mix(features_RND, self.run.guidance_scale, share_B[:, None, None])
        return mixed_BND.to(features_RND.dtype)  # shares in fp32 widen a model in bf16


def code_filling(
    parts: DrawingParts, code_head: CodeHead, bridge: Bridge, shape: tuple[int, int]
) -> Generator[int, None, torch.Tensor]:  # fmt: skip
    """Draws codes until the picture is full, then revises it, with the settings in `run.fast` or those of the mode.

    Args:
        parts: What is drawn with; its steps are the most that are taken.
        code_head: Samples the codes of a token from its features.
        bridge: Between codes and latents.
        shape: (H, W) of the latents.

    Yields:
        How many steps are done.

    Returns:
        The latents (B, K, H, W); those that are not drawn yet are zero.
    """
    run, steps = parts.run, parts.steps
    settings = run.fast if isinstance(run.fast, FastCodes) else FULL_CODES
    tokens, count = shape[0] * shape[1], settings.revisions(steps)
    plan = list(
        code_steps(
            parts.generators,
            tokens,
            steps,
            revisions=count,
            revised=settings.revised,
            shape=shape if settings.spread else None,
            power=settings.power,
        )
    )
    revising = plan[len(plan) - count :]
    order_BL = torch.cat([step.now_BN for step in plan[: len(plan) - count]], 1)
    left = masked_steps(tokens, steps - count, settings.power)
    filling = _Filling(parts, code_head, bridge, shape, settings)
    near_LL = neighbours(shape)
    run.num_timesteps, done = len(plan), 0
    while not filling.known_BL.all() and not run.interrupt:
        now_BL = planned(order_BL, filling.known_BL, left)
        beside_BL = ((filling.known_BL | now_BL).float() @ near_LL) > 0
        maybe_BL = beside_BL & ~filling.known_BL & ~now_BL
        if settings.confidence is None or not settings.neighbours:
            maybe_BL = torch.zeros_like(maybe_BL)
        filling.draw(~filling.known_BL, now_BL, maybe_BL, 1.0)
        filling.latents, done = parts.on_step(done, done, filling.latents), done + 1
        yield done
    run.num_timesteps = done + len(revising)
    for step in revising:
        if run.interrupt:
            break
        now_BL = revised(step, filling.log_BL, settings.confidence)
        if not now_BL.any():  # every token is sure
            continue
        filling.draw(now_BL, now_BL, torch.zeros_like(now_BL), step.heat)
        filling.latents, done = parts.on_step(done, done, filling.latents), done + 1
        yield done
    return filling.latents


def planned(order_BL: torch.Tensor, known_BL: torch.Tensor, left: Sequence[int]) -> torch.Tensor:
    """The tokens (B, L) that each picture's schedule draws next: in its order, down to the next count of masked ones.

    Args:
        order_BL: Tokens in the order in which a picture is filled.
        known_BL: What is known.
        left: How many tokens are masked after each step of the schedule.
    """
    now_BL = torch.zeros_like(known_BL)
    for now_L, order_L, known_L in zip(now_BL, order_BL, known_BL, strict=True):
        masked = int((~known_L).sum())
        if masked:
            target = next(count for count in left if count < masked)
            now_L[order_L[~known_L[order_L]][: masked - target]] = True
    return now_BL


def revised(step: CodeStep, log_BL: torch.Tensor, confidence: float | None) -> torch.Tensor:
    """The tokens (B, L) that a revision draws again: as many as planned, of those that were not sure.

    Args:
        step: The planned revision.
        log_BL: How likely the codes of each token were.
        confidence: Above it a token is sure; None takes the planned tokens.
    """
    if confidence is None or step.order_BL is None:
        return step.masked_BL
    now_BL = torch.zeros_like(step.masked_BL)
    for now_L, order_L, log_L in zip(now_BL, step.order_BL, log_BL, strict=True):
        now_L[order_L[log_L[order_L] <= confidence][: step.now_BN.shape[1]]] = True
    return now_BL


def neighbours(shape: tuple[int, int]) -> torch.Tensor:
    """(L, L): 1 where two tokens touch, at a corner at least."""
    y, x = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
    place_L2 = torch.stack([y.flatten(), x.flatten()], 1)
    apart_LL = (place_L2[:, None] - place_L2[None]).abs().amax(-1)
    return (apart_LL == 1).float()


def _places(asked_BL: torch.Tensor, computed_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens to compute (B, N), each row padded with one of its own, and the place in its row of each asked token."""
    counts = computed_BL.sum(1)
    most = max(1, int(counts.max()))
    order_BL = (~computed_BL).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    places_BN = torch.where(torch.arange(most) < counts[:, None], order_BL, order_BL[:, :1])
    rank_BL = computed_BL.long().cumsum(1) - 1
    return places_BN, rank_BL[asked_BL]
