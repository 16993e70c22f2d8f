"""Emu3 (Wang et al. 2024, arXiv 2409.18869) through transformers' own classes.

Design choices
- One stream of tokens: a picture is rows of visual tokens, each closed by an end-of-line token. Only visual tokens are
  scored, and an end of line is read together with the last token of its row, so that nothing has to be forbidden.
- The unconditional row is the negative prompt in the form of a prompt for drawing, grid included, as BAAI's own script
  has it; guidance, top-k and the words of the negative prompt are theirs as well.
- BAAI publishes two sets of weights: Emu3-Gen draws, Emu3-Chat reads. Either loads; each is bad at the other's task.

Legend: B pictures, R rows (B, or 2 B with guidance), T tokens so far, N new ones, D features, V codes, L tokens drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from mm.core.checks import MAX_SIDE, whole
from mm.core.errors import UserError
from mm.pipelines.public import PublicModel
from mm.pipelines.token_sampling import Sampling, last_features, sample_codes
from mm.pipelines.unified_protocol import FamilyDefaults

_TAIL = 3  # tokens after the last row that transformers' decoder expects and drops


class Emu3(PublicModel):
    """`Emu3ForConditionalGeneration` and `Emu3Processor`."""

    defaults = FamilyDefaults.of("emu3")

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        self.visual_V = torch.tensor(model.vocabulary_mapping.image_tokens)

    def size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Any size in whole tokens; the processor's square where none is given."""
        step = self.processor.downsample_ratio
        side = round(self.processor.image_area**0.5 / step) * step
        size = side if height is None else height, side if width is None else width
        for name, given in zip(("height", "width"), size, strict=True):
            whole(name, given, 1, MAX_SIDE)
        if any(given % step for given in size):
            near = " x ".join(str(max(1, round(given / step)) * step) for given in size[::-1])
            raise UserError(f"Emu3 draws sizes in steps of {step}, not {size[1]} x {size[0]}; give for example {near}")
        return size

    def length(self, size: tuple[int, int]) -> int:
        """How many visual tokens a picture has."""
        return size[0] * size[1] // self.processor.downsample_ratio**2

    def draw(
        self,
        prompts: Sequence[str],
        negative_prompt: str,
        size: tuple[int, int],
        generators: Sequence[torch.Generator],
        sampling: Sampling,
        progress: Any = None,
    ) -> torch.Tensor:
        """Visual tokens (B, L), as numbers of the vocabulary."""
        texts = list(prompts)
        if sampling.guidance_scale != 1:
            texts += [negative_prompt] * len(prompts)
        self.check_words(texts)
        height, width = size
        rows = self.processor(
            text=texts, return_for_image_generation=True, ratio=f"{width}:{height}", image_area=height * width,
            padding=True, padding_side="left", return_tensors="pt",
        )  # fmt: skip
        ids_RT, mask_RT = (rows[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        canvas = _Canvas(self.model, self.visual_V.to(ids_RT.device), width // self.processor.downsample_ratio)
        prompt_RTD = self.model.get_input_embeddings()(ids_RT)
        picks_BL = sample_codes(canvas, prompt_RTD, mask_RT, generators, sampling, self.length(size), progress)
        return canvas.visual_V[picks_BL]

    def decode(self, tokens_BL: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Pictures (B, 3, height, width), about 0 to 1."""
        height, width = (side // self.processor.downsample_ratio for side in size)
        rows = F.pad(tokens_BL.unflatten(1, (height, width)), (0, 1), value=self.model.vocabulary_mapping.eol_token_id)
        tokens = F.pad(rows.flatten(1), (0, _TAIL))
        return self.unit(self.model.decode_image_tokens(image_tokens=tokens, height=height, width=width))


class _Canvas:
    """The model while it draws pictures that are `columns` tokens wide."""

    def __init__(self, model: Any, visual_V: torch.Tensor, columns: int) -> None:
        self.model, self.visual_V, self.columns = model, visual_V, columns

    def read(
        self, new_RND: torch.Tensor, mask_RT: torch.Tensor, positions_RN: torch.Tensor, past: Any
    ) -> tuple[torch.Tensor, Any]:
        """Features (R, D) of the last token, and the cache."""
        return last_features(self.model.model.text_model, new_RND, mask_RT, positions_RN, past)

    def score(self, features_RD: torch.Tensor) -> torch.Tensor:
        """Logits (R, V) of the next visual token."""
        return self.model.lm_head(features_RD)[:, self.visual_V]

    def embed(self, picks_B: torch.Tensor, number: int) -> torch.Tensor:
        """Embeddings (B, N, D) of visual tokens; at the end of a row, of the end of line as well."""
        ids_BN = self.visual_V[picks_B][:, None]
        if (number + 1) % self.columns == 0:
            ids_BN = F.pad(ids_BN, (0, 1), value=self.model.vocabulary_mapping.eol_token_id)
        return self.model.get_input_embeddings()(ids_BN)
