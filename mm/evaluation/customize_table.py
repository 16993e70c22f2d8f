"""Compares methods of customization at equal size, for the choice of `auto`: `python -m mm.evaluation.customize_table`.

Design choices
- The objects are not the held-out eight of the report. Nothing else is new to the model, so that new objects are made:
  each is two trained sprites joined, the upper half of one over the lower half of the other, under a name of its own.
- The judge knows no such object. Fidelity is how similar pictures are to true ones by its own features, between that of
  the two parents (0) and that of other true pictures of the object (1).
- Every method gets about the same number of stored values as LoRA of rank 8; prompts and seeds are those for tuning.
- A cell is written when it is done, so that a stopped table goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mm.core.files import write_json, write_text
from mm.customization.customize import customize
from mm.evaluation import compose
from mm.evaluation.prompts import COMPOSE_TUNE, load_prompts
from mm.world import captions as c
from mm.world.judge import Judge
from mm.world.render import render
from mm.world.scene import Scene, Sprite
from mm.world.tasks import satisfies

PARENTS: dict[str, tuple[str, str]] = {
    "catcar": ("cat", "car"), "owlclock": ("owl", "clock"), "appleboat": ("apple", "boat"),
    "starfrog": ("star", "frog"),
}  # fmt: skip
GROUNDS: tuple[str, ...] = ("grass", "beach", "snow", "sky", "night")
# Settings by which a method stores about as many values as LoRA of rank 8.
METHODS: dict[str, dict[str, Any]] = {
    "dreambooth": {"rank": 8}, "orthogonal": {"rank": 16}, "paca": {"rank": 16}, "s2ft": {"rank": 16},
    "eva": {"rank": 8}, "lora": {"rank": 8}, "dora": {"rank": 8}, "oft": {"block": 32},
    "lokr": {"rank": 16, "factor": 4},
    "loha": {"rank": 4}, "shira": {"rank": 8},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method on one object.

    Attributes:
        fidelity: 0 as similar as the parents are, 1 as true pictures are to each other.
        drift: share of unrelated tuning prompts that were right and no longer are.
        bytes: of the file.
        seconds: of training.
    """

    fidelity: float
    drift: float
    bytes: int
    seconds: float


def joined(name: str, ground: str, seed: int) -> Tensor:
    """A true picture (3, 128, 128), uint8, of a joined object on a background."""
    rng = random.Random(f"customize table {name} {ground} {seed}")
    size = rng.choice((52, 60))
    x, y = rng.randint(40, 88), rng.randint(40, 88)
    upper, lower = (
        render([Scene(sprites=(Sprite(object=parent, x=x, y=y, size=size),), background=ground)])[0]
        for parent in PARENTS[name]
    )
    upper[:, y:] = lower[:, y:]
    return upper


def write_folder(folder: Path, name: str) -> Path:
    """Five training pictures with captions that name the background."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, ground in enumerate(GROUNDS):
        Image.fromarray(joined(name, ground, 0).permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
        write_text(folder / f"{number}.txt", f"a [trigger] {c.BACKGROUND_PHRASES[ground][0]}\n")
    return folder


@torch.no_grad()
def features(judge: Judge, pictures_B3HW: Tensor) -> Tensor:
    """The judge's object logits (B, O) of uint8 pictures where it is surest of a centre, less their mean, of norm 1."""
    raw = judge.eval()(pictures_B3HW.float() / 255)
    surest_B = raw.centre_BGG.flatten(1).argmax(1)
    logits_BO = raw.object_BOGG.flatten(2)[torch.arange(len(surest_B)), :, surest_B]
    return F.normalize(logits_BO - logits_BO.mean(1, keepdim=True), dim=1)


def fidelity_of(judge: Judge, drawn: Tensor, name: str) -> float:
    """See `Cell`."""
    true = features(judge, torch.stack([joined(name, g, 1) for g in GROUNDS])).mean(0)
    own = features(judge, torch.stack([joined(name, g, 2) for g in GROUNDS])) @ true
    parents = torch.stack(
        [
            render([Scene(sprites=(Sprite(object=parent, x=64, y=64, size=60),), background=ground)])[0]
            for parent in PARENTS[name]
            for ground in GROUNDS
        ]
    )
    low, high = float((features(judge, parents) @ true).mean()), float(own.mean())
    return (float((features(judge, drawn) @ true).mean()) - low) / max(1e-6, high - low)


def measure(pipe: Any, judge: Judge, method: str, name: str, work: Path, *, steps: int | None, limit: int) -> Cell:
    """Trains and measures one cell; `steps` None takes the family's own."""
    folder, settings = write_folder(work / name, name), dict(METHODS[method])
    if steps is not None:
        settings |= {"steps": steps, "preview_every": steps}
    started = time.monotonic()
    patch = customize(pipe, folder, name=f"<{name}>", method=method, samples=(), **settings)
    seconds = time.monotonic() - started
    file = work / f"{name}-{method}.safetensors"
    patch.write(file)
    prompts = compose.limited(load_prompts(COMPOSE_TUNE), limit) if limit else []
    jobs = [(p, compose.picture_seed(11, p.id, 0)) for p in prompts]

    def right() -> list[bool]:
        if not jobs:
            return []
        pictures = compose.draw(pipe, jobs, compose.ComposeConfig(), None)
        return [satisfies(r, p.wanted).ok for r, (p, _) in zip(judge.read(pictures), jobs, strict=True)]

    before = right()
    patch.apply(pipe)
    try:
        texts = [f"a <{name}> {c.BACKGROUND_PHRASES[ground][2]}" for ground in GROUNDS]
        drawn = pipe(texts, generator=torch.Generator().manual_seed(23), output_type="pt").images
        after = right()
    finally:
        patch.undo(pipe)
    lost = sum(was and not now for was, now in zip(before, after, strict=True)) / max(1, sum(before))
    fidelity = fidelity_of(judge, (drawn * 255).round().to(torch.uint8).cpu(), name)
    return Cell(
        fidelity=round(fidelity, 4), drift=round(lost, 4), bytes=file.stat().st_size, seconds=round(seconds, 1)
    )  # fmt: skip


def table(
    work: Path, methods: Sequence[str], objects: Sequence[str], *, steps: int | None = None, limit: int = 2
) -> dict[str, dict[str, Cell]]:  # fmt: skip
    """All cells by method and object; those that lie in `work` are not measured again."""
    from mm import TextToImagePipeline

    pipe = TextToImagePipeline.from_pretrained("mm-tiny")
    pipe.set_progress_bar_config(disable=True)
    judge = Judge.from_pretrained()
    found: dict[str, dict[str, Cell]] = {}
    for method in methods:
        for name in objects:
            file = work / f"{name}-{method}-{steps}-{limit}.json"
            if not file.is_file():
                made = measure(pipe, judge, method, name, work, steps=steps, limit=limit)
                write_json(file, vars(made))
            found.setdefault(method, {})[name] = Cell(**json.loads(file.read_text()))
            print(method, name, found[method][name], flush=True)
    return found


def rows(found: dict[str, dict[str, Cell]]) -> list[str]:
    """A Markdown table of means, the best fidelity less drift first."""
    means = {m: replace(_mean(list(cells.values()))) for m, cells in found.items()}
    order = sorted(means, key=lambda m: means[m].drift - means[m].fidelity)
    body = [
        f"| {m} | {x.fidelity:.3f} | {x.drift:.3f} | {x.bytes >> 10} KiB | {x.seconds:.0f} s |"
        for m in order
        for x in [means[m]]
    ]
    return ["| method | fidelity | drift | file | training |", "|---|---|---|---|---|", *body]


def _mean(cells: Sequence[Cell]) -> Cell:
    count = len(cells)
    return Cell(
        fidelity=sum(x.fidelity for x in cells) / count, drift=sum(x.drift for x in cells) / count,
        bytes=sum(x.bytes for x in cells) // count, seconds=sum(x.seconds for x in cells) / count,
    )  # fmt: skip


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("customize-table"))
    parser.add_argument("--method", action="append", choices=list(METHODS))
    parser.add_argument("--object", action="append", choices=list(PARENTS))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--limit", type=int, default=2, help="tuning prompts a task for the drift; 0 for none")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    found = table(
        given.work, given.method or list(METHODS), given.object or list(PARENTS), steps=given.steps, limit=given.limit
    )
    print("\n".join(rows(found)))
    if given.json is not None:
        write_json(given.json, {m: {o: vars(cell) for o, cell in cells.items()} for m, cells in found.items()})


if __name__ == "__main__":
    main()
