"""The joint stage: the model that draws learns to read, edit and converse, and goes on drawing.

Design choices
- One step, one task, picked by its share: drawing (flow or codes), reading (words), editing (flow or codes). Nothing
  that drawing learned is frozen; drawing keeps most of the steps, so that it does not fade.
- Looks come from the understanding encoder (frozen: it has its own stage), which sees pictures in half of the batches
  and latents through its stem in the other half, with a little noise, as drawn latents have.
- Editing sees the source twice: as looks among the words, and as clean latents at sigma 0. The instruction is dropped
  now and then, and the source too, so that text and picture can be guided apart (as in InstructPix2Pix, arXiv
  2211.09800). What the edit changes counts more than what it keeps, which would otherwise be most of the loss.
- In all three tasks the user's nouns, and how they stand to each other, are grounded in the scene they speak of
  (`mm.training.grounding`), and so are what a description names next and what the looks hold.
- The connector's counter is frozen too (it has its own stage). In a share of the reading, words and the numbers that
  looks are told are other than the picture shows (`talk.recounted`), and words that exclude each other are smoothed
  among themselves (`talk.word_kinds`): both against knowing by heart what was never seen together.
- A noun that a description has said is now and then read as another one, so that what comes next is read off the
  picture and not guessed from what was said: the pairs that are held out are never said together in training.

This module does not know the loop, files or the judge.
Legend: B rows, N pictures looked at, C = 16 channels, T tokens, V words.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mm.models.cache import PromptCache
from mm.models.codes import CodeHead
from mm.models.connectors import Alike, Connector, merged
from mm.models.dialogue import IGNORED, Dialogue, WordKinds, stack, word_loss
from mm.models.text import build_text_tokenizer
from mm.models.trunk import Trunk
from mm.models.understanding import LatentStem, UnderstandingEncoder
from mm.models.velocity import VelocityDecoder
from mm.tokenizers import Bridge
from mm.training import talk
from mm.training.drawing import Drawing, DrawingBatch, DrawingConfig, make_batch
from mm.training.grounding import (
    Grounding,
    LookGrounding,
    Looks,
    Nouns,
    Relations,
    coming_nouns,
    find_looks,
    find_nouns,
    tapped,
)
from mm.world.edits import Edit
from mm.world.render import render
from mm.world.scene import Scene


@dataclass(frozen=True, kw_only=True)
class JointConfig(DrawingConfig):
    """What the joint stage learns."""

    read_share: float = 0.25
    edit_share: float = 0.2
    outside_share: float = 0.5  # of the reading: fresh pictures through the understanding encoder
    chat_prompts: float = 0.3
    words_weight: float = 0.5
    changed_weight: float = 3.0
    drop_words: float = 0.08
    drop_source: float = 0.05
    look_noise: float = 0.1
    nouns_layer: int = 3  # the text layer whose states are grounded
    nouns_weight: float = 0.15
    relations_layer: int = 5  # a later one: it compares what the nouns know by then
    relations_weight: float = 0.15
    looks_weight: float = 0.15  # of what looks hold, in the same layer as nouns
    told_share: float = 0.25  # of pictures read, whose looks and words are told another number than they show
    coming_weight: float = 0.15  # of what a description names next, in the same layer as relations
    smoothing: float = 0.1  # of numbers, colours and things among their kind
    slip_share: float = 0.1  # of a description's nouns, read as others

    def __post_init__(self) -> None:
        DrawingConfig.__post_init__(self)
        for name in (
            "read_share",
            "edit_share",
            "outside_share",
            "chat_prompts",
            "drop_words",
            "drop_source",
            "slip_share",
            "smoothing",
            "told_share",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} must lie in [0, 1]")
        if self.read_share + self.edit_share > 1:
            raise ValueError(f"read_share {self.read_share} + edit_share {self.edit_share} leave nothing to draw")


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What is looked at, in reading order: pictures (N, 3, H, W) in [-1, 1], or latents (N, C, 8, 8)."""

    pictures: torch.Tensor | None = None
    latents: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadBatch:
    """Rows of words and looks, and the words to be said."""

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    targets_BT: torch.Tensor
    seen: Seen
    nouns: Nouns
    coming: Nouns
    looks: Looks


@dataclass(frozen=True, kw_only=True, slots=True)
class EditBatch(DrawingBatch):
    """A drawing batch whose prompts hold looks, with source latents; `keeps` says which rows see their source."""

    seen: Seen
    source_BCHW: torch.Tensor
    keeps_B: torch.Tensor


def render_floats(scenes: Sequence[Scene]) -> torch.Tensor:
    """Scenes as pictures (N, 3, 128, 128) in [-1, 1]."""
    return render(scenes).float() / 127.5 - 1


def read_batch(
    dialogues: Sequence[Dialogue],
    look: Callable[[list[Scene]], Seen],
    nouns: dict[int, str],
    rng: random.Random,
    slip_share: float = 0.0,
    claims: Sequence[Scene | None] | None = None,
) -> ReadBatch:
    """A batch of conversations; `look` turns their scenes into what is looked at, `claims` are as in `find_looks`."""
    ids, mask, targets = stack(dialogues)
    seen = look([scene for d in dialogues for scene in d.pictures])
    rows, width = [d.ids for d in dialogues], ids.shape[1]
    named = find_nouns(rows, [d.about for d in dialogues], width, nouns)
    coming = coming_nouns(rows, [d.told for d in dialogues], width, nouns)
    looks = find_looks(dialogues, width, claims)
    _slip(ids, dialogues, nouns, rng, slip_share)
    return ReadBatch(ids_BT=ids, mask_BT=mask, targets_BT=targets, seen=seen, nouns=named, coming=coming, looks=looks)


def _slip(
    ids_BT: torch.Tensor, dialogues: Sequence[Dialogue], nouns: dict[int, str], rng: random.Random, share: float
) -> None:
    """Reads a share of the nouns that descriptions say as others, in place."""
    others = list(nouns)
    for row, dialogue in enumerate(dialogues):
        for place, (word, told) in enumerate(zip(dialogue.ids, dialogue.told, strict=True)):
            if told is not None and word in nouns and rng.random() < share:
                ids_BT[row, place] = rng.choice(others)


def edit_batch(
    edits: Sequence[Edit],
    source: torch.Tensor,
    target: torch.Tensor,
    new: talk.NewDialogue,
    nouns: dict[int, str],
    look: Callable[[list[Scene]], Seen],
    rng: random.Random,
    generator: torch.Generator,
    config: JointConfig,
) -> EditBatch:
    """A batch of edits with their latents (B, C, 8, 8)."""
    prompts = [_edit_prompt(new, edit, rng, config) for edit in edits]
    ids, mask, _ = stack(prompts)
    plain = make_batch(target, [e.target for e in edits], ids, mask, generator, config)
    changed_BHW = ((target - source).abs().mean(1) > 0.1).float()
    weights = 1 + config.changed_weight * changed_BHW
    fields: dict[str, Any] = {name: getattr(plain, name) for name in DrawingBatch.__slots__}
    fields["weights_BHW"] = weights / weights.mean()
    fields["nouns"] = find_nouns([d.ids for d in prompts], [d.about for d in prompts], ids.shape[1], nouns)
    return EditBatch(
        **fields,
        seen=look([scene for d in prompts for scene in d.pictures]),
        source_BCHW=source,
        keeps_B=torch.tensor([bool(d.pictures) for d in prompts]),
    )


def _edit_prompt(new: talk.NewDialogue, edit: Edit, rng: random.Random, config: JointConfig) -> Dialogue:
    """The conversation; or the picture without words, or neither, for guidance."""
    luck = rng.random()
    if luck < config.drop_source:
        return new().user("").starts_drawing()
    if luck < config.drop_source + config.drop_words:
        return new().user("", edit.source).starts_drawing()
    return talk.edit_prompt(new, edit, rng)


class Joint(Drawing):
    """Drawing's parts with an understanding encoder and connectors."""

    def __init__(
        self,
        trunk: Trunk,
        velocity_decoder: VelocityDecoder,
        code_head: CodeHead,
        bridge: Bridge,
        *,
        encoder: UnderstandingEncoder,
        latent_stem: LatentStem,
        look_connector: Connector,
        counter: Alike,
        config: JointConfig,
    ) -> None:
        super().__init__(trunk, velocity_decoder, code_head, bridge, config)
        self.settings = config
        self.look_connector = look_connector
        width = trunk.config.width
        self.grounding, self.relations = Grounding(width), Relations(width)
        self.coming, self.look_grounding = Grounding(width, names=True), LookGrounding(width)
        tokenizer = build_text_tokenizer()
        kinds = talk.word_kinds(lambda w: int(tokenizer.convert_tokens_to_ids(w)), trunk.config.vocabulary_size)  # pyright: ignore[reportArgumentType]
        self.register_buffer("kind_of_V", kinds.of_V, persistent=False)
        self.register_buffer("kind_spread_KV", kinds.spread_KV, persistent=False)
        self.kind_of_V: torch.Tensor
        self.kind_spread_KV: torch.Tensor
        # In a list, so that they are no part of this module: neither trained nor averaged nor saved with the state.
        self._seeing: list[Any] = [part.requires_grad_(False).eval() for part in (encoder, latent_stem, counter)]

    @property
    def counter(self) -> Alike:
        """The connector's counter, as its own stage left it."""
        return self._seeing[2]

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        """Named losses; names with a leading underscore are only watched."""
        reads = isinstance(batch, ReadBatch)
        layers, settings = self.trunk.text_layers, self.settings
        with tapped(layers[settings.nouns_layer]) as early, tapped(layers[settings.relations_layer]) as late:
            losses = self._words(batch) if reads else super().forward(batch)
        if batch.nouns is not None:
            prefix = "read_" if reads else ""
            losses[f"{prefix}nouns"] = settings.nouns_weight * self.grounding(early[0], batch.nouns)
            losses[f"{prefix}relations"] = settings.relations_weight * self.relations(late[0], batch.nouns)
        if reads:
            losses["looks"] = settings.looks_weight * self.look_grounding(early[0], batch.looks)
            losses["coming"] = settings.coming_weight * self.coming(late[0], batch.coming)
        return {f"edit_{k}": x for k, x in losses.items()} if isinstance(batch, EditBatch) else losses

    def prompt(self, batch: DrawingBatch) -> PromptCache:
        """What the batch's pictures read: for edits, looks among the words and the clean source."""
        if not isinstance(batch, EditBatch):
            return super().prompt(batch)
        cache = self.trunk.encode_text(batch.ids_BT, batch.mask_BT, self.looks(batch.seen))
        words = cache.mask_BT.shape[1]
        cache = self.trunk.encode_picture(batch.source_BCHW, cache)
        sees = torch.cat([cache.mask_BT[:, :words], cache.mask_BT[:, words:] & batch.keeps_B[:, None]], 1)
        return PromptCache(cache.keys, cache.values, sees)

    def looks(self, seen: Seen, told_PS: torch.Tensor | None = None) -> torch.Tensor:
        """Looks (N, S, D) of what is looked at; `told_PS` are numbers in the counter's place, -1 for its own."""
        seer = seen.pictures if seen.pictures is not None else seen.latents
        assert seer is not None
        encoder, stem, counter = (part.to(seer.device) for part in self._seeing)
        with torch.no_grad():
            tokens = encoder(seer)[1] if seen.pictures is not None else encoder.encode_patches(stem(seer))[1]
            numbers_PS = counter(merged(tokens, self.look_connector.config.side)).sum(-1)
        if told_PS is not None:
            numbers_PS = torch.where(told_PS < 0, numbers_PS, told_PS)
        return self.look_connector(tokens, numbers_PS)

    def _words(self, batch: ReadBatch) -> dict[str, torch.Tensor]:
        logits, _ = self.trunk.read(batch.ids_BT, batch.mask_BT, self.looks(batch.seen, batch.looks.told_PS))
        said = batch.targets_BT != IGNORED
        right = (logits.argmax(-1) == batch.targets_BT)[said].float().mean()
        kinds = WordKinds(of_V=self.kind_of_V, spread_KV=self.kind_spread_KV)
        loss = word_loss(logits, batch.targets_BT, kinds, self.settings.smoothing)
        return {"words": self.settings.words_weight * loss, "_right": right}
