"""What the pipelines of public unified models need of a family (`mm.pipelines.janus`, `mm.pipelines.emu3`).

Legend: B pictures, L tokens a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image

from mm.families import family_named
from mm.pipelines.token_sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class FamilyDefaults:
    """Settings of a family's authors, used where the caller gives none. `top_k` 0 = all codes."""

    guidance_scale: float
    top_k: int = 0
    negative_prompt: str = ""

    @classmethod
    def of(cls, name: str) -> FamilyDefaults:
        """Those of a family of `mm.families`."""
        known = family_named(name)
        return cls(guidance_scale=known.guidance or 1.0, top_k=known.top_k, negative_prompt=known.negative_prompt)


class UnifiedModel(Protocol):
    """A family of public unified models. `prompts` and `generators`: one a picture."""

    defaults: FamilyDefaults

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width of the picture to draw. Raises UserError where the given ones cannot be drawn."""
        ...

    def length(self, size: tuple[int, int]) -> int:
        """How many tokens a picture of this size has."""
        ...

    def draw(
        self,
        prompts: Sequence[str],
        negative_prompt: str,
        size: tuple[int, int],
        generators: Sequence[torch.Generator],
        sampling: Sampling,
        progress: Any = None,
    ) -> torch.Tensor:
        """Tokens (B, L) of the pictures; `progress.update()` is called after each."""
        ...

    def decode(self, tokens_BL: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Pictures (B, 3, height, width), about 0 to 1."""
        ...

    def answer(self, pictures: Sequence[Image.Image], questions: Sequence[str], max_words: int) -> list[str]:
        """One answer a pair."""
        ...
