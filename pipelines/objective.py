"""How the unified model's picture side is trained, for `mm.customize`.

Design choices
- Noise levels are those of the drawing stage: logit-normal, and a share near pure noise, where the layout is decided.
- The vocabulary is closed, so a new subject gets a word of its own: one of the rows that were kept free.
- An edit's source enters as in `ImageEditPipeline`: as understanding tokens and as clean latents.
- Layers of the text side that also read (self-attention, feed-forward) take no adapter, so that reading stays as it is.

Legend: B pictures, C channels, H x W latents, S side of the pictures.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mm.customization.objectives.processes import FlowObjective
from mm.customization.objectives.protocol import Edits
from mm.models.cache import PromptCache
from mm.models.text import nearest_words, unknown_words
from mm.pipelines.prompt_encoding import added_names
from mm.world import lexicon
from mm.world.edits import KINDS, sample_edit
from mm.world.vocabulary import OBJECTS


class TrunkObjective(FlowObjective):
    """Flow matching through trunk and velocity decoder."""

    parts = ("trunk", "velocity_decoder")
    skipped = (r"text_layers\.\d+\.(?:attn|ff)\..*",)
    open_vocabulary = False
    training: ClassVar[Mapping[str, Any]] = {
        "steps": 1000, "batch_size": 2, "preserve_batch": 1, "learning_rate": 2e-3, "preview_every": 200, "patience": 3,
        "companions": 20, "preserve": 4.0,
    }  # fmt: skip
    mean, spread = 0.3, 1.0
    high_share, high_from = 0.15, 0.85

    def levels(self, count: int, generator: torch.Generator) -> Tensor:
        usual = super().levels(count, generator)
        high = 1 - (1 - self.high_from) * torch.rand(count, generator=generator)
        return torch.where(torch.rand(count, generator=generator) < self.high_share, high, usual)

    def encode_pictures(self, pictures_B3SS: Tensor) -> Tensor:
        autoencoder = self.pipe.autoencoder
        return autoencoder.encode(pictures_B3SS.to(autoencoder.device, autoencoder.dtype)).float()

    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        autoencoder = self.pipe.autoencoder
        return autoencoder.decode(latents_BCHW.to(autoencoder.device, autoencoder.dtype)).float()

    def encode_prompts(self, prompts: Sequence[str]) -> PromptCache:
        # Without the padding that sampling adds: it is masked, and would cost a fifth of a step.
        # A long prompt is cut where drawing cuts it.
        given: dict[str, Any] = {"padding": True, "truncation": True, "return_tensors": "pt"}
        words = self.pipe.text_tokenizer(list(prompts), **given).to(self.device)
        return self.pipe.trunk.encode_text(words.input_ids, words.attention_mask.bool())

    def encode_repeated(self, prompt: str, count: int) -> PromptCache:
        return self.encode_prompts([prompt] * count)  # of a few tokens; caches are not put together

    @property
    def edits(self) -> Edits:  # type: ignore[override]
        """Whether the pipeline holds what reads source pictures."""
        return "also" if getattr(self.pipe, "understanding_encoder", None) is not None else "no"

    def encode_edits(self, instructions: Sequence[str], pictures_B3SS: Tensor, latents_BCHW: Tensor) -> PromptCache:
        encoder, connector = self.pipe.understanding_encoder, self.pipe.understanding_connector
        with torch.no_grad():
            tokens = connector(encoder(pictures_B3SS.to(encoder.dtype))[1].to(connector.dtype))
        return self.pipe._prompt_cache(instructions, tokens, latents_BCHW)

    def known_nouns(self) -> Sequence[str]:
        return OBJECTS

    def unknown(self, text: str, name: str) -> list[str]:
        tokenizer = self.pipe.text_tokenizer
        lines = []
        for word in unknown_words(text.replace(name, " ") if name else text, set(tokenizer.get_vocab())):
            near = lexicon.read(word).text
            known = near.removeprefix("a ").removeprefix("an ") if near != word else ", ".join(nearest_words(word))
            lines.append(
                f"the model does not know the word {word!r}" + (f", and knows {known}" if known else "")
                + "; `mm words` lists what it knows"
            )  # fmt: skip
        return lines

    def undrawn(self, prompt: str, name: str, *, edit: bool) -> list[str]:
        return lexicon.read(prompt, "edit" if edit else "draw", {*added_names(self.pipe.text_tokenizer), name}).problems

    def kept_instructions(self, count: int) -> list[str]:
        rng = random.Random("instructions that stay")
        return list(dict.fromkeys(sample_edit(rng, KINDS[k % len(KINDS)]).instruction for k in range(count)))

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        cache = self.encode_prompts(prompts)
        mask = cache.mask_BT[..., None].float()
        keys = torch.cat([layer.flatten(2).float() for layer in cache.keys], -1)
        return (keys * mask).sum(1) / mask.sum(1)

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Any) -> Tensor:
        trunk, decoder = self.pipe.trunk, self.pipe.velocity_decoder
        features = trunk(noisy_BCHW.to(trunk.dtype), level_B, condition, "flow")
        return decoder(noisy_BCHW.to(decoder.dtype), level_B, features).float()
