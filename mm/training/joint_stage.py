"""Batches of the joint stage by task, its module, and what it publishes.

Design choices
- Edit pairs are cached like scenes. Reading through the understanding encoder uses fresh renders, which are cheap.
- A fresh run starts from the drawing stage's state, or from published weights; its minutes count on from there.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from functools import partial
from typing import Any

import torch

from mm.core.errors import UserError
from mm.models.connectors import Connector
from mm.models.dialogue import Dialogue
from mm.models.text import build_text_tokenizer
from mm.models.trunk import Trunk
from mm.models.understanding_encoder import LatentStem, UnderstandingEncoder
from mm.tokenizers import Autoencoder
from mm.training import conversations
from mm.training.counter_stage import find_connector
from mm.training.drawing_stage import Drawing, DrawingBatch, build_drawing, make_batch, words_for
from mm.training.edit_pairs import EditCache, write_edit_shard
from mm.training.joint_losses import (
    EditBatch,
    Encoder,
    EncoderInputs,
    Joint,
    JointConfig,
    ReadBatch,
    edit_batch,
    read_batch,
)
from mm.training.latents import LatentCache
from mm.training.preview import judged_preview
from mm.training.publishing import publish, publish_drawing
from mm.training.scene_labels import noun_ids, noun_labels
from mm.training.stage import Stage, StageContext, device
from mm.training.workers import write_all
from mm.world.edits import Edit
from mm.world.render import render
from mm.world.scene import Scene, sample_scene


class JointBatches:
    """The batch of a step: task and rows depend on seed, step and process alone."""

    def __init__(self, scenes: LatentCache, edits: EditCache, config: JointConfig, batch_size: int, seed: int) -> None:
        self.config, self.batch_size, self.seed = config, batch_size, seed
        self.scenes, self.edits = scenes, edits
        self.tokenizer = build_text_tokenizer()
        self.nouns = noun_ids(lambda word: int(self.tokenizer.convert_tokens_to_ids(word)))  # pyright: ignore[reportArgumentType]

    def new(self) -> Dialogue:
        """An empty conversation."""
        return Dialogue(self.tokenizer)

    def __call__(self, step: int, process: int = 0) -> Any:
        if step % 100 == 0:
            self.scenes.refresh()
            self.edits.refresh()
        rng = random.Random(f"joint {self.seed} {step} {process}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        draw = rng.random()
        if draw < self.config.read_share:
            return self._read(rng, generator)
        if draw < self.config.read_share + self.config.edit_share:
            return self._edit(rng, generator)
        return self._draw(rng, generator)

    def _draw(self, rng: random.Random, generator: torch.Generator) -> DrawingBatch:
        latents, scenes = self.scenes.draw(self.batch_size, rng)
        rows = [
            self.new().user(conversations.draw_words(scene, rng)).starts_drawing().ids
            if words and rng.random() < self.config.chat_prompts
            else list(self.tokenizer(words).input_ids)
            for scene, words in zip(scenes, words_for(scenes, rng, self.config), strict=True)
        ]
        padded = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        ids, mask = padded["input_ids"], padded["attention_mask"].bool()
        about = [[scene] * len(row) for scene, row in zip(scenes, rows, strict=True)]
        batch = make_batch(latents, scenes, ids, mask, generator, self.config)
        return dataclasses.replace(batch, nouns=noun_labels(rows, about, ids.shape[1], self.nouns))

    def _read(self, rng: random.Random, generator: torch.Generator) -> ReadBatch:
        if rng.random() < self.config.outside_share:
            scenes = [sample_scene(rng, **conversations.READ) for _ in range(self.batch_size)]
            return self._read_scenes(rendered, scenes, rng)
        if rng.random() < 0.5:
            latents, scenes = self.scenes.draw(self.batch_size, rng)
            return self._read_scenes(self.noisy(scenes, latents, generator), scenes, rng)
        edits, source, target = self.edits.draw(self.batch_size, rng)
        dialogues = [conversations.changing(self.new, edit, rng) for edit in edits]
        scenes = [e.source for e in edits] + [e.target for e in edits]
        return self._batch(dialogues, self.noisy(scenes, torch.cat([source, target]), generator), rng)

    def _read_scenes(self, encode: Encoder, scenes: list[Scene], rng: random.Random) -> ReadBatch:
        """One picture a row, some of which are described (and counted) with another count of something."""
        overridden = [rng.random() < self.config.count_override_share for _ in scenes]
        described = [
            conversations.with_other_count(scene, rng) if other else None
            for scene, other in zip(scenes, overridden, strict=True)
        ]
        dialogues = [
            conversations.reading(self.new, other or scene, rng) for scene, other in zip(scenes, described, strict=True)
        ]
        for dialogue, scene in zip(dialogues, scenes, strict=True):
            dialogue.pictures = [scene] * len(dialogue.pictures)
        return self._batch(dialogues, encode, rng, described)

    def _batch(
        self,
        dialogues: list[Dialogue],
        encode: Encoder,
        rng: random.Random,
        described: list[Scene | None] | None = None,
    ) -> ReadBatch:
        return read_batch(dialogues, encode, self.nouns, rng, self.config.noun_corruption_share, described)

    def _edit(self, rng: random.Random, generator: torch.Generator) -> EditBatch:
        edits, source, target = self.edits.draw(self.batch_size, rng)
        # Some ask for something else to be drawn, whatever picture is in the conversation.
        others = len(edits) // 10
        for i in range(others):
            other = edits[i + others]
            edits[i] = Edit(
                kind="draw",
                source=edits[i].source,
                instruction=conversations.draw_words(other.target, rng),
                target=other.target,
            )
            target[i] = target[i + others]
        encode = rendered if rng.random() < 0.5 else self.noisy([e.source for e in edits], source, generator)
        return edit_batch(edits, source, target, self.new, self.nouns, encode, rng, generator, self.config)

    def noisy(self, scenes: list[Scene], latents: torch.Tensor, generator: torch.Generator) -> Encoder:
        """A function from scenes to their latents with noise."""
        rows = {id(scene): i for i, scene in enumerate(scenes)}

        def encode(wanted: list[Scene]) -> EncoderInputs:
            chosen = latents[[rows[id(scene)] for scene in wanted]]
            noise = torch.randn(chosen.shape, generator=generator)
            return EncoderInputs(latents=chosen + self.config.latent_noise * noise)

        return encode


def rendered(scenes: list[Scene]) -> EncoderInputs:
    """Scenes as pixels (N, 3, 128, 128) in [-1, 1]."""
    return EncoderInputs(pictures=render(scenes).float() / 127.5 - 1)


def build_joint(
    trunk_config: dict[str, Any],
    drawing: Drawing,
    encoder: UnderstandingEncoder,
    stem: LatentStem,
    connector: Connector,
    settings: JointConfig,
) -> Joint:
    """The module around the drawing stage's parts; a trunk that could not read gets a text head."""
    torch.manual_seed(0)
    tokenizer = build_text_tokenizer()
    words = conversations.number_words(lambda word: int(tokenizer.convert_tokens_to_ids(word)))  # pyright: ignore[reportArgumentType]
    reads = {"reads": True, "max_text": 256, "number_words": words, "max_count": connector.config.max_count}
    trunk = Trunk(**trunk_config | reads)
    trunk.load_state_dict(drawing.trunk.state_dict(), strict=False)
    counter, connector.counter = connector.counter, None  # frozen, so not part of this stage's state
    if counter is None:
        raise UserError("the connector has no counter (counter_keys: 0); start from one that has, or from a fresh one")
    return Joint(
        trunk,
        drawing.velocity_decoder,
        drawing.code_head,
        drawing.bridge,
        encoder=encoder.float(),
        latent_stem=stem.float(),
        understanding_connector=connector,
        counter=counter.float(),
        config=settings,
    ).float()


def publish_joint(module: Any, folder: Any) -> None:
    """Writes the drawing stage's parts, and the connector with its counter, in bf16 with their configs."""
    publish_drawing(module, folder)
    connector = copy.deepcopy(module.understanding_connector)
    connector.counter = copy.deepcopy(module.counter)
    publish(connector, folder / "understanding_connector")


def stage(context: StageContext) -> Stage:
    """The joint stage; edit pairs that are missing are written first."""
    config, settings = context.trainer_config("joint"), context.settings(JointConfig, "drawing", "joint")
    autoencoder = context.load(Autoencoder, "autoencoder")
    write = partial(write_edit_shard, context.state / "edits")
    write_all(write, context.config["joint"]["edit_shards"], autoencoder, device=device(), workers=context.workers)
    encoder = context.load(UnderstandingEncoder, "understanding_encoder")
    stem = context.load(LatentStem, "latent_stem")
    drawing = build_drawing(context, settings)
    module = build_joint(
        context.config["models"]["trunk"], drawing, encoder, stem, find_connector(context, encoder), settings
    )

    def evaluate(trainer: Any) -> dict[str, float]:
        publish_joint(trainer.bare, context.published)
        return judged_preview(trainer, context.load(Autoencoder, "autoencoder"), context.state)

    before = context.state / "drawing" / "state.safetensors"
    scenes, edits = LatentCache(context.state / "latents"), EditCache(context.state / "edits")
    return Stage(
        name="joint",
        module=module,
        batches=JointBatches(scenes, edits, settings, config.batch_size, config.seed),
        evaluate=evaluate,
        config=config,
        start_from=before if before.is_file() else None,
    )
