"""Pictures token by token from a language model: guidance, top-k and noise that belongs to a picture.

Design choices
- Sampling is argmax of logits / temperature + Gumbel noise, in float32 on the CPU's generators, one a picture: the same
  distribution as softmax and multinomial, but a picture does not depend on its batch (rule 1).
- Guidance reads two rows a picture, the prompt's and the unconditional one, in one batch: logits are mixed as
  u + s (c - u), before temperature and top-k, as transformers does.
- Positions count real tokens, so that padding on the left changes nothing.

Legend: B pictures, R rows (B, or 2 B with guidance), T tokens so far, N new ones, D features, V codes, L tokens drawn.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mm.core.errors import UserError
from mm.pipelines.sampling import gumbel_noise


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """`temperature` 0 takes the likeliest code; `top_k` 0 samples from all codes."""

    guidance_scale: float
    temperature: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature is {self.temperature}; give 0 or more")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; give 0 (all codes) or more")


class TokenModel(Protocol):
    """What sampling needs of a model."""

    def read(
        self, new_RND: torch.Tensor, mask_RT: torch.Tensor, positions_RN: torch.Tensor, past: Any
    ) -> tuple[torch.Tensor, Any]:
        """Features (R, D) of the last token, and the cache."""
        ...

    def score(self, features_RD: torch.Tensor) -> torch.Tensor:
        """Logits (R, V) of the next code."""
        ...

    def embed(self, picks_B: torch.Tensor, number: int) -> torch.Tensor:
        """Embeddings (B, N, D) of code `number` of each picture, and of whatever must follow it."""
        ...


def mix(logits_RV: torch.Tensor, scale: float) -> torch.Tensor:
    """Guided logits (B, V) from those of the prompts and, where guidance is on, of the unconditional rows."""
    if scale == 1:
        return logits_RV
    prompted, unconditional = logits_RV.chunk(2)
    return unconditional + scale * (prompted - unconditional)


def pick(logits_BV: torch.Tensor, generators: Sequence[torch.Generator], sampling: Sampling) -> torch.Tensor:
    """One code a picture (B)."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        least = logits_BV.topk(sampling.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, -torch.inf)
    return (logits_BV + gumbel_noise(generators, (logits_BV.shape[-1],)).to(logits_BV.device)).argmax(-1)


def sample_codes(
    model: TokenModel,
    prompt_RTD: torch.Tensor,
    mask_RT: torch.Tensor,
    generators: Sequence[torch.Generator],
    sampling: Sampling,
    count: int,
    progress: Any = None,
) -> torch.Tensor:
    """Codes (B, L = `count`) that follow the prompts' embeddings, which are aligned at their ends."""
    new_RND, past = prompt_RTD, None
    codes: list[torch.Tensor] = []
    for number in range(count):
        positions_RN = (mask_RT.cumsum(-1) - 1).clamp_min(0)[:, -new_RND.shape[1] :]
        features_RD, past = model.read(new_RND, mask_RT, positions_RN, past)
        logits_BV = mix(model.score(features_RD).float(), sampling.guidance_scale)
        codes.append(pick(logits_BV, generators, sampling))
        new_RND = model.embed(codes[-1], number).repeat(len(mask_RT) // len(generators), 1, 1)
        mask_RT = torch.cat([mask_RT, mask_RT.new_ones(new_RND.shape[:2])], 1)
        if progress is not None:
            progress.update()
    return torch.stack(codes, 1)


def last_features(
    language_model: Any, new_RND: torch.Tensor, mask_RT: torch.Tensor, positions_RN: torch.Tensor, past: Any
) -> tuple[torch.Tensor, Any]:
    """Features (R, D) of the last token that a transformers decoder reads, and its cache."""
    from transformers import DynamicCache

    past = DynamicCache(config=language_model.config) if past is None else past
    # transformers 5.24 calls it `cache`, and 5.40 gives up the old name
    name = "cache" if "cache" in inspect.signature(language_model.forward).parameters else "past_key_values"
    out = language_model(
        inputs_embeds=new_RND,
        attention_mask=mask_RT,
        position_ids=positions_RN,
        use_cache=True,
        **{name: past},
    )
    return out.last_hidden_state[:, -1], past
