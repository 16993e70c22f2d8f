"""Runs the joint stage: caches of scenes and edit pairs, batches by task, and what is published.

Design choices
- Edit pairs are cached like scenes (shards of latents of source and target, a JSON line each); reading through the
  understanding encoder renders fresh scenes, since its pictures are cheap to draw.
- A fresh joint run starts from the drawing stage's state, or from published weights; its minutes count on from there.

This module does not know losses or the loop's inside.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from mm.core.errors import UserError
from mm.core.files import write_bytes, write_text
from mm.models.connectors import Connector
from mm.models.dialogue import Dialogue
from mm.models.text import build_text_tokenizer
from mm.models.trunk import Trunk
from mm.models.understanding import LatentStem, UnderstandingEncoder
from mm.tokenizers import Autoencoder
from mm.training import joint, talk
from mm.training.drawing import Drawing, make_batch, words_for
from mm.training.grounding import Looks, Nouns, find_nouns, noun_ids
from mm.training.latents import LatentCache, scene_from_json, scene_to_json
from mm.training.loop import Loop, LoopConfig
from mm.training.publishing import publish_drawing
from mm.world.edits import KINDS, TRAINING_WEIGHTS, Edit, sample_edit
from mm.world.render import render
from mm.world.scene import Scene, sample_scene

EDIT_SHARD = 2048
LOOK_KEYS = 32


def write_edit_shard(folder: Path, k: int, autoencoder: Autoencoder, *, seed: int = 0, size: int = EDIT_SHARD) -> None:
    """Samples, renders and encodes edit pairs into shard `k` of `folder`; does nothing when it is there."""
    path = folder / f"{k:05d}.safetensors"
    if path.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"edits {seed} {k}")
    kinds = rng.choices(KINDS, TRAINING_WEIGHTS, k=size)
    edits = [sample_edit(rng, kind) for kind in kinds]
    latents = {"source": _encode([e.source for e in edits], autoencoder)}
    latents["target"] = _encode([e.target for e in edits], autoencoder)
    write_text(path.with_suffix(".jsonl"), "".join(_to_json(edit) + "\n" for edit in edits))
    write_bytes(path, save(latents))


@torch.no_grad()
def _encode(scenes: list[Scene], autoencoder: Autoencoder) -> torch.Tensor:
    parts = []
    for i in range(0, len(scenes), 64):
        pictures = render(scenes[i : i + 64], str(autoencoder.device)).float() / 127.5 - 1
        with torch.autocast(autoencoder.device.type, torch.bfloat16):
            parts.append(autoencoder.encode(pictures).float())
    return torch.cat(parts).half().cpu()


def _to_json(edit: Edit) -> str:
    words = {"kind": edit.kind, "instruction": edit.instruction}
    return json.dumps(words | {"source": scene_to_json(edit.source), "target": scene_to_json(edit.target)})


def _from_json(line: str) -> Edit:
    row = json.loads(line)
    scenes = {name: scene_from_json(row[name]) for name in ("source", "target")}
    return Edit(kind=row["kind"], instruction=row["instruction"], **scenes)


class EditCache:
    """The edit shards of a folder in memory; takes in new ones as they appear."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source: list[torch.Tensor] = []
        self.target: list[torch.Tensor] = []
        self.edits: list[list[Edit]] = []
        self.refresh()

    def refresh(self) -> None:
        """Takes in shards that have appeared, in order."""
        while (path := self.folder / f"{len(self.edits):05d}.safetensors").is_file():
            latents = load_file(path)
            self.source.append(latents["source"])
            self.target.append(latents["target"])
            self.edits.append([_from_json(line) for line in path.with_suffix(".jsonl").read_text().splitlines()])

    def draw(self, n: int, rng: random.Random) -> tuple[list[Edit], torch.Tensor, torch.Tensor]:
        """`n` random edits and the latents (n, 16, 8, 8) of their sources and targets."""
        if not self.edits:
            raise FileNotFoundError(f"no edit pairs in {self.folder}; write some with write_edit_shard first")
        picks = [rng.randrange(len(self.edits)) for _ in range(n)]
        spots = [(k, rng.randrange(len(self.edits[k]))) for k in picks]
        source, target = (torch.stack([x[k][i] for k, i in spots]).float() for x in (self.source, self.target))
        return [self.edits[k][i] for k, i in spots], source, target


class Batches:
    """Makes the batch of a step: which task, and its rows, depend on the seed and the step alone."""

    def __init__(self, state: Path, config: joint.JointConfig, batch_size: int, seed: int) -> None:
        self.config, self.batch_size, self.seed = config, batch_size, seed
        self.scenes, self.edits = LatentCache(state / "latents"), EditCache(state / "edits")
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
        luck = rng.random()
        if luck < self.config.read_share:
            return self._read(rng, generator)
        if luck < self.config.read_share + self.config.edit_share:
            return self._edit(rng, generator)
        return self._draw(rng, generator)

    def _draw(self, rng: random.Random, generator: torch.Generator) -> Any:
        latents, scenes = self.scenes.draw(self.batch_size, rng)
        rows = [
            self.new().user(talk.draw_words(scene, rng)).starts_drawing().ids
            if words and rng.random() < self.config.chat_prompts
            else list(self.tokenizer(words).input_ids)
            for scene, words in zip(scenes, words_for(scenes, rng, self.config), strict=True)
        ]
        padded = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        ids, mask = padded["input_ids"], padded["attention_mask"].bool()
        about = [[scene] * len(row) for scene, row in zip(scenes, rows, strict=True)]
        batch = make_batch(latents, scenes, ids, mask, generator, self.config)
        return dataclasses.replace(batch, nouns=find_nouns(rows, about, ids.shape[1], self.nouns))

    def _read(self, rng: random.Random, generator: torch.Generator) -> joint.ReadBatch:
        if rng.random() < self.config.outside_share:  # through the understanding encoder: fresh pictures
            return self._of(_pictures, [sample_scene(rng, **talk.READ) for _ in range(self.batch_size)], rng)
        if rng.random() < 0.5:
            latents, scenes = self.scenes.draw(self.batch_size, rng)
            return self._of(self._latents(scenes, latents, generator), scenes, rng)
        edits, source, target = self.edits.draw(self.batch_size, rng)
        dialogues = [talk.changing(self.new, edit, rng) for edit in edits]
        scenes = [e.source for e in edits] + [e.target for e in edits]
        return self._reading(dialogues, self._latents(scenes, torch.cat([source, target]), generator), rng)

    def _of(self, look: Any, scenes: list[Scene], rng: random.Random) -> joint.ReadBatch:
        """One picture a row, some of them spoken of (and told to be) with another number of something."""
        told = [rng.random() < self.config.told_share for _ in scenes]
        claims = [talk.recounted(scene, rng) if t else None for scene, t in zip(scenes, told, strict=True)]
        dialogues = [talk.reading(self.new, claim or scene, rng) for scene, claim in zip(scenes, claims, strict=True)]
        for dialogue, scene in zip(dialogues, scenes, strict=True):
            dialogue.pictures = [scene] * len(dialogue.pictures)
        return self._reading(dialogues, look, rng, claims)

    def _reading(
        self, dialogues: list[Dialogue], look: Any, rng: random.Random, claims: list[Scene | None] | None = None
    ) -> joint.ReadBatch:
        return joint.read_batch(dialogues, look, self.nouns, rng, self.config.slip_share, claims)

    def _edit(self, rng: random.Random, generator: torch.Generator) -> joint.EditBatch:
        edits, source, target = self.edits.draw(self.batch_size, rng)
        # Some are told to draw something else, whatever picture stands in the conversation.
        others = len(edits) // 10
        for i in range(others):
            other = edits[i + others]
            edits[i] = Edit(
                kind="draw",
                source=edits[i].source,
                instruction=talk.draw_words(other.target, rng),
                target=other.target,
            )
            target[i] = target[i + others]
        look = _pictures if rng.random() < 0.5 else self._latents([e.source for e in edits], source, generator)
        return joint.edit_batch(edits, source, target, self.new, self.nouns, look, rng, generator, self.config)

    def _latents(self, scenes: list[Scene], latents: torch.Tensor, generator: torch.Generator) -> Any:
        """A function from scenes to their latents, a little noisy."""
        rows = {id(scene): i for i, scene in enumerate(scenes)}

        def look(wanted: list[Scene]) -> joint.Seen:
            chosen = latents[[rows[id(scene)] for scene in wanted]]
            noise = torch.randn(chosen.shape, generator=generator)
            return joint.Seen(latents=chosen + self.config.look_noise * noise)

        return look


def _pictures(scenes: list[Scene]) -> joint.Seen:
    return joint.Seen(pictures=joint.render_floats(scenes))


def find_connector(folder: Path, encoder: UnderstandingEncoder, width: int) -> Connector:
    """The connector in `folder`, or a fresh one for the encoder's tokens and a trunk of `width`."""
    if not (folder / "look_connector" / "config.json").is_file():
        return Connector(in_channels=encoder.config.width, width=width, alike=LOOK_KEYS)
    return Connector.from_pretrained(folder / "look_connector")


def build(
    config: dict[str, Any],
    drawing: Drawing,
    encoder: UnderstandingEncoder,
    stem: LatentStem,
    connector: Connector,
    settings: joint.JointConfig,
) -> joint.Joint:
    """The joint module around what the drawing stage has trained, whose trunk may not have read before."""
    torch.manual_seed(0)
    words = talk.number_words(lambda word: int(build_text_tokenizer().convert_tokens_to_ids(word)))  # pyright: ignore[reportArgumentType]
    reads = {"reads": True, "max_text": 256, "number_words": words, "most_looks": connector.config.most}
    trunk = Trunk(**config["models"]["trunk"] | reads)
    trunk.load_state_dict(drawing.trunk.state_dict(), strict=False)
    counter, connector.counter = connector.counter, None  # it is trained elsewhere: no part of this stage's state
    if counter is None:
        raise UserError("the connector has no counter (alike: 0); start from one that has, or from a fresh one")
    return joint.Joint(
        trunk,
        drawing.velocity_decoder,
        drawing.code_head,
        drawing.bridge,
        encoder=encoder.float(),
        latent_stem=stem.float(),
        look_connector=connector,
        counter=counter.float(),
        config=settings,
    ).float()


def train(
    module: joint.Joint,
    state: Path,
    loop_config: LoopConfig,
    settings: joint.JointConfig,
    folder: Path,
    judged: Callable[[Loop], None],
) -> Loop:
    """Runs (or goes on with) the joint stage from the drawing stage's state; publishes and is judged at every look."""
    before = state / "drawing" / "state.safetensors"
    loop = Loop(module, state / "joint", loop_config, before if before.is_file() else None)
    batches = Batches(state, settings, loop_config.batch_size, loop_config.seed)
    process = loop.accelerator.process_index

    def look(now: Loop) -> None:
        publish(now.bare, folder)
        judged(now)

    loop.run(lambda step: moved(batches(step, process), loop), look)
    return loop


def publish(module: Any, folder: Path) -> None:
    """Writes drawing's parts and the connector with its counter in bf16, each beside its config."""
    publish_drawing(module, folder)
    connector = copy.deepcopy(module.look_connector)
    connector.counter = copy.deepcopy(module.counter)
    connector.to(torch.bfloat16).save_pretrained(folder / "look_connector")


def moved(batch: Any, loop: Loop) -> Any:
    """A batch on the loop's device; nested ones too."""
    device = loop.accelerator.device
    fields = {}
    for name in type(batch).__dataclass_fields__:
        value = getattr(batch, name)
        nested = isinstance(value, joint.Seen | Nouns | Looks)
        fields[name] = moved(value, loop) if nested else value.to(device) if torch.is_tensor(value) else value
    return type(batch)(**fields)
