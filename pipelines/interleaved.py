"""`InterleavedPipeline`: a conversation of words and pictures, in and out.

Design choices
- The text head decides: after the user's turn it generates words, or `<image>`, and then a picture is drawn.
- The conversation is one growing text (`mm.models.dialogue`), encoded once: a turn costs only its own tokens
  (`TextState`). A drawn picture is added as understanding tokens of its latents, without decoding; pictures from the
  user pass through the understanding encoder.
- The last picture of the conversation is the source of the next drawing, whether that edits it or draws something new:
  the model was trained to distinguish the two by the words.
- A turn is a generator of events, so that words, steps and pictures can be shown at once and a turn can be stopped.
- All state of a conversation is in `Conversation`, all state of a drawing in its `Run`, so that several conversations
  on one pipeline may be interleaved.
- A conversation is bounded by the trunk's `max_text`; a turn that would not fit raises before anything is generated,
  and the caller starts a new conversation.

Legend: C = 16 channels, H = W = 8 latents, V words.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - diffusers expects the name in our modules
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image
from transformers import PreTrainedTokenizerFast

from mm.core.errors import UserError
from mm.core.paths import resolve_model
from mm.models.cache import PromptCache, TextState
from mm.models.codes import CodeHead
from mm.models.connectors import Connector
from mm.models.dialogue import Dialogue, detokenize
from mm.models.trunk import Trunk
from mm.models.understanding_encoder import LatentStem, UnderstandingEncoder
from mm.models.velocity import VelocityDecoder
from mm.pipelines.drawing_loops import flow_steps
from mm.pipelines.guidance import GuidanceBranches
from mm.pipelines.image_edit import ImageEditPipeline
from mm.pipelines.pictures import to_tensor
from mm.pipelines.prompt_encoding import check_prompts
from mm.pipelines.sampling import picture_generators
from mm.tokenizers import Autoencoder, Bridge


@dataclass(frozen=True, kw_only=True)
class Event:
    """A word, a step of a drawing, the picture, or the end of the turn."""

    kind: Literal["word", "step", "picture", "end"]
    word: str = ""
    step: int = 0
    steps: int = 0
    picture: Image.Image | None = None


@dataclass(kw_only=True)
class Conversation:
    """The state of a conversation.

    Attributes:
        dialogue: All tokens so far.
        state: The trunk's state after the tokens that it has encoded.
        read: How many tokens it has encoded.
        latents: Latents (1, C, H, W) of the last picture.
        pictures: How many pictures were drawn.
    """

    dialogue: Dialogue
    state: TextState | None = None
    read: int = 0
    latents: torch.Tensor | None = None
    pictures: int = 0


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
        understanding_connector: Connector,
        latent_stem: LatentStem,
        code_head: CodeHead | None = None,
        bridge: Bridge | None = None,
    ) -> None:
        super().__init__(
            text_tokenizer, trunk, velocity_decoder, autoencoder, scheduler, understanding_encoder,
            understanding_connector, code_head, bridge,
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
        return Conversation(dialogue=Dialogue(self.text_tokenizer, self.understanding_connector.tokens_per_picture))

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
        """Adds a turn of the user and generates the reply.

        A turn that is stopped in between (the generator is closed) or fails leaves the conversation as it was before.

        Args:
            conversation: Changed in place.
            words: What the user says.
            picture: A path or a PIL picture that the user gives.
            seed: Picture k of the conversation has seed + k.
            steps: Sampling steps of a picture.
            guidance_scale: Of classifier-free guidance.
            max_words: The longest reply in words.

        Yields:
            Events in the order in which they happen.

        Raises:
            UserError: The words are empty, or the conversation is too long for another turn.
        """
        check_prompts([words], self.text_tokenizer)
        tokens, pictures = len(conversation.dialogue), len(conversation.dialogue.pictures)
        before = (conversation.state, conversation.read, conversation.latents, conversation.pictures)
        done = False
        try:
            logits = self._read_user_turn(conversation, words, picture, max_words)
            yield from self._reply(conversation, logits, seed, steps, guidance_scale, max_words)
            done = True
        finally:
            if not done:
                conversation.dialogue.rewind(tokens, pictures)
                conversation.state, conversation.read, conversation.latents, conversation.pictures = before

    def chat(self, turns: Sequence[str], *, seed: int = 0, steps: int = 12) -> list[tuple[str, Image.Image | None]]:
        """Runs a whole conversation; returns text and picture of each reply."""
        conversation, out = self.start(), []
        for words in turns:
            text: list[str] = []
            drawn: Image.Image | None = None
            for event in self.turn(conversation, words, seed=seed, steps=steps):
                if event.kind == "word":
                    text.append(event.word)
                drawn = event.picture or drawn
            out.append((detokenize(text), drawn))
        return out

    def _read_user_turn(self, conversation: Conversation, words: str, picture: Any, max_words: int) -> torch.Tensor:
        """Adds and encodes the user's turn; logits (V,) of the reply's first token."""
        dialogue = conversation.dialogue
        dialogue.user(words, *(() if picture is None else (picture,)))
        free = self.trunk.config.max_text - len(dialogue)
        if free < max_words + dialogue.tokens_per_picture + 2:  # the longest reply: words, then a picture
            raise UserError(
                f"the conversation is {len(dialogue)} tokens long and this model reads "
                f"{self.trunk.config.max_text}; start a new one (mm chat: /new)"
            )
        understanding = None
        if picture is not None:
            pixels = to_tensor([picture], self.autoencoder.config.sample_size).to(self._execution_device)
            conversation.latents = self.autoencoder.encode(pixels.to(self.autoencoder.dtype)).float()
            tokens = self.understanding_encoder(pixels.to(self.understanding_encoder.dtype))[1]
            understanding = self.understanding_connector(tokens.to(self.understanding_connector.dtype))
        return self._advance(conversation, understanding)

    def _advance(self, conversation: Conversation, understanding: torch.Tensor | None = None) -> torch.Tensor:
        """Encodes the tokens added since the last call; logits (V,) of the next token."""
        new = conversation.dialogue.ids[conversation.read :]
        ids = torch.tensor([new], device=self._execution_device)
        logits, conversation.state = self.trunk.read(ids, None, understanding, conversation.state)
        conversation.read = len(conversation.dialogue.ids)
        return logits[0, -1, : len(self.text_tokenizer)].float()

    def _reply(
        self,
        conversation: Conversation,
        logits: torch.Tensor,
        seed: int,
        steps: int,
        scale: float | None,
        max_words: int,
    ) -> Iterator[Event]:
        """Generates words greedily up to `<end>`, or until a picture is drawn."""
        dialogue = conversation.dialogue
        end, image, codes = (dialogue.token(t) for t in ("<end>", "<image>", "<codes>"))
        for _ in range(max_words):
            best = int(logits.argmax())
            if best in (image, codes):
                yield from self._draw(conversation, seed + conversation.pictures, steps, scale)
                break
            dialogue.add([best], learned=True)
            logits = self._advance(conversation)
            if best == end:
                break
            yield Event(kind="word", word=str(self.text_tokenizer.convert_ids_to_tokens(best)))
        else:
            dialogue.add([end], learned=True)
            self._advance(conversation)
        yield Event(kind="end")

    def _draw(self, conversation: Conversation, seed: int, steps: int, scale: float | None) -> Iterator[Event]:
        """Draws a picture and adds its understanding tokens to the conversation."""
        scale = self.default_guidance[0] if scale is None else scale
        conversation.dialogue.starts_drawing()
        self._advance(conversation)
        assert conversation.state is not None
        branches = self._conversation_branches(conversation.state.prompt, conversation.latents, scale)
        generators = picture_generators(torch.Generator().manual_seed(seed), 1)
        noise = self.prepare_latents(generators, None)
        with self._new_run(guidance_scale=scale) as run:
            parts = (self.trunk, self.velocity_decoder, noise)
            drawing = flow_steps(*parts, generators, branches, steps, run, run.step_callback(self, None, ()))
            latents = yield from _as_events(drawing, steps)
        picture = self._decode(latents, "pil")[0]
        conversation.latents, conversation.pictures = latents, conversation.pictures + 1
        conversation.dialogue.has_drawn(None)
        self._advance(conversation, self._latent_tokens(latents))
        yield Event(kind="picture", picture=picture)

    def _latent_tokens(self, latents: torch.Tensor) -> torch.Tensor:
        """Understanding tokens of a drawn picture, from its latents (1, C, H, W)."""
        encoder = self.understanding_encoder
        patches = self.latent_stem(latents.to(self.latent_stem.dtype))
        tokens = encoder.encode_patches(patches.to(encoder.dtype))[1]
        return self.understanding_connector(tokens.to(self.understanding_connector.dtype))

    def _conversation_branches(self, words: PromptCache, source: torch.Tensor | None, scale: float) -> GuidanceBranches:
        """The branches of the conversation, of its source picture alone where there is one, and of an empty prompt."""
        image_scale = self.default_guidance[1]
        empty = self._prompt_cache([""], None, None)
        if source is None:
            return GuidanceBranches(words, [(empty, lambda now: 1 - now)], scale=scale, complete=True)
        full = self.trunk.encode_picture(source.to(self.trunk.dtype), words)
        alone = self._prompt_cache([""], self._latent_tokens(source), source)
        others = [(alone, lambda now: image_scale - now), (empty, lambda _: 1 - image_scale)]
        return GuidanceBranches(full, others, scale=scale, complete=True)


def _as_events(drawing: Generator[int, None, torch.Tensor], steps: int) -> Generator[Event, None, torch.Tensor]:
    """A drawing's steps as events; returns what it returns."""
    while True:
        try:
            done = next(drawing)
        except StopIteration as end:
            return end.value
        yield Event(kind="step", step=done, steps=steps)
