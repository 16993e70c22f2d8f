"""Batches and losses of the joint stage: the trunk that draws learns to read, edit and converse, and continues to draw.

Design choices
- One step, one task, sampled by its share: drawing (flow or codes), reading (text), editing (flow or codes). Nothing
  that the drawing stage trained is frozen; drawing keeps a share of the steps, so that it is not forgotten.
- Understanding tokens come from the understanding encoder, which is frozen (it has its own stage): of pictures in a
  share of the batches, else of latents through its stem, with a little noise, since drawn latents differ from encoded
  ones.
- Editing has the source twice: as understanding tokens, and as clean latents at sigma 0. The instruction is dropped now
  and then, and the source too, so that both have guidance scales of their own (as in InstructPix2Pix, arXiv
  2211.09800). Latents that the edit changes have a larger weight, since most of the picture stays.
- Auxiliary losses on hidden states in all three tasks (`mm.training.readouts`).
- The connector's counter is frozen, too. In a share of the reading the words describe another count than the picture
  shows, and the understanding tokens' counts are overridden with it; numbers, colours and objects are label-smoothed
  within their kind. Both work against memorized counts and pairs.
- Input corruption: a share of the nouns of descriptions is replaced in the input (not in the targets), so that the next
  noun depends on the picture rather than on the nouns before it. Held-out pairs never occur together in training.

Legend: B rows, N pictures, C = 16 channels, T tokens, V words, P pictures, S understanding tokens a picture.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mm.models.cache import PromptCache
from mm.models.codes import CodeHead
from mm.models.connectors import Connector, SameObjectCounter, merged
from mm.models.dialogue import IGNORED, Dialogue, WordKinds, stack, word_loss
from mm.models.text import build_text_tokenizer
from mm.models.trunk import Trunk
from mm.models.understanding_encoder import LatentStem, UnderstandingEncoder
from mm.models.velocity import VelocityDecoder
from mm.tokenizers import Bridge
from mm.training import conversations
from mm.training.drawing_stage import Drawing, DrawingBatch, DrawingConfig, make_batch
from mm.training.readouts import NounReadout, RelationReadout, TokenReadout, captured_outputs
from mm.training.scene_labels import (
    NounLabels,
    UnderstandingTokenLabels,
    next_noun_labels,
    noun_labels,
    understanding_token_labels,
)
from mm.world.edits import Edit
from mm.world.scene import Scene


@dataclass(frozen=True, kw_only=True)
class JointConfig(DrawingConfig):
    """Tasks and losses of the joint stage.

    Attributes:
        read_share: Share of the steps that read.
        edit_share: Share of the steps that edit.
        outside_share: Share of the reading on fresh renders through the understanding encoder.
        chat_prompts: Share of drawing prompts in the form of a conversation.
        words_weight: Of the text's cross-entropy.
        changed_weight: Additional weight of latents that an edit changes.
        drop_words: Share of edits without an instruction.
        drop_source: Share of edits without a source.
        latent_noise: Standard deviation of the noise on latents that are read.
        nouns_layer: The text layer of the noun and token readouts.
        nouns_weight: Of the noun readout's loss.
        relations_layer: The text layer of the relation and next-noun readouts.
        relations_weight: Of the relation readout's loss.
        token_readout_weight: Of the understanding tokens' readout.
        count_override_share: Share of pictures whose counts are overridden.
        next_noun_weight: Of the next-noun readout.
        smoothing: Label smoothing of numbers, colours and objects within their kind.
        noun_corruption_share: Share of a description's nouns that are replaced in the input.
    """

    read_share: float = 0.25
    edit_share: float = 0.2
    outside_share: float = 0.5
    chat_prompts: float = 0.3
    words_weight: float = 0.5
    changed_weight: float = 3.0
    drop_words: float = 0.08
    drop_source: float = 0.05
    latent_noise: float = 0.1
    nouns_layer: int = 3
    nouns_weight: float = 0.15
    relations_layer: int = 5
    relations_weight: float = 0.15
    token_readout_weight: float = 0.15
    count_override_share: float = 0.25
    next_noun_weight: float = 0.15
    smoothing: float = 0.1
    noun_corruption_share: float = 0.1

    def __post_init__(self) -> None:
        DrawingConfig.__post_init__(self)
        for name in (
            "read_share",
            "edit_share",
            "outside_share",
            "chat_prompts",
            "drop_words",
            "drop_source",
            "noun_corruption_share",
            "smoothing",
            "count_override_share",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} must lie in [0, 1]")
        if self.read_share + self.edit_share > 1:
            raise ValueError(f"read_share {self.read_share} + edit_share {self.edit_share} leave nothing to draw")


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderInputs:
    """The pictures of a batch in reading order: pixels (N, 3, H, W) in [-1, 1], or latents (N, C, 8, 8)."""

    pictures: torch.Tensor | None = None
    latents: torch.Tensor | None = None


Encoder = Callable[[list[Scene]], EncoderInputs]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadBatch:
    """Conversations with pictures, the words to generate, and labels for the auxiliary losses."""

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    targets_BT: torch.Tensor
    inputs: EncoderInputs
    nouns: NounLabels
    next_nouns: NounLabels
    tokens: UnderstandingTokenLabels


@dataclass(frozen=True, kw_only=True, slots=True)
class EditBatch(DrawingBatch):
    """A drawing batch whose prompts hold pictures, with source latents; `keeps_B`: which rows attend to their
    source."""

    inputs: EncoderInputs
    source_BCHW: torch.Tensor
    keeps_B: torch.Tensor


def read_batch(
    dialogues: Sequence[Dialogue],
    encode: Encoder,
    nouns: dict[int, str],
    rng: random.Random,
    noun_corruption_share: float = 0.0,
    described: Sequence[Scene | None] | None = None,
) -> ReadBatch:
    """A batch of conversations.

    Args:
        dialogues: Conversations whose pictures are scenes.
        encode: Makes encoder inputs of scenes.
        nouns: Token id -> object.
        rng: For input corruption.
        noun_corruption_share: Share of nouns to replace.
        described: As in `understanding_token_labels`.
    """
    ids, mask, targets = stack(dialogues)
    inputs = encode([scene for d in dialogues for scene in d.pictures])
    rows, width = [d.ids for d in dialogues], ids.shape[1]
    batch = ReadBatch(
        ids_BT=ids,
        mask_BT=mask,
        targets_BT=targets,
        inputs=inputs,
        nouns=noun_labels(rows, [d.about for d in dialogues], width, nouns),
        next_nouns=next_noun_labels(rows, [d.describes for d in dialogues], width, nouns),
        tokens=understanding_token_labels(dialogues, width, described),
    )
    _corrupt_nouns(ids, dialogues, nouns, rng, noun_corruption_share)
    return batch


def _corrupt_nouns(
    ids_BT: torch.Tensor, dialogues: Sequence[Dialogue], nouns: dict[int, str], rng: random.Random, share: float
) -> None:
    """Replaces a share of the nouns in descriptions by other nouns, in place."""
    others = list(nouns)
    for row, dialogue in enumerate(dialogues):
        for place, (word, scene) in enumerate(zip(dialogue.ids, dialogue.describes, strict=True)):
            if scene is not None and word in nouns and rng.random() < share:
                ids_BT[row, place] = rng.choice(others)


def edit_batch(
    edits: Sequence[Edit],
    source: torch.Tensor,
    target: torch.Tensor,
    new: conversations.NewDialogue,
    nouns: dict[int, str],
    encode: Encoder,
    rng: random.Random,
    generator: torch.Generator,
    config: JointConfig,
) -> EditBatch:
    """A batch of edits; `source` and `target` are their latents (B, C, 8, 8)."""
    prompts = [_edit_prompt(new, edit, rng, config) for edit in edits]
    ids, mask, _ = stack(prompts)
    plain = make_batch(target, [e.target for e in edits], ids, mask, generator, config)
    changed_BHW = ((target - source).abs().mean(1) > 0.1).float()
    weights = 1 + config.changed_weight * changed_BHW
    fields: dict[str, Any] = {name: getattr(plain, name) for name in DrawingBatch.__slots__}
    fields["weights_BHW"] = weights / weights.mean()
    fields["nouns"] = noun_labels([d.ids for d in prompts], [d.about for d in prompts], ids.shape[1], nouns)
    return EditBatch(
        **fields,
        inputs=encode([scene for d in prompts for scene in d.pictures]),
        source_BCHW=source,
        keeps_B=torch.tensor([bool(d.pictures) for d in prompts]),
    )


def _edit_prompt(new: conversations.NewDialogue, edit: Edit, rng: random.Random, config: JointConfig) -> Dialogue:
    """A conversation; now and then the picture without words, or neither, for classifier-free guidance."""
    draw = rng.random()
    if draw < config.drop_source:
        return new().user("").starts_drawing()
    if draw < config.drop_source + config.drop_words:
        return new().user("", edit.source).starts_drawing()
    return conversations.edit_prompt(new, edit, rng)


class Joint(Drawing):
    """The drawing stage's parts with an understanding encoder and a connector.

    The encoder, its stem and the counter are frozen and not registered: neither trained nor averaged nor saved.
    """

    def __init__(
        self,
        trunk: Trunk,
        velocity_decoder: VelocityDecoder,
        code_head: CodeHead,
        bridge: Bridge,
        *,
        encoder: UnderstandingEncoder,
        latent_stem: LatentStem,
        understanding_connector: Connector,
        counter: SameObjectCounter,
        config: JointConfig,
    ) -> None:
        super().__init__(trunk, velocity_decoder, code_head, bridge, config)
        self.settings = config
        self.understanding_connector = understanding_connector
        width = trunk.config.width
        self.noun_readout, self.relation_readout = NounReadout(width), RelationReadout(width)
        self.next_noun_readout, self.token_readout = NounReadout(width, names=True), TokenReadout(width)
        tokenizer = build_text_tokenizer()
        kinds = conversations.word_kinds(
            lambda word: int(tokenizer.convert_tokens_to_ids(word)),  # pyright: ignore[reportArgumentType]
            trunk.config.vocabulary_size,
        )
        self.register_buffer("kind_of_V", kinds.of_V, persistent=False)
        self.register_buffer("kind_spread_KV", kinds.spread_KV, persistent=False)
        self.kind_of_V: torch.Tensor
        self.kind_spread_KV: torch.Tensor
        self._frozen: list[Any] = [part.requires_grad_(False).eval() for part in (encoder, latent_stem, counter)]

    @property
    def counter(self) -> SameObjectCounter:
        """The connector's counter, from its own stage."""
        return self._frozen[2]

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        """Named losses; names with a leading underscore are only logged."""
        reads = isinstance(batch, ReadBatch)
        layers, settings = self.trunk.text_layers, self.settings
        early_layer, late_layer = layers[settings.nouns_layer], layers[settings.relations_layer]
        with captured_outputs(early_layer) as early, captured_outputs(late_layer) as late:
            losses = self._words(batch) if reads else super().forward(batch)
        if batch.nouns is not None:
            prefix = "read_" if reads else ""
            losses[f"{prefix}nouns"] = settings.nouns_weight * self.noun_readout(early[0], batch.nouns)
            losses[f"{prefix}relations"] = settings.relations_weight * self.relation_readout(late[0], batch.nouns)
        if reads:
            losses["tokens"] = settings.token_readout_weight * self.token_readout(early[0], batch.tokens)
            losses["next_nouns"] = settings.next_noun_weight * self.next_noun_readout(late[0], batch.next_nouns)
        return {f"edit_{k}": x for k, x in losses.items()} if isinstance(batch, EditBatch) else losses

    def prompt(self, batch: DrawingBatch) -> PromptCache:
        """The cache of the batch's prompts; for edits with understanding tokens and the clean source."""
        if not isinstance(batch, EditBatch):
            return super().prompt(batch)
        cache = self.trunk.encode_text(batch.ids_BT, batch.mask_BT, self.understanding_tokens(batch.inputs))
        words = cache.mask_BT.shape[1]
        cache = self.trunk.encode_picture(batch.source_BCHW, cache)
        visible = torch.cat([cache.mask_BT[:, :words], cache.mask_BT[:, words:] & batch.keeps_B[:, None]], 1)
        return PromptCache(cache.keys, cache.values, visible)

    def understanding_tokens(
        self, inputs: EncoderInputs, count_override_PS: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Understanding tokens (P, S, D + K); overrides of -1 keep the counter's counts."""
        x = inputs.pictures if inputs.pictures is not None else inputs.latents
        assert x is not None
        encoder, stem, counter = (part.to(x.device) for part in self._frozen)
        with torch.no_grad():
            tokens = encoder(x)[1] if inputs.pictures is not None else encoder.encode_patches(stem(x))[1]
            counts_PS = counter(merged(tokens, self.understanding_connector.config.side)).sum(-1)
        if count_override_PS is not None:
            counts_PS = torch.where(count_override_PS < 0, counts_PS, count_override_PS)
        return self.understanding_connector(tokens, counts_PS)

    def _words(self, batch: ReadBatch) -> dict[str, torch.Tensor]:
        understanding = self.understanding_tokens(batch.inputs, batch.tokens.count_override_PS)
        logits, _ = self.trunk.read(batch.ids_BT, batch.mask_BT, understanding)
        learned = batch.targets_BT != IGNORED
        right = (logits.argmax(-1) == batch.targets_BT)[learned].float().mean()
        kinds = WordKinds(of_V=self.kind_of_V, spread_KV=self.kind_spread_KV)
        loss = word_loss(logits, batch.targets_BT, kinds, self.settings.smoothing)
        return {"words": self.settings.words_weight * loss, "_right": right}
