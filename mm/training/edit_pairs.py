"""Cached edit pairs: shards of latents of source and target, and a JSON line with scenes and instruction for each."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from safetensors.torch import save

from mm.core.files import write_files
from mm.tokenizers import Autoencoder
from mm.training.latents import encode_scenes, read_shard, scene_from_json, scene_to_json
from mm.world.edits import KINDS, TRAINING_WEIGHTS, Edit, sample_edit

EDIT_SHARD = 2048


def write_edit_shard(folder: Path, k: int, autoencoder: Autoencoder, *, seed: int = 0, size: int = EDIT_SHARD) -> None:
    """Samples, renders and encodes edit pairs into shard `k` of `folder`; does nothing where it exists."""
    path = folder / f"{k:05d}.safetensors"
    if path.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"edits {seed} {k}")
    kinds = rng.choices(KINDS, TRAINING_WEIGHTS, k=size)
    edits = [sample_edit(rng, kind) for kind in kinds]
    latents = {"source": encode_scenes([e.source for e in edits], autoencoder)}
    latents["target"] = encode_scenes([e.target for e in edits], autoencoder)
    lines = "".join(_to_json(edit) + "\n" for edit in edits)
    write_files({path.with_suffix(".jsonl"): lines.encode(), path: save(latents)})


def _to_json(edit: Edit) -> str:
    words = {"kind": edit.kind, "instruction": edit.instruction}
    return json.dumps(words | {"source": scene_to_json(edit.source), "target": scene_to_json(edit.target)})


def _from_json(line: str) -> Edit:
    row = json.loads(line)
    scenes = {name: scene_from_json(row[name]) for name in ("source", "target")}
    return Edit(kind=row["kind"], instruction=row["instruction"], **scenes)


class EditCache:
    """The edit shards of a folder in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source: list[torch.Tensor] = []
        self.target: list[torch.Tensor] = []
        self.edits: list[list[Edit]] = []
        self.refresh()

    def refresh(self) -> None:
        """Loads shards that were added since, in order."""
        while (path := self.folder / f"{len(self.edits):05d}.safetensors").is_file():
            (source, target), edits = read_shard(path, ("source", "target"), _from_json)
            self.source.append(source)
            self.target.append(target)
            self.edits.append(edits)

    def draw(self, n: int, rng: random.Random) -> tuple[list[Edit], torch.Tensor, torch.Tensor]:
        """`n` random edits and the latents (n, 16, 8, 8) of their sources and targets."""
        if not self.edits:
            raise FileNotFoundError(f"no edit pairs in {self.folder}; write some with write_edit_shard first")
        picks = [rng.randrange(len(self.edits)) for _ in range(n)]
        spots = [(k, rng.randrange(len(self.edits[k]))) for k in picks]
        source, target = (torch.stack([x[k][i] for k, i in spots]).float() for x in (self.source, self.target))
        return [self.edits[k][i] for k, i in spots], source, target
