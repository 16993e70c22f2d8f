"""Cached scenes and their latents, so that training neither renders nor encodes them.

Design choices
- Shards of a few thousand scenes: latents in safetensors (fp16), and a JSON line for each scene. A run loads shards
  that are added later, so that rendering and training can overlap.
- Shard k depends on (seed, k) alone. Captions are not cached: each use has a new wording.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save

from mm.core.errors import UserError
from mm.core.files import read_text_lines, write_files
from mm.core.run_files import taking
from mm.core.safe_tensors import load_tensors, read_header
from mm.tokenizers import Autoencoder
from mm.world.render import render
from mm.world.scene import Scene, Sprite, sample_scene

SHARD = 4096
Row = TypeVar("Row")


def scene_to_json(scene: Scene) -> str:
    """One line that `scene_from_json` reads back."""
    sprites = [[s.object, s.colour, s.x, s.y, s.size] for s in scene.sprites]
    return json.dumps({"sprites": sprites, "background": scene.background, "style": scene.style})


def scene_from_json(line: str) -> Scene:
    """The scene of a line."""
    data = json.loads(line)
    fields = [f.name for f in dataclasses.fields(Sprite)]
    sprites = tuple(Sprite(**dict(zip(fields, row, strict=True))) for row in data["sprites"])
    return Scene(sprites=sprites, background=data["background"], style=data["style"])


@torch.no_grad()
def encode_scenes(scenes: Sequence[Scene], autoencoder: Autoencoder) -> torch.Tensor:
    """Latents (N, 16, 8, 8) of rendered scenes, fp16 on the CPU."""
    parts, device = [], autoencoder.device
    for i in range(0, len(scenes), 64):
        pictures = render(scenes[i : i + 64], str(device)).float() / 127.5 - 1
        with torch.autocast(device.type, torch.bfloat16):
            parts.append(autoencoder.encode(pictures).float())
    return torch.cat(parts).half().cpu()


def write_shard(
    folder: Path,
    k: int,
    autoencoder: Autoencoder,
    *,
    seed: int = 0,
    scene_shares: Mapping[str, Any] | None = None,
    size: int = SHARD,
) -> None:
    """Renders and encodes shard `k` into `folder`; does nothing where it exists.

    Args:
        folder: Folder of the shards.
        k: Number of the shard.
        autoencoder: Encodes.
        seed: Of the scenes.
        scene_shares: Shares of kinds of scenes, as `sample_scene` takes them (`{"pair_share": 0.4}`).
        size: Scenes in the shard.
    """
    path = folder / f"{k:05d}.safetensors"
    if path.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"drawing {seed} {k}")
    scenes = [sample_scene(rng, default_weight=8, **(scene_shares or {})) for _ in range(size)]
    latents = encode_scenes(scenes, autoencoder)
    lines = "\n".join(map(scene_to_json, scenes)) + "\n"
    write_files({path.with_suffix(".jsonl"): lines.encode(), path: save({"latents": latents})})


def read_shard(path: Path, names: Sequence[str], of_line: Callable[[str], Row]) -> tuple[list[torch.Tensor], list[Row]]:
    """A shard, checked.

    Args:
        path: Of its tensors; its lines lie beside it.
        names: Of the tensors, each of which has a row for each line.
        of_line: What a line stands for.

    Returns:
        The tensors in the order of their names, and what the lines stand for.

    Raises:
        UserError: For a damaged shard; it says what to do.
    """
    with taking(path, "shard", f"delete {path}, and the shard is made again"):
        found = load_tensors(read_header(path, "shard"))
        rows = [of_line(line) for line in read_text_lines(path.with_suffix(".jsonl"), "list of a shard", most=1 << 30)]
        tensors = [found[name] for name in names]
        if wrong := [name for name, tensor in zip(names, tensors, strict=True) if len(tensor) != len(rows)]:
            raise UserError(f"{path}: {wrong[0]} has {len(found[wrong[0]])} rows, and its list has {len(rows)}")
    return tensors, rows


class LatentCache:
    """The shards of a folder in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.latents: list[torch.Tensor] = []
        self.scenes: list[list[Scene]] = []
        self.refresh()

    def refresh(self) -> None:
        """Loads shards that were added since, in order."""
        while (path := self.folder / f"{len(self.latents):05d}.safetensors").is_file():
            (latents,), scenes = read_shard(path, ("latents",), scene_from_json)
            self.latents.append(latents)
            self.scenes.append(scenes)

    def __len__(self) -> int:
        return sum(map(len, self.latents))

    def draw(self, n: int, rng: random.Random) -> tuple[torch.Tensor, list[Scene]]:
        """`n` random latents (n, 16, 8, 8) in fp32 and their scenes."""
        if not self.latents:
            raise FileNotFoundError(f"no latents in {self.folder}; write some with write_shard first")
        spots = [divmod(rng.randrange(len(self)), len(self.latents[0])) for _ in range(n)]
        latents = torch.stack([self.latents[k][i] for k, i in spots]).float()
        return latents, [self.scenes[k][i] for k, i in spots]
