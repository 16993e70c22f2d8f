"""Janus (Wu et al. 2024, arXiv 2410.13848; Janus-Pro, arXiv 2501.17811) through transformers' own classes.

Design choices
- Prompts and questions go through the processor and its chat template, so that they are what the model was trained on.
- The unconditional row is DeepSeek's: the prompt's row with everything but the first and the begin-of-image token
  replaced by padding that stays visible. A negative prompt was never trained, and is refused.
- Only drawing is ours (noise that belongs to a picture); the modules, the decoder and reading are transformers'.
  `docs/unified.md` lists faults of transformers' own image generation.

Legend: B pictures, R rows (B, or 2 B with guidance), T tokens so far, N new ones, D features, V codes, L tokens drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mm.core.checks import shown
from mm.core.errors import UserError
from mm.pipelines.public import PublicModel
from mm.pipelines.token_sampling import Sampling, last_features, sample_codes
from mm.pipelines.unified_protocol import FamilyDefaults


class Janus(PublicModel):
    """`JanusForConditionalGeneration` and `JanusProcessor`."""

    defaults = FamilyDefaults.of("janus")

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """The one size that the model draws."""
        side = self.model.config.vision_config.image_size
        for name, given in (("height", height), ("width", width)):
            if given is not None and given != side:
                raise UserError(f"{name} is {shown(given)}; this Janus draws {side} x {side} pictures; leave it out")
        return side, side

    def length(self, size: tuple[int, int]) -> int:
        """How many tokens a picture has."""
        return self.model.config.vision_config.num_image_tokens

    def draw(
        self,
        prompts: Sequence[str],
        negative_prompt: str,
        size: tuple[int, int],
        generators: Sequence[torch.Generator],
        sampling: Sampling,
        progress: Any = None,
    ) -> torch.Tensor:
        """Tokens (B, L) of the pictures."""
        if negative_prompt:
            raise UserError(f"Janus was trained without negative prompts, got {negative_prompt!r}; leave it out")
        self.check_words(prompts)
        texts = [self.chat([{"type": "text", "text": prompt}]) for prompt in prompts]
        rows = self.processor(
            text=texts, generation_mode="image", padding=True, padding_side="left", return_tensors="pt"
        ).to(self.model.device)
        ids_RT, mask_RT = rows.input_ids, rows.attention_mask
        if sampling.guidance_scale != 1:
            tokens = self.processor.tokenizer
            kept = (ids_RT == tokens.bos_token_id) | (ids_RT == tokens.boi_token_id)
            blank = self.model.generation_config.pad_token_id  # a tokenizer may pad with another
            ids_RT = torch.cat([ids_RT, ids_RT.masked_fill(~kept, tokens.pad_token_id if blank is None else blank)])
            mask_RT = mask_RT.repeat(2, 1)
        prompt_RTD = self.model.get_input_embeddings()(ids_RT)
        return sample_codes(self, prompt_RTD, mask_RT, generators, sampling, self.length(size), progress)

    def read(
        self, new_RND: torch.Tensor, mask_RT: torch.Tensor, positions_RN: torch.Tensor, past: Any
    ) -> tuple[torch.Tensor, Any]:
        """Features (R, D) of the last token, and the cache."""
        return last_features(self.model.model.language_model, new_RND, mask_RT, positions_RN, past)

    def score(self, features_RD: torch.Tensor) -> torch.Tensor:
        """Logits (R, V) of the next code."""
        return self.model.model.generation_head(features_RD)

    def embed(self, picks_B: torch.Tensor, number: int) -> torch.Tensor:
        """Embeddings (B, 1, D) of codes."""
        return self.model.prepare_embeddings_for_image_generation(picks_B[:, None])

    def decode(self, tokens_BL: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Pictures (B, 3, height, width), about 0 to 1."""
        return self.unit(self.model.decode_image_tokens(tokens_BL).permute(0, 3, 1, 2))
