"""The trunk: one transformer over text and picture tokens, with separate weights and shared attention.

Design choices
- Two streams a layer. Text is causal, has no timestep and never sees a noisy picture, so a prompt's keys and values are
  computed once (`encode_text` -> `PromptCache`) and reused at every step and for every picture of that prompt.
- With `whole_turns` a prompt, or what the user says in one turn, sees itself whole (a prefix LM, Raffel et al. 2019,
  arXiv 1910.10683): in "a cat left of a dog" the cat must know of the dog. Replies stay causal. A turn must then be
  read in one call.
- Pictures read text through maps of their own (`to_k_pic`, `to_v_pic`): the edit sites of erasure and customization,
  apart from the maps through which text reads text.
- Within a picture attention is bidirectional. The timestep is per picture token (adaLN-single as in PixArt, arXiv
  2310.00426: one projection for all layers plus a table per layer), so clean and noisy tokens can stand side by side.
- A mode token, put before the picture's tokens, tells drawing by flow from drawing in codes. In codes mode a masked
  token is a learned vector at sigma 1, a known one its dequantized latent at sigma 0.
- The output is DDT's condition (Wang et al. 2025, arXiv 2504.05741): features for the velocity decoder or code head.
- With `number_words`, looks bring their numbers along, and replies copy them (`mm.models.number_copy`).
- With `reads`, understanding tokens of pictures stand among the words (bidirectional within a picture, causal
  otherwise), a head tied to the word table says the next word, and a source picture's clean latents go through the
  picture layers at sigma 0, once, to be read by whoever draws (`encode_picture`).

This module does not know words, files, samplers or how features become pictures.
Legend: B batch, T text tokens, L picture tokens, P = L + 1 with the mode token, D width, H heads, E = D / H.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from mm.models import layers
from mm.models.cache import PromptCache, TextState
from mm.models.number_copy import NumberCopy

Mode = Literal["flow", "codes"]
MODES: tuple[Mode, ...] = ("flow", "codes")


class TextLayer(nn.Module):
    """A causal text layer that also offers keys and values for pictures."""

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.norm_1 = layers.Norm(width)
        self.attn = layers.SelfProjections(width, heads)
        self.norm_2 = layers.Norm(width)
        self.ff = layers.FeedForward(width, ratio)
        self.to_k_pic = nn.Linear(width, width, bias=False)
        self.to_v_pic = nn.Linear(width, width, bias=False)
        self.norm_k_pic = layers.Norm(width // heads)

    def for_pictures(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, T, H, E) that pictures attend to at this layer."""
        normed = self.norm_1(x_BTD)
        k, v = (f(normed).unflatten(-1, (self.attn.heads, -1)) for f in (self.to_k_pic, self.to_v_pic))
        return self.norm_k_pic(k), v

    def forward(
        self,
        x_BTD: torch.Tensor,
        angles: torch.Tensor,
        mask: torch.Tensor,
        past_k: torch.Tensor | None = None,
        past_v: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The tokens, and the keys and values of all tokens so far."""
        q, k, v = self.attn(self.norm_1(x_BTD))
        k = layers.rotate(k, angles)
        if past_k is not None and past_v is not None:
            k, v = torch.cat([past_k, k], 1), torch.cat([past_v, v], 1)
        x_BTD = x_BTD + self.attn.to_out(layers.attend(layers.rotate(q, angles), k, v, mask))
        return x_BTD + self.ff(self.norm_2(x_BTD)), k, v


class PictureLayer(nn.Module):
    """A bidirectional picture layer with adaLN, attending to its own tokens and to the prompt's cache."""

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.norm_1 = layers.Norm(width)
        self.attn = layers.SelfProjections(width, heads)
        self.norm_2 = layers.Norm(width)
        self.ff = layers.FeedForward(width, ratio)
        self.modulation = nn.Parameter(torch.zeros(6, width))

    def forward(
        self,
        x_BPD: torch.Tensor,
        shared_6: torch.Tensor,
        angles: torch.Tensor,
        text_k: torch.Tensor,
        text_v: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """The tokens; text keys and values are read beside the picture's own."""
        k, v, finish = self.offer(x_BPD, shared_6, angles)
        return finish(torch.cat([text_k, k], 1), torch.cat([text_v, v], 1), mask)

    def offer(
        self, x_BPD: torch.Tensor, shared_6: torch.Tensor, angles: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Callable[..., torch.Tensor]]:
        """This layer's keys and values of its tokens, and the rest of the layer as a function of all that is read."""
        mod = shared_6 + self.modulation.to(shared_6.dtype)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = mod.unbind(-2)
        q, k, v = self.attn(layers.modulate(self.norm_1(x_BPD), shift_a, scale_a))
        q, k = layers.rotate(q, angles), layers.rotate(k, angles)

        def finish(all_k: torch.Tensor, all_v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            # Text keys are not rotated: every picture token reads them as if from the origin, so that where it stands
            # in the picture can decide which words it looks at.
            x = torch.addcmul(x_BPD, gate_a, self.attn.to_out(layers.attend(q, all_k, all_v, mask)))
            return torch.addcmul(x, gate_f, self.ff(layers.modulate(self.norm_2(x), shift_f, scale_f)))

        return k, v, finish


class Trunk(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Text and latents in, one feature vector per picture token out."""

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
        look_token: int = 6,
        whole_turns: bool = False,
        turn_tokens: tuple[int, ...] = (2, 7),
        reply_token: int = 8,
        number_words: Sequence[Sequence[int]] = (),
        most_looks: int = 6,
    ) -> None:
        super().__init__()
        if width % heads or (width // heads) % 4:
            raise ValueError(f"width {width} must be a multiple of 4 * heads (heads = {heads})")
        self.words = nn.Embedding(vocabulary_size, width)
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

    # A ModuleList does not tell the type of its modules.
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

    @apply_forward_hook  # an offloaded trunk comes back to its device for this, as for forward
    def encode_text(
        self, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None = None, looks_NSD: torch.Tensor | None = None
    ) -> PromptCache:
        """A prompt's keys and values for pictures; arguments and errors as in `read`."""
        return self._read(ids_BT, mask_BT, looks_NSD, None)[1].prompt

    @apply_forward_hook
    def read(
        self,
        ids_BT: torch.Tensor,
        mask_BT: torch.Tensor | None = None,
        looks_NSD: torch.Tensor | None = None,
        past: TextState | None = None,
    ) -> tuple[torch.Tensor, TextState]:
        """Logits of the next word (B, T, V) after each token, and the state that more text can go on from.

        `ids` int64 (B, T); `mask` bool, True = a real token (default all); `looks` (N, S, D): the understanding tokens
        of the N pictures whose S places hold `look_token`, in reading order; or (N, S, D + K) with the weights of K
        numbers (`number_bumps`) after each. Raises ValueError when the text is longer
        than `max_text`, the places do not match the looks, or the trunk has no text head.
        """
        if self.norm_text_out is None:
            raise ValueError("this trunk draws only; reading needs one whose config says reads: true")
        x_BTD, state = self._read(ids_BT, mask_BT, looks_NSD, past)
        x_BTD = self.norm_text_out(x_BTD)
        logits_BTV = F.linear(x_BTD, self.words.weight.to(x_BTD.dtype))
        if self.number_copy is None:
            return logits_BTV, state
        width, most = self.config.width, self.config.most_looks
        numbers = looks_NSD[..., width:] if looks_NSD is not None and looks_NSD.shape[-1] == width + most else None
        counted = self.number_copy.offer(x_BTD, ids_BT == self.config.look_token, numbers, most)
        if past is not None and past.counted is not None:
            counted = torch.cat([past.counted[0], counted[0]], 1), torch.cat([past.counted[1], counted[1]], 1)
        return self.number_copy(logits_BTV, x_BTD, counted), replace(state, counted=counted)

    def _read(
        self,
        ids_BT: torch.Tensor,
        mask_BT: torch.Tensor | None,
        looks_NSD: torch.Tensor | None,
        past: TextState | None,
    ) -> tuple[torch.Tensor, TextState]:
        before, length = 0 if past is None else len(past), ids_BT.shape[1]
        if before + length > self.config.max_text:
            raise ValueError(f"a text of {before + length} tokens is longer than the model's {self.config.max_text}")
        seen_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
        seen_BT = seen_BT if past is None else torch.cat([past.prompt.mask_BT, seen_BT], 1)
        x_BTD = self._text_tokens(ids_BT, looks_NSD)
        positions_BT = (seen_BT.cumsum(1) - 1).clamp_min(0)[:, before:]
        angles = layers.rotary_angles(positions_BT, self.config.width // self.config.heads, 10000.0)
        mask = self._text_mask(ids_BT, seen_BT, before)
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

    def _text_tokens(self, ids_BT: torch.Tensor, looks_NSD: torch.Tensor | None) -> torch.Tensor:
        x_BTD = self.words(ids_BT)
        if looks_NSD is None:
            return x_BTD
        places_BT = ids_BT == self.config.look_token
        if int(places_BT.sum()) != looks_NSD.shape[0] * looks_NSD.shape[1]:
            raise ValueError(f"{int(places_BT.sum())} places for looks, but looks of shape {tuple(looks_NSD.shape)}")
        width, most = self.config.width, self.config.most_looks
        if looks_NSD.shape[-1] not in (width, width + most):  # numbers of another length would be lost unnoticed
            found = looks_NSD.shape[-1]
            raise ValueError(f"looks of width {found}; this trunk reads {width}, or {width} + {most} numbers")
        return x_BTD.masked_scatter(places_BT[..., None], looks_NSD[..., :width].to(x_BTD.dtype))

    def _text_mask(self, ids_BT: torch.Tensor, seen_BT: torch.Tensor, before: int) -> torch.Tensor:
        """(B, 1, T, all): causal, but a picture's looks see each other, and so do the words of a turn where
        `whole_turns` says so; padding sees itself, so no row is empty."""
        length, total = ids_BT.shape[1], seen_BT.shape[1]
        order = torch.arange(total, device=ids_BT.device)
        itself = order[None] == order[before:, None]
        look_BT = ids_BT == self.config.look_token
        run_BT = (look_BT & ~F.pad(look_BT[:, :-1], (1, 0))).cumsum(1) * look_BT
        together = _same(run_BT)
        if self.config.whole_turns:
            together = together | _same(self._turns(ids_BT))
        causal = (order[None] <= order[before:, None]) | F.pad(together, (total - length, 0))
        return ((causal & seen_BT[:, None, :]) | itself)[:, None]

    def _turns(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """(B, T): the number of the turn, or prompt, that a token stands in; 0 in replies."""
        starts = torch.zeros_like(ids_BT, dtype=torch.bool)
        for token in self.config.turn_tokens:
            starts |= ids_BT == token
        place = torch.arange(1, ids_BT.shape[1] + 1, device=ids_BT.device).expand_as(ids_BT)
        started, replied = (
            torch.where(marks, place, 0).cummax(1).values for marks in (starts, ids_BT == self.config.reply_token)
        )
        return torch.where(started > replied, started, 0)

    @apply_forward_hook
    def encode_picture(self, latents_BCHW: torch.Tensor, prompt: PromptCache) -> PromptCache:
        """The cache of `prompt` followed by a clean source picture's keys and values, for edits to read.

        `latents` (B, C, 8, 8) of unit deviation, one picture for each prompt of the cache.
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
        keys, values = [], []
        for i, layer in enumerate(self._picture_stack):
            k, v, finish = layer.offer(x_BLD, shared, angles)
            keys.append(torch.cat([prompt.keys[i], k], 1))
            values.append(torch.cat([prompt.values[i], v], 1))
            if i + 1 < len(self._picture_stack):  # nobody reads what comes after the last layer's keys and values
                x_BLD = finish(keys[-1], values[-1], seen_BT[:, None, None])
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
        """Features (B, L, D) of picture tokens.

        `latents` (B, C, 8, 8) of unit deviation; `sigma` (B,) or (B, L) in [0, 1], 1 = noise, 0 = clean; `masked` True
        where a token is not known yet (codes mode). With `hidden_layer` = i, also the tokens after picture layer i.
        """
        if len(prompt) != len(latents_BCHW):
            raise ValueError(f"{len(latents_BCHW)} pictures but {len(prompt)} prompts in the cache; repeat the cache")
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
        x_BPD, sigma = self._picture_tokens(latents_BCHW, sigma, mode, masked_BL)
        shared = self._modulation(sigma)
        height, width = latents_BCHW.shape[2:]
        angles = layers.picture_angles(height, width, self.config.width // self.config.heads, x_BPD.device)
        angles = F.pad(angles, (0, 0, 1, 0))  # the mode token stands at the origin
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


def _same(group_BT: torch.Tensor) -> torch.Tensor:
    """(B, T, T): whether two tokens are of one group; group 0 is none."""
    return (group_BT[:, :, None] == group_BT[:, None, :]) & (group_BT[:, :, None] > 0)
