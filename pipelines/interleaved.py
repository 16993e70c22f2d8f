"""`InterleavedPipeline`: a conversation of words and pictures, in and out.

Design choices
- The words of a turn decide what it wants (`mm.world.asking.intents`): a new picture, a change of the last picture, an
  answer about it, or a short reply without any picture.
- The model reads only what matters for the turn. A new picture is drawn from its own words, as `TextToImagePipeline`
  does; a change is made from the last picture and the instruction, as `ImageEditPipeline` does; an answer comes from
  the last picture and the question. The trunk was trained on conversations of two pictures, and in longer ones it
  mistook "draw ..." for a change of the last picture. So a conversation may now be of any length.
- "it" is resolved before the model reads the words, from what the last picture shows and what was mentioned last.
- A drawn picture is read from its latents, without decoding; pictures from the user pass through the understanding
  encoder.
- A turn is a generator of events, so that words, steps and pictures can be shown at once and a turn can be stopped.
- All state of a conversation is in `Conversation`, all state of a drawing in its `Run`, so that several conversations
  on one pipeline may be interleaved.

Legend: C = 16 channels, H = W = 8 latents, S understanding tokens, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - diffusers expects the name in our modules
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image
from transformers import PreTrainedTokenizerFast

from mm.core.checks import MAX_SEED
from mm.core.errors import UserError
from mm.core.paths import resolve_model
from mm.models.codes import CodeHead
from mm.models.connectors import Connector
from mm.models.dialogue import detokenize
from mm.models.trunk import Trunk
from mm.models.understanding_encoder import LatentStem, UnderstandingEncoder
from mm.models.velocity import VelocityDecoder
from mm.pipelines.best_of import check_best_of
from mm.pipelines.conversation import MAX_SHOWN, Conversation, Event, Shown, said
from mm.pipelines.domain import warn_of
from mm.pipelines.guidance import GuidanceBranches, text_branches
from mm.pipelines.image_edit import ImageEditPipeline
from mm.pipelines.pictures import open_picture, to_tensor
from mm.pipelines.prompt_encoding import added_names, check_prompts, refusal_of
from mm.pipelines.questions import read_question
from mm.pipelines.turn_drawing import TurnDrawing, drawn_for_turn
from mm.tokenizers import Autoencoder, Bridge
from mm.world import lexicon
from mm.world.asked import Asked, asked_of, asked_of_change
from mm.world.asking import small_talk
from mm.world.asking.counting import facts_of
from mm.world.asking.edit_words import Refused, change_of, steps_of
from mm.world.asking.intents import Intent, intent_of
from mm.world.asking.phrases import clause_of
from mm.world.asking.plans import is_absent, plan, run
from mm.world.asking.query import CATEGORIES, Query, Thing
from mm.world.asking.replies import no_thing
from mm.world.facts import Facts

T = TypeVar("T")

NOTHING_TO_UNDO = "There is nothing to undo."
NOTHING_DRAWN = f"Nothing was drawn yet. {small_talk.SAY_WHAT}"


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
        return Conversation()

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
        strict: bool | None = None,
        best_of: int = 1,
    ) -> Generator[Event, None, None]:
        """Adds a turn of the user and generates the reply.

        A turn that is stopped in between (the generator is closed) or fails leaves the conversation as it was before.

        Args:
            conversation: Changed in place, at the end of the turn.
            words: What the user says.
            picture: A path or a PIL picture that the user gives.
            seed: Picture k of the conversation has seed + k; 0 follows 4294967295.
            steps: Sampling steps of a picture.
            guidance_scale: Of classifier-free guidance.
            max_words: The longest answer of the model in words.
            strict: Of a new picture: True refuses words that are not understood, None a prompt of which no thing is
                known, in a reply; False draws all. A change that is not understood as a whole is never made.
            best_of: The most times that a picture is drawn, until the model itself reads in it what was asked for
                (`mm.pipelines.best_of`).

        Yields:
            Events in the order in which they happen.

        Raises:
            UserError: The words are empty, or the picture cannot be read.

        Warns:
            UserWarning: For words that are not understood, and where the oldest picture of a long conversation is
                forgotten.
        """
        if not isinstance(words, str):
            raise UserError(f"a turn is a text, got {type(words).__name__} {words!r}")
        if not words.strip():
            raise UserError("the turn is empty (the prompt is empty); say what to draw, change or describe")
        now = conversation.copy()
        scale = self.default_guidance[0] if guidance_scale is None else guidance_scale
        check_best_of(best_of, None)
        how = TurnDrawing(seed=seed, steps=steps, scale=scale, max_words=max_words, strict=strict, best_of=best_of)
        if picture is not None:
            _warn_if_full(now.add(self._given(picture)))
        intent = intent_of(words, now.last is not None, added_names(self.text_tokenizer))
        yield from self._reply(now, intent, how)
        now.turns += 1
        conversation.become(now)
        yield Event(kind="end")

    def chat(
        self, turns: Sequence[str], *, seed: int = 0, steps: int = 12, best_of: int = 1
    ) -> list[tuple[str, Image.Image | None]]:
        """Runs a whole conversation; returns text and picture of each reply."""
        conversation, out = self.start(), []
        for words in turns:
            text: list[str] = []
            drawn: Image.Image | None = None
            for event in self.turn(conversation, words, seed=seed, steps=steps, best_of=best_of):
                if event.kind == "word":
                    text.append(event.word)
                drawn = event.picture or drawn
            out.append((detokenize(text), drawn))
        return out

    def _reply(self, now: Conversation, intent: Intent, how: TurnDrawing) -> Iterator[Event]:
        """The events of a turn; changes `now`."""
        if intent.kind == "draw":
            yield from self._draw_new(now, intent.words, how)
        elif intent.kind == "edit":
            yield from self._edit_last(now, intent.words, how)
        elif intent.kind == "ask":
            yield from said(self._answer_about(now, intent.words, how.max_words))
        elif intent.kind == "again":
            yield from self._draw_new(now, now.drawn, how) if now.drawn is not None else said(NOTHING_DRAWN)
        elif intent.kind == "undo":
            yield from self._undo(now)
        else:
            yield from said(intent.reply)

    def _draw_new(self, now: Conversation, words: str, how: TurnDrawing) -> Iterator[Event]:
        """Draws a new picture, as `TextToImagePipeline` does; "..., then add a dog" changes it after that."""
        first, *changes = steps_of(words, drawn=True)
        read = lexicon.read(first, names=added_names(self.text_tokenizer))
        if (how.strict and read.problems) or (how.strict is None and read.nothing):
            yield from said(refusal_of(read))
            return
        (prompt,) = check_prompts([first], self.text_tokenizer, strict=False)
        branches = text_branches(self._encode([prompt]), self._encode([""]), how.scale)
        yield from self._drawn(now, branches, how, prompt, self._asked([prompt], asked_of)[0])
        named = clause_of(first.lower(), added_names(self.text_tokenizer)).things
        now.drawn, now.topic = first, named[0].name if named else None
        for change in changes:
            yield from self._edit_last(now, change, how)

    def _edit_last(self, now: Conversation, words: str, how: TurnDrawing) -> Iterator[Event]:
        """Changes the last picture step by step, or says why that is not possible; then none of the steps is made."""
        names = added_names(self.text_tokenizer)
        found = lexicon.read(words, "edit", names)
        if not found.problems:  # else the refusal below names what is not known
            words = found.text
            for line in found.notices:
                warnings.warn(line, stacklevel=4)
        steps = steps_of(words)
        self._described(now, how.max_words)
        changes = [change_of(step, now.seen, names) for step in steps]
        refused = next((change for change in changes if isinstance(change, Refused)), None)
        if refused is not None:
            yield from said(refused.reply)
            return
        for step in steps:
            facts = self._described(now, how.max_words)
            change = change_of(step, now.seen, names)
            if isinstance(change, Refused):  # after an earlier step, which changed what "it" can be
                yield from said(change.reply)
                return
            target = None if change.target is None else Thing(name=change.target)
            source = now.shown[-1]
            if target is not None and not facts.named(target.name):
                if self._run(source, is_absent(target), how.max_words):
                    yield from said(f"T{no_thing(target)[1:]}, so nothing was changed.")
                    return
            (instruction,) = check_prompts([change.words], self.text_tokenizer, "edit")
            branches = self._change_branches(instruction, source, how.scale)
            asked = self._asked([instruction], asked_of_change)[0]
            yield from self._drawn(now, branches, how, instruction, asked)
            now.topic = change.topic

    def _undo(self, now: Conversation) -> Iterator[Event]:
        """Goes back to the picture before the last one, and shows it."""
        if len(now.shown) < 2:
            yield from said(NOTHING_TO_UNDO)
            return
        now.shown.pop()
        before = now.shown[-1]
        yield Event(kind="picture", picture=self._decode(before.latents, "pil")[0], seed=before.seed)

    def _drawn(
        self, now: Conversation, branches: GuidanceBranches, how: TurnDrawing, words: str, asked: Asked | None
    ) -> Iterator[Event]:
        """Draws a picture, again while it lacks what was asked for, and adds it to the conversation."""
        seed = how.seed + now.pictures
        seed -= (MAX_SEED + 1) * (how.seed <= MAX_SEED < seed)  # a PNG's settings hold no larger one
        latents = yield from drawn_for_turn(self, branches, seed, how, words, asked)
        now.pictures += 1
        _warn_if_full(now.add(Shown(latents=latents, tokens=self._latent_tokens(latents), seed=seed)))
        yield Event(kind="picture", picture=self._decode(latents, "pil")[0], seed=seed)

    def _given(self, picture: Any) -> Shown:
        """A picture of the user."""
        opened = open_picture(picture)
        pixels = to_tensor([opened], self.autoencoder.config.sample_size).to(self._execution_device)
        latents = self.autoencoder.encode(pixels.to(self.autoencoder.dtype)).float()
        tokens = self.understanding_encoder(pixels.to(self.understanding_encoder.dtype))[1]
        warn_of(self.understanding_connector, tokens, [opened], pixels.shape[-1], stacklevel=4)
        return Shown(
            latents=latents, tokens=self.understanding_connector(tokens.to(self.understanding_connector.dtype))
        )

    def _latent_tokens(self, latents: torch.Tensor) -> torch.Tensor:
        """Understanding tokens of a drawn picture, from its latents (1, C, H, W)."""
        encoder = self.understanding_encoder
        patches = self.latent_stem(latents.to(self.latent_stem.dtype))
        tokens = encoder.encode_patches(patches.to(encoder.dtype))[1]
        return self.understanding_connector(tokens.to(self.understanding_connector.dtype))

    def _change_branches(self, instruction: str, source: Shown, scale: float) -> GuidanceBranches:
        """The branches of the instruction with its source, of the source alone, and of an empty prompt."""
        image_scale = self.default_guidance[1]
        full = self._prompt_cache([instruction], source.tokens, source.latents)
        alone = self._prompt_cache([""], source.tokens, source.latents)
        empty = self._prompt_cache([""], None, None)
        others = [(alone, lambda now: image_scale - now), (empty, lambda _: 1 - image_scale)]
        return GuidanceBranches(full, others, scale=scale, complete=True)

    def _answer_about(self, now: Conversation, question: str, max_words: int) -> str:
        """The answer to a question about the last picture."""
        query = read_question(question, self.text_tokenizer)
        answer = self._run(now.shown[-1], plan(query, now.topic), max_words)
        if isinstance(query, Query) and query.things and query.things[0].name not in CATEGORIES:
            now.topic = query.things[0].name
        return answer

    def _described(self, now: Conversation, max_words: int) -> Facts:
        """What the last picture shows; asked once a picture."""
        last = now.shown[-1]
        facts = self._run(last, facts_of(), max_words) if last.facts is None else last.facts
        now.shown[-1] = replace(last, facts=facts)
        return facts

    def _run(self, shown: Shown, asked: Generator[list[str], list[str], T], max_words: int) -> T:
        """The result of a plan about one picture."""
        (out,) = run([asked], lambda _, questions: self._ask(shown, questions, max_words))
        return out

    def _ask(self, shown: Shown, questions: Sequence[str], max_words: int) -> list[str]:
        """The model's own answers to questions about one picture."""
        return self._ask_about(shown.tokens, questions, max_words)


def _warn_if_full(full: bool) -> None:
    if full:
        warnings.warn(
            f"the conversation keeps {MAX_SHOWN} pictures; the oldest is forgotten and undo cannot go back to it",
            stacklevel=4,
        )
