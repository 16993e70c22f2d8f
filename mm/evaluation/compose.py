"""`mm eval compose`: GenEval's protocol on the world (Ghosh et al. 2023, arXiv 2310.11513).

Design choices
- Six tasks, four pictures a prompt, plain mean of the six scores; style and background, where the prompt names them,
  beside it. An unreadable picture is a failure, and their share is reported.
- The judge's own ceiling is measured in the same run: on true renders of the very prompts, and on the tokenizer's
  reconstructions of these renders, which no drawing can be expected to beat.
- A picture's seed depends on the run's seed, the prompt's id and its index alone, so that neither order, limit nor
  batch size changes it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mm.core.errors import UserError
from mm.core.statistics import share
from mm.evaluation.prompts import COMPOSE, Prompt, load_prompts
from mm.evaluation.report import grid_png, write_report
from mm.families.mm_tiny import GUIDANCE, steps_for
from mm.world import vocabulary as v
from mm.world.judge import Judge
from mm.world.render import render
from mm.world.scene import Scene, group_relation, groups, place
from mm.world.tasks import TASKS, Verdict, satisfies

if TYPE_CHECKING:
    from mm import TextToImagePipeline

ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class ComposeConfig:
    """How a compose run draws. `limit` takes the first prompts of each task, None all; `steps` None: the mode's.

    `best_of`: the most times that a picture is drawn, by the model's own counter (`mm.pipelines.best_of`).
    """

    mode: str = "flow"
    seed: int = 0
    limit: int | None = None
    pictures: int = 4
    steps: int | None = None
    guidance: float = GUIDANCE
    batch_size: int = 16
    best_of: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", steps_for(self.mode, self.steps))
        for name in ("pictures", "steps", "batch_size", "best_of"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give 1 or more")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit is {self.limit}; give 1 or more, or leave it out")


def limited(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """The first `limit` prompts of each task."""
    kept: list[Prompt] = []
    for task in TASKS:
        kept += [p for p in prompts if p.wanted.task == task][:limit]
    return kept


def picture_seed(seed: int, prompt_id: str, index: int) -> int:
    """The seed of one picture."""
    digest = hashlib.blake2s(f"{seed} {prompt_id} {index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


def true_scene(prompt: Prompt, seed: int) -> Scene:
    """A scene that the prompt describes, for the ceiling."""
    wanted = prompt.wanted
    rng = random.Random(f"ceiling {seed} {prompt.id}")
    style = wanted.style or v.DEFAULT_STYLE
    background = wanted.background or (rng.choice(v.BACKGROUNDS) if v.shows_background(style) else "plain")
    for _ in range(2000):
        sprites = place(rng, wanted.groups, style)
        if sprites is None:
            continue
        scene = Scene(sprites=sprites, background=background, style=style)
        if wanted.relation is None:
            return scene
        first, name, second = wanted.relation
        parts = groups(scene)
        if len(parts) == len(wanted.groups) and name in group_relation(scene, parts[first], parts[second]):
            return scene
    raise UserError(f"prompt {prompt.id!r} ({prompt.text!r}) describes a scene for which no place was found")


@torch.no_grad()
def draw(
    pipe: TextToImagePipeline,
    jobs: Sequence[tuple[Prompt, int]],
    config: ComposeConfig,
    progress: ProgressCallback | None,
) -> torch.Tensor:
    """uint8 pictures (B, 3, 128, 128) of (prompt, seed) pairs."""
    parts = []
    tries: dict[str, Any] = {"best_of": config.best_of} if config.best_of > 1 else {}
    for start in range(0, len(jobs), config.batch_size):
        now = jobs[start : start + config.batch_size]
        pictures = pipe(
            [prompt.text for prompt, _ in now],
            generator=[torch.Generator().manual_seed(seed) for _, seed in now],
            num_inference_steps=config.steps,
            guidance_scale=config.guidance,
            mode=config.mode,
            output_type="pt",
            **tries,
        ).images
        parts.append((pictures * 255).round().to(torch.uint8).cpu())
        if progress:
            progress(start + len(now), len(jobs))
    return torch.cat(parts)


@torch.no_grad()
def reconstruct(pipe: TextToImagePipeline, pictures: torch.Tensor, mode: str = "flow") -> torch.Tensor:
    """What the tokenizer leaves of uint8 pictures; in codes mode through the bridge, too."""
    parts = []
    for batch in pictures.split(64):
        images = (batch.to(pipe.device).float() / 127.5 - 1).to(pipe.autoencoder.dtype)
        latents = pipe.autoencoder.encode(images)
        latents = pipe.bridge(latents.float()).to(latents.dtype) if mode == "codes" and pipe.bridge else latents
        decoded = pipe.autoencoder.decode(latents).float()
        parts.append(((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu())
    return torch.cat(parts)


def score(verdicts: Sequence[Verdict], asked: Sequence[Prompt]) -> dict[str, Any]:
    """Overall, tasks, style, background and the unreadable share of verdicts."""
    tasks = {}
    for task in TASKS:
        mine = [w.ok for w, p in zip(verdicts, asked, strict=True) if p.wanted.task == task]
        if mine:
            tasks[task] = share(mine)
    return {
        "overall": round(sum(t["score"] for t in tasks.values()) / len(tasks), 4),
        "n": len(verdicts),
        "tasks": tasks,
        "style": share([w.style_ok for w in verdicts if w.style_ok is not None]),
        "background": share([w.background_ok for w in verdicts if w.background_ok is not None]),
        "invalid": share([not w.readable for w in verdicts]),
    }


def drawn_and_judged(
    pipe: TextToImagePipeline,
    judge: Judge,
    config: ComposeConfig,
    chosen: Sequence[Prompt],
    progress: ProgressCallback | None,
) -> tuple[list[Prompt], torch.Tensor, list[Verdict]]:
    """The prompt, the picture (B, 3, 128, 128) and the verdict of each picture, a prompt's pictures together."""
    jobs = [(p, picture_seed(config.seed, p.id, i)) for p in chosen for i in range(config.pictures)]
    asked = [prompt for prompt, _ in jobs]
    pictures = draw(pipe, jobs, config, progress)
    return asked, pictures, [satisfies(r, p.wanted) for r, p in zip(judge.read(pictures), asked, strict=True)]


def evaluate_compose(
    pipe: TextToImagePipeline,
    judge: Judge,
    config: ComposeConfig,
    *,
    prompts: str | Path = COMPOSE,
    json_file: Path | None = None,
    settings: dict[str, Any] | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Draws, judges and reports; with `json_file`, writes it and a grid PNG beside it."""
    chosen = limited(load_prompts(prompts), config.limit)
    asked, pictures, verdicts = drawn_and_judged(pipe, judge, config, chosen, progress)

    renders = render([true_scene(p, config.seed) for p in chosen])
    ceilings = []
    for true in (renders, reconstruct(pipe, renders, config.mode)):
        ceilings.append(score([satisfies(r, p.wanted) for r, p in zip(judge.read(true), chosen, strict=True)], chosen))
    report = score(verdicts, asked) | {
        "ceiling": ceilings[0]["overall"],
        "ceiling_reconstructed": ceilings[1]["overall"],
        "ceiling_tasks": {
            task: {"renders": ceilings[0]["tasks"][task]["score"], "reconstructed": ceilings[1]["tasks"][task]["score"]}
            for task in ceilings[0]["tasks"]
        },
        "settings": asdict(config) | {"prompts": str(prompts)} | (settings or {}),
    }
    if json_file is not None:
        shown = torch.linspace(0, len(asked) - 1, min(len(asked), 48)).long()
        labels, marks = [asked[i].text for i in shown], [verdicts[i].ok for i in shown]
        write_report(json_file, report, grid_png(pictures[shown], labels, marks))
    return report
