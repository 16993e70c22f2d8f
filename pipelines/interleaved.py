"""`InterleavedPipeline`: a conversation of words and pictures, in and out.

Design choices
- The text head decides: after the user's turn it says words, or `<image>`, and then a picture is drawn.
- The conversation is one growing text (`mm.models.dialogue`), read once: a turn costs only itself (`TextState`). What
  was drawn goes back as looks of its latents, without decoding; pictures that the user gives go through the encoder.
- The last picture of the conversation is the source of the next drawing, whether that edits it or draws something new:
  the model was trained to tell the two apart by the words.
- Everything comes as events, so that words, steps and pictures can be shown as they come, and be stopped in between.
- A conversation is bounded by the trunk's `max_text`; a turn that would not fit raises before anything is said, and the
  caller starts a new conversation.

This module does not know terminals or files.
Legend: C = 16 channels, H = W = 8 latents.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - diffusers looks for the name in our modules
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image
from transformers import PreTrainedTokenizerFast

from mm.core.errors import UserError
from mm.core.paths import resolve_model
from mm.models.cache import PromptCache, TextState
from mm.models.codes import CodeHead
from mm.models.connectors import Connector
from mm.models.dialogue import Dialogue, spoken
from mm.models.trunk import Trunk
from mm.models.understanding import LatentStem, UnderstandingEncoder
from mm.models.velocity import VelocityDecoder
from mm.pipelines.image_edit import ImageEditPipeline
from mm.pipelines.pictures import to_tensor
from mm.pipelines.prompts import check_prompts
from mm.pipelines.sampling import picture_generators
from mm.pipelines.text_to_image import Reading
from mm.tokenizers import Autoencoder, Bridge


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happens: a word, a step of a drawing, the picture, or the end of the turn."""

    kind: Literal["word", "step", "picture", "end"]
    word: str = ""
    step: int = 0
    steps: int = 0
    picture: Image.Image | None = None


@dataclass(kw_only=True)
class Conversation:
    """What has been said so far: tokens, what the trunk has read of them, and the last picture's latents."""

    dialogue: Dialogue
    state: TextState | None = None
    read: int = 0
    latents: torch.Tensor | None = None
    pictures: int = 0
    words: list[str] = field(default_factory=list)


class InterleavedPipeline(ImageEditPipeline):
    """Converses. See `turn`; `chat` runs whole scripts."""

    def __init__(
        self,
        text_tokenizer: PreTrainedTokenizerFast,
        trunk: Trunk,
        velocity_decoder: VelocityDecoder,
        autoencoder: Autoencoder,
        scheduler: SchedulerMixin,
        understanding_encoder: UnderstandingEncoder,
        look_connector: Connector,
        latent_stem: LatentStem,
        code_head: CodeHead | None = None,
        bridge: Bridge | None = None,
    ) -> None:
        super().__init__(
            text_tokenizer, trunk, velocity_decoder, autoencoder, scheduler, understanding_encoder, look_connector,
            code_head, bridge,
        )  # fmt: skip
        self.register_modules(latent_stem=latent_stem)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> InterleavedPipeline:
        """An embedded model by name, a diffusers folder, or a hub name."""
        where = resolve_model(pretrained_model_name_or_path)
        if isinstance(where, Path) and not (where / "latent_stem" / "config.json").is_file():
            raise UserError(f"{where} holds no latent_stem: this model draws, but cannot converse")
        pipe = super().from_pretrained(where, **kwargs)
        assert isinstance(pipe, cls)
        return pipe

    def start(self) -> Conversation:
        """A new, empty conversation."""
        return Conversation(dialogue=Dialogue(self.text_tokenizer, self.look_connector.looks))

    @torch.no_grad()
    def turn(
        self,
        conversation: Conversation,
        words: str,
        picture: Any = None,
        *,
        seed: int = 0,
        steps: int = 12,
        guidance_scale: float | None = None,
        max_words: int = 48,
    ) -> Generator[Event, None, None]:
        """The model's reply to `words` (and a picture), event by event. Stopping in between leaves the turn unsaid.

        Picture k of the conversation has seed + k. Raises UserError when the conversation has no room left.
        """
        check_prompts([words], self.text_tokenizer)
        said, pictured = len(conversation.dialogue), len(conversation.dialogue.pictures)
        before = (conversation.state, conversation.read, conversation.latents, conversation.pictures)
        done = False
        try:
            self._hear(conversation, words, picture, max_words)
            yield from self._reply(conversation, seed, steps, guidance_scale, max_words)
            done = True
        finally:
            if not done:  # stopped or failed: as if the turn had never begun
                conversation.dialogue.rewind(said, pictured)
                conversation.state, conversation.read, conversation.latents, conversation.pictures = before

    def chat(self, turns: Sequence[str], *, seed: int = 0, steps: int = 12) -> list[tuple[str, Image.Image | None]]:
        """A whole conversation: what is said, or drawn, after each turn."""
        conversation, out = self.start(), []
        for words in turns:
            text: list[str] = []
            drawn: Image.Image | None = None
            for event in self.turn(conversation, words, seed=seed, steps=steps):
                if event.kind == "word":
                    text.append(event.word)
                drawn = event.picture or drawn
            out.append((spoken(text), drawn))
        return out

    def _hear(self, conversation: Conversation, words: str, picture: Any, max_words: int) -> None:
        """The user's turn, read up to where the reply begins."""
        pictures = () if picture is None else (picture,)
        conversation.dialogue.user(words, *pictures)
        room = self.trunk.config.max_text - len(conversation.dialogue)
        if room < max_words + conversation.dialogue.looks + 2:  # the longest reply: words, then a picture
            raise UserError(
                f"the conversation is {len(conversation.dialogue)} tokens long and this model reads "
                f"{self.trunk.config.max_text}; start a new one (mm chat: /new)"
            )
        looks = None
        if picture is not None:
            seen = to_tensor([picture], self.autoencoder.config.sample_size).to(self._execution_device)
            conversation.latents = self.autoencoder.encode(seen.to(self.autoencoder.dtype)).float()
            tokens = self.understanding_encoder(seen.to(self.understanding_encoder.dtype))[1]
            looks = self.look_connector(tokens.to(self.look_connector.dtype))
        self._logits = self._advance(conversation, looks)

    def _advance(self, conversation: Conversation, looks: torch.Tensor | None = None) -> torch.Tensor:
        """Reads what has been added since; logits (V,) of the next token."""
        new = conversation.dialogue.ids[conversation.read :]
        ids = torch.tensor([new], device=self._execution_device)
        logits, conversation.state = self.trunk.read(ids, None, looks, conversation.state)
        conversation.read = len(conversation.dialogue.ids)
        return logits[0, -1, : len(self.text_tokenizer)].float()

    def _reply(
        self, conversation: Conversation, seed: int, steps: int, scale: float | None, max_words: int
    ) -> Iterator[Event]:
        dialogue = conversation.dialogue
        end, image, codes = (dialogue.token(t) for t in ("<end>", "<image>", "<codes>"))
        for _ in range(max_words):
            best = int(self._logits.argmax())
            if best in (image, codes):
                yield from self._draw(conversation, seed + conversation.pictures, steps, scale)
                break
            dialogue.add([best], learned=True)
            self._logits = self._advance(conversation)
            if best == end:
                break
            yield Event(kind="word", word=str(self.text_tokenizer.convert_ids_to_tokens(best)))
        else:
            dialogue.add([end], learned=True)
            self._advance(conversation)
        yield Event(kind="end")

    def _draw(self, conversation: Conversation, seed: int, steps: int, scale: float | None) -> Iterator[Event]:
        """Draws what the conversation asks for; its looks go back into it."""
        self._guidance_scale = self.default_guidance[0] if scale is None else scale
        self._interrupt = False
        conversation.dialogue.starts_drawing()
        self._advance(conversation)
        assert conversation.state is not None
        source = conversation.latents
        reading = self._conversation_reading(conversation.state.prompt, source)
        generators = picture_generators(torch.Generator().manual_seed(seed), 1)
        noise = self.prepare_latents(generators, None)
        bar = dict(getattr(self, "_progress_bar_config", {}))
        self.set_progress_bar_config(disable=True)
        drawing = self._denoising(noise, generators, reading, steps, lambda _step, _timestep, latents: latents)
        try:
            latents = yield from _as_events(drawing, steps)
        finally:
            self.set_progress_bar_config(**bar)
        picture = self._decode(latents, "pil")[0]
        conversation.latents, conversation.pictures = latents, conversation.pictures + 1
        conversation.dialogue.has_drawn(None)
        self._logits = self._advance(conversation, self._looks_of(latents))
        yield Event(kind="picture", picture=picture)

    def _looks_of(self, latents: torch.Tensor) -> torch.Tensor:
        """What a drawn picture looks like, straight from its latents (1, C, 8, 8)."""
        encoder = self.understanding_encoder
        patches = self.latent_stem(latents.to(self.latent_stem.dtype))
        tokens = encoder.encode_patches(patches.to(encoder.dtype))[1]
        return self.look_connector(tokens.to(self.look_connector.dtype))

    def _conversation_reading(self, words: PromptCache, source: torch.Tensor | None) -> Reading:
        """Guidance over the whole conversation; against the source alone where there is one, else against nothing."""
        scale, pictured = self._guidance_scale, self.default_guidance[1]
        nothing = self._cache([""], None, None)
        if source is None:
            return Reading([words, nothing], (scale, 1 - scale))
        looks = self._looks_of(source)
        full = self.trunk.encode_picture(source.to(self.trunk.dtype), words)
        alone = self._cache([""], looks, source)
        return Reading([full, alone, nothing], (scale, pictured - scale, 1 - pictured))


def _as_events(drawing: Generator[int, None, torch.Tensor], steps: int) -> Generator[Event, None, torch.Tensor]:
    """A drawing's steps as events; returns what it returns."""
    while True:
        try:
            done = next(drawing)
        except StopIteration as end:
            return end.value
        yield Event(kind="step", step=done, steps=steps)
