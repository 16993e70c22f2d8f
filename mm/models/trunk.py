"""The trunk: one transformer over text and picture tokens, with separate weights and shared attention.

Design choices
- Two streams a layer. Text is causal, has no timestep and does not attend to noisy pictures, so a prompt's keys and
  values are computed once (`encode_text` -> `PromptCache`) and reused at every step and for every picture of that
  prompt.
- With `prefix_lm` the tokens of a prompt, or of one turn of the user, attend to each other in both directions (prefix
  LM, Raffel et al. 2019, arXiv 1910.10683): in "a cat left of a dog" the state of "cat" needs "dog". Replies stay
  causal. A turn must then be read in one call.
- Picture tokens attend to text through projections of their own (`to_k_pic`, `to_v_pic`): the edit sites of erasure and
  customization, separate from the projections through which text attends to text.
- Within a picture attention is bidirectional. The timestep is per picture token (adaLN-single as in PixArt, arXiv
  2310.00426: one projection for all layers plus a table per layer), so that clean and noisy tokens can be mixed.
- A mode token before the picture tokens selects flow matching or codes. In codes mode a masked token is a learned
  vector at sigma 1, a known one its dequantized latent at sigma 0.
- The output is DDT's condition (Wang et al. 2025, arXiv 2504.05741): features for the velocity decoder or code head.
- With `number_words`, understanding tokens carry counts, which replies copy (`mm.models.number_copy`).
- With `reads`, understanding tokens of pictures are part of the text (bidirectional within a picture), a head tied to
  the word embeddings predicts the next word, and a source picture's clean latents pass the picture layers once, at
  sigma 0, as context for drawing (`encode_picture`).

Legend: B batch, T text tokens, N pictures, S understanding tokens, K counts, L picture tokens, P = L + 1 with the mode
token, C latent channels, D width, H heads, E = D / H, V words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from mm.layers.entry_points import ForwardMixin, entry_point
from mm.models import layers
from mm.models.cache import PromptCache, TextState
from mm.models.local_steps import LocalSteps
from mm.models.number_copy import NumberCopy
from mm.models.text_mask import prompt_numbers, text_mask
from mm.models.trunk_layers import PictureLayer, TextLayer, WordEmbedding

Mode = Literal["flow", "codes"]
MODES: tuple[Mode, ...] = ("flow", "codes")


class Trunk(LocalSteps, ForwardMixin, ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Maps text and latents to one feature vector per picture token.

    Args:
        vocabulary_size: Rows of the word embedding.
        width: D; a multiple of 4 * heads.
        depth: Layers of each stream.
        heads: H.
        text_ratio: Hidden width of the text feed-forward, as a multiple of D.
        picture_ratio: The same of the picture feed-forward.
        latent_channels: C.
        latent_size: Latents on each side of a picture.
        max_text: The longest text in tokens.
        reads: Whether there is a text head, so that the trunk answers and edits.
        understanding_token: Placeholder id of understanding tokens.
        prefix_lm: Whether prompts are bidirectional.
        prefix_start_tokens: Ids that start a prompt or a turn of the user.
        reply_token: Id that ends a prompt and starts a reply.
        number_words: Ids of the words for 1, 2, ...; empty for a trunk that does not copy counts.
        max_count: K, the highest count of an understanding token.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TextLayer", "PictureLayer"]  # noqa: RUF012
    _repeated_blocks = ["TextLayer", "PictureLayer"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        *,
        vocabulary_size: int = 1024,
        width: int = 256,
        depth: int = 8,
        heads: int = 4,
        text_ratio: int = 2,
        picture_ratio: int = 4,
        latent_channels: int = 16,
        latent_size: int = 8,
        max_text: int = 128,
        reads: bool = False,
        understanding_token: int = 6,
        prefix_lm: bool = False,
        prefix_start_tokens: tuple[int, ...] = (2, 7),
        reply_token: int = 8,
        number_words: Sequence[Sequence[int]] = (),
        max_count: int = 6,
    ) -> None:
        super().__init__()
        if width % heads or (width // heads) % 4:
            raise ValueError(f"width {width} must be a multiple of 4 * heads (heads = {heads})")
        self.words = WordEmbedding(vocabulary_size, width)
        self.text_layers = nn.ModuleList(TextLayer(width, heads, text_ratio) for _ in range(depth))
        self.latent_in = nn.Linear(latent_channels, width)
        self.place = nn.Parameter(torch.zeros(latent_size * latent_size, width))
        self.mode_tokens = nn.Embedding(len(MODES), width)
        self.masked = nn.Parameter(torch.zeros(width))
        self.sigma_embedding = layers.SigmaEmbedding(width)
        self.modulation = nn.Linear(width, 6 * width)
        self.picture_layers = nn.ModuleList(PictureLayer(width, heads, picture_ratio) for _ in range(depth))
        self.norm_out = layers.Norm(width)
        self.norm_text_out = layers.Norm(width) if reads else None
        self.source_mark = nn.Parameter(torch.zeros(width)) if reads else None
        self.number_copy = NumberCopy(width, number_words) if reads and number_words else None
        self.gradient_checkpointing = False
        self._init_weights()

    # A ModuleList has no element type.
    @property
    def _text_stack(self) -> list[TextLayer]:
        return cast("list[TextLayer]", self.text_layers)

    @property
    def _picture_stack(self) -> list[PictureLayer]:
        return cast("list[PictureLayer]", self.picture_layers)

    def _init_weights(self) -> None:
        layers.init_linears(self)
        nn.init.normal_(self.place, std=0.02)
        nn.init.normal_(self.masked, std=0.02)
        layers.zero(self.modulation)
        if self.number_copy is not None:
            self.number_copy.init_gate()
        for text_layer in self._text_stack:
            layers.zero(text_layer.attn.to_out, text_layer.ff.down)
        for layer in self._picture_stack:
            layers.zero(layer.attn.to_out, layer.ff.down)
            # Gates start at one: with the zeroed projections the block is the identity and still learns at once.
            layer.modulation.data[2].fill_(1.0)
            layer.modulation.data[5].fill_(1.0)

    @entry_point
    def encode_text(
        self, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None = None, understanding_NSD: torch.Tensor | None = None
    ) -> PromptCache:
        """Keys and values of a prompt for picture tokens; arguments and errors as in `read`."""
        return self._read(ids_BT, mask_BT, understanding_NSD, None)[1].prompt

    @entry_point
    def read(
        self,
        ids_BT: torch.Tensor,
        mask_BT: torch.Tensor | None = None,
        understanding_NSD: torch.Tensor | None = None,
        past: TextState | None = None,
    ) -> tuple[torch.Tensor, TextState]:
        """Encodes text, from the start or after `past`.

        Args:
            ids_BT: Token ids, int64.
            mask_BT: True = a real token; all by default.
            understanding_NSD: The understanding tokens of the N pictures whose S placeholders are in the text, in
                reading order; or (N, S, D + K) with the weights of K counts (`number_bumps`) after each.
            past: The state to continue from.

        Returns:
            Logits (B, T, V) of the next word after each token, and the state to continue from.

        Raises:
            ValueError: The text is longer than `max_text`, placeholders and understanding tokens do not match, or the
                trunk has no text head.
        """
        if self.norm_text_out is None:
            raise ValueError("this trunk draws only; reading needs one whose config says reads: true")
        x_BTD, state = self._read(ids_BT, mask_BT, understanding_NSD, past)
        x_BTD = self.norm_text_out(x_BTD)
        logits_BTV = self.words(states_BTD=x_BTD)
        if self.number_copy is None:
            return logits_BTV, state
        width, max_count = self.config.width, self.config.max_count
        has_counts = understanding_NSD is not None and understanding_NSD.shape[-1] == width + max_count
        counts = understanding_NSD[..., width:] if has_counts and understanding_NSD is not None else None
        is_understanding_BT = ids_BT == self.config.understanding_token
        targets = self.number_copy.pointer_targets(x_BTD, is_understanding_BT, counts, max_count)
        if past is not None and past.pointer_targets is not None:
            older = past.pointer_targets
            targets = torch.cat([older[0], targets[0]], 1), torch.cat([older[1], targets[1]], 1)
        return self.number_copy(logits_BTV, x_BTD, targets), replace(state, pointer_targets=targets)

    def _read(
        self,
        ids_BT: torch.Tensor,
        mask_BT: torch.Tensor | None,
        understanding_NSD: torch.Tensor | None,
        past: TextState | None,
    ) -> tuple[torch.Tensor, TextState]:
        before, length = 0 if past is None else len(past), ids_BT.shape[1]
        if before + length > self.config.max_text:
            raise ValueError(f"a text of {before + length} tokens is longer than the model's {self.config.max_text}")
        seen_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
        seen_BT = seen_BT if past is None else torch.cat([past.prompt.mask_BT, seen_BT], 1)
        x_BTD = self._text_tokens(ids_BT, understanding_NSD)
        positions_BT = (seen_BT.cumsum(1) - 1).clamp_min(0)[:, before:]
        angles = layers.rotary_angles(positions_BT, self.config.width // self.config.heads, 10000.0)
        mask = self._text_mask(ids_BT, seen_BT)
        keys, values, own_keys, own_values = [], [], [], []
        for i, layer in enumerate(self._text_stack):
            k, v = layer.for_pictures(x_BTD)
            keys.append(k if past is None else torch.cat([past.prompt.keys[i], k], 1))
            values.append(v if past is None else torch.cat([past.prompt.values[i], v], 1))
            older = () if past is None else (past.keys[i], past.values[i])
            x_BTD, k, v = self._run(layer, x_BTD, angles, mask, *older)
            own_keys.append(k)
            own_values.append(v)
        prompt = PromptCache(tuple(keys), tuple(values), seen_BT)
        return x_BTD, TextState(tuple(own_keys), tuple(own_values), prompt)

    def _text_tokens(self, ids_BT: torch.Tensor, understanding_NSD: torch.Tensor | None) -> torch.Tensor:
        """Word embeddings (B, T, D), with understanding tokens in place of their placeholders."""
        x_BTD = self.words(ids_BT)
        if understanding_NSD is None:
            return x_BTD
        places_BT = ids_BT == self.config.understanding_token
        shape = tuple(understanding_NSD.shape)
        if int(places_BT.sum()) != shape[0] * shape[1]:
            raise ValueError(
                f"{int(places_BT.sum())} placeholders in the text, but understanding tokens of shape {shape}"
            )
        width, max_count = self.config.width, self.config.max_count
        if shape[-1] not in (width, width + max_count):  # counts of another length would be ignored silently
            raise ValueError(
                f"understanding tokens of width {shape[-1]}; this trunk reads {width}, or {width} + {max_count} counts"
            )
        return x_BTD.masked_scatter(places_BT[..., None], understanding_NSD[..., :width].to(x_BTD.dtype))

    def _text_mask(self, ids_BT: torch.Tensor, seen_BT: torch.Tensor) -> torch.Tensor:
        config = self.config
        prompts = prompt_numbers(ids_BT, config.prefix_start_tokens, config.reply_token) if config.prefix_lm else None
        return text_mask(ids_BT, seen_BT, config.understanding_token, prompts)

    @entry_point
    def encode_picture(self, latents_BCHW: torch.Tensor, prompt: PromptCache) -> PromptCache:
        """The cache of `prompt` followed by the keys and values of a clean source picture.

        Args:
            latents_BCHW: Latents of unit deviation, one picture for each prompt of the cache.
            prompt: The prompts' cache.

        Raises:
            ValueError: The trunk has no text head, or there are more or fewer pictures than prompts.
        """
        if self.source_mark is None:
            raise ValueError("this trunk takes no source pictures; that needs one whose config says reads: true")
        if len(prompt) != len(latents_BCHW):
            raise ValueError(f"{len(latents_BCHW)} pictures but {len(prompt)} prompts in the cache; repeat the cache")
        x_BLD = self.latent_in(latents_BCHW.flatten(2).transpose(1, 2)) + (self.place + self.source_mark)
        shared = self._modulation(x_BLD.new_zeros(len(x_BLD), 1))
        height, width = latents_BCHW.shape[2:]
        angles = layers.picture_angles(height, width, self.config.width // self.config.heads, latents_BCHW.device)
        seen_BT = F.pad(prompt.mask_BT, (0, x_BLD.shape[1]), value=True)
        mask, keys, values = seen_BT[:, None, None], [], []
        for i, layer in enumerate(self._picture_stack):
            x_BLD, k, v = layer.with_keys(x_BLD, shared, angles, prompt.keys[i], prompt.values[i], mask)
            keys.append(k)
            values.append(v)
        return PromptCache(tuple(keys), tuple(values), seen_BT)

    def _modulation(self, sigma: torch.Tensor) -> torch.Tensor:
        return self.modulation(F.silu(self.sigma_embedding(sigma))).unflatten(-1, (6, -1))

    def _picture_tokens(
        self, latents_BCHW: torch.Tensor, sigma: torch.Tensor, mode: Mode, masked_BL: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, P, D) with the mode token first, and their noise levels (B, P) or (B, 1)."""
        x_BLD = self.latent_in(latents_BCHW.flatten(2).transpose(1, 2))
        if masked_BL is not None:
            x_BLD = torch.where(masked_BL[..., None], self.masked.to(x_BLD.dtype), x_BLD)
        x_BLD = x_BLD + self.place.to(x_BLD.dtype)
        index = torch.full((len(x_BLD), 1), MODES.index(mode), device=x_BLD.device)
        x_BPD = torch.cat([self.mode_tokens(index).to(x_BLD.dtype), x_BLD], 1)
        if sigma.ndim == 1:
            return x_BPD, sigma[:, None]
        return x_BPD, torch.cat([sigma.mean(1, keepdim=True), sigma], 1)

    def forward(
        self,
        latents_BCHW: torch.Tensor,
        sigma: torch.Tensor,
        prompt: PromptCache,
        mode: Mode = "flow",
        masked_BL: torch.Tensor | None = None,
        hidden_layer: int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Features of picture tokens.

        Args:
            latents_BCHW: Latents of unit deviation, (B, C, 8, 8).
            sigma: Noise levels (B,) or (B, L) in [0, 1]; 1 = noise, 0 = clean.
            prompt: The prompts' cache, one for each picture.
            mode: "flow" or "codes".
            masked_BL: True where a token is not known yet (codes mode).
            hidden_layer: Also return the tokens after this picture layer.

        Returns:
            Features (B, L, D); with `hidden_layer` also hidden tokens (B, L, D).

        Raises:
            ValueError: More or fewer pictures than prompts, or an unknown mode.
        """
        if len(prompt) != len(latents_BCHW):
            raise ValueError(f"{len(latents_BCHW)} pictures but {len(prompt)} prompts in the cache; repeat the cache")
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
        x_BPD, sigma = self._picture_tokens(latents_BCHW, sigma, mode, masked_BL)
        shared = self._modulation(sigma)
        height, width = latents_BCHW.shape[2:]
        angles = layers.picture_angles(height, width, self.config.width // self.config.heads, x_BPD.device)
        angles = F.pad(angles, (0, 0, 1, 0))  # the mode token has position zero
        mask = F.pad(prompt.mask_BT, (0, x_BPD.shape[1]), value=True)[:, None, None, :]
        hidden = x_BPD
        for i, layer in enumerate(self._picture_stack):
            x_BPD = self._run(layer, x_BPD, shared, angles, prompt.keys[i], prompt.values[i], mask)
            if i == hidden_layer:
                hidden = x_BPD
        features_BLD = self.norm_out(x_BPD)[:, 1:]
        return features_BLD if hidden_layer is None else (features_BLD, hidden[:, 1:])

    def _run(self, layer: nn.Module, *args: torch.Tensor) -> Any:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            run: Any = self._gradient_checkpointing_func  # set by enable_gradient_checkpointing
            return run(layer, *args)
        return layer(*args)
