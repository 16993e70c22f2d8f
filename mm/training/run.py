"""Runs the stages of a published model from its YAML.

Design choices
- One YAML a model, one file a stage (`mm.training.stage`); command-line flags replace single fields, so that a run is
  its YAML plus the flags in its log.
- Everything unfinished lives in the state folder; averaged weights are published as a diffusers folder that
  `TextToImagePipeline.from_pretrained` loads.
"""

from __future__ import annotations

import importlib
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from mm.core.errors import UserError
from mm.core.files import check_folder
from mm.core.nouns import with_article
from mm.tokenizers import Autoencoder, Bridge
from mm.tokenizers.bridge import BINS
from mm.training.latents import write_shard
from mm.training.processes import in_first_process
from mm.training.stage import StageContext, device
from mm.training.stage_flags import check_flags
from mm.training.trainer import Trainer
from mm.training.workers import write_all

# Stages that the trainer runs: the module of each, and how many shards of latents it needs to begin.
STAGES: dict[str, tuple[str, int]] = {
    "autoencoder": ("tokenizer_stage", 0),
    "judge": ("judge_stage", 0),
    "drawing": ("drawing_stage", 1),
    "understanding": ("understanding_stage", 0),
    "stem": ("stem_stage", 1),
    "counter": ("counter_stage", 1),
    "joint": ("joint_stage", 1),
    "crisp": ("crisp_stage", 0),
    "enlarger": ("enlarger_stage", 0),
}
ORDER = (
    "autoencoder", "bridge", "judge", "latents", "drawing", "understanding", "stem", "counter", "joint", "crisp",
    "enlarger", "fingerprint",
)  # fmt: skip


def read_config(name: str) -> dict[str, Any]:
    """The YAML of a published model's name, or of a path. Raises UserError for what is no mapping in YAML."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else Path(__file__).parent / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in Path(__file__).parent.glob("*.yaml")))
        raise UserError(f"no training config {name!r}; known: {known}, or give a path to a .yaml file")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(found, dict):
        raise UserError(
            f"{path} holds {with_article(type(found).__name__)}; a training config is a mapping, as mm-tiny's is"
        )
    return found


def write_latents(context: StageContext, shards: int) -> None:
    """Renders and encodes the shards that are missing."""
    settings = context.config["latents"]
    write = partial(
        write_shard, context.state / "latents", seed=settings["seed"], scene_shares=settings.get("scene_shares")
    )
    autoencoder = context.load(Autoencoder, "autoencoder")
    write_all(write, shards, autoencoder, device=device(), workers=context.workers)


def train_stage(name: str, context: StageContext) -> Trainer:
    """Runs one stage of `STAGES`, or resumes it."""
    module, shards = STAGES[name]
    if shards:
        write_latents(context, shards)
    return importlib.import_module(f"mm.training.{module}").stage(context).train(context.state)


def fit_bridge(context: StageContext) -> None:
    """Fits the bridge to latents of fresh scenes; keeps the kind of bins with the smaller error."""
    from mm.world.render import render
    from mm.world.scene import sample_scene

    autoencoder = context.load(Autoencoder, "autoencoder")
    rng = random.Random("bridge")
    scenes = [sample_scene(rng) for _ in range(context.config["bridge"]["scenes"])]
    with torch.no_grad():
        parts = [autoencoder.encode(render(scenes[i : i + 64]).float() / 127.5 - 1) for i in range(0, len(scenes), 64)]
    latents = torch.cat(parts).float()
    bridges = [Bridge.fit(latents, bins=bins) for bins in BINS]
    errors = [float((b.dequantize(b.quantize(latents)) - latents).square().mean()) for b in bridges]
    print(" ".join(f"{bins}: squared error {e:.6f}" for bins, e in zip(BINS, errors, strict=True)), flush=True)
    bridges[errors.index(min(errors))].save_pretrained(context.state / "model" / "bridge")


def run_stages(
    name: str,
    *,
    stages: list[str],
    state: Path | None = None,
    init_from: Path | None = None,
    publish_to: Path | None = None,
    **flags: Any,
) -> None:
    """Runs stages in order, each resuming from `state`.

    Args:
        name: A published model, or a path to a YAML.
        stages: Names of `ORDER`.
        state: Folder of everything unfinished; by default the YAML's.
        init_from: A diffusers folder whose tokenizers and understanding encoder are used, and whose trunk, heads and
            connector training starts from.
        publish_to: Where averaged weights go.
        **flags: Fields of a stage's configs to replace.

    Raises:
        UserError: An unknown stage, a flag that none of the stages uses, or a part that no stage has trained yet.
    """
    if unknown := [stage for stage in stages if stage not in ORDER]:
        raise UserError(f"unknown stage {unknown[0]!r}; known: {', '.join(ORDER)}")
    check_flags(stages, flags | {"publish": publish_to}, ORDER)
    config = read_config(name)
    state = Path(config["state"]) if state is None else state
    context = StageContext(config=config, state=state, init_from=init_from, publish_to=publish_to, flags=flags)
    check_folder(state)
    if publish_to is not None:
        check_folder(publish_to)
    if init_from is not None:
        in_first_process(partial(copy_published, init_from, state / "model"))
    for stage in stages:
        run_stage(stage, context)


def run_stage(name: str, context: StageContext) -> None:
    """Runs one stage. Those that the trainer does not run are the first process's work alone."""
    if name == "bridge":
        in_first_process(partial(fit_bridge, context))
    elif name == "latents":
        write_latents(context, context.config["latents"]["shards"])
    elif name == "fingerprint":
        from mm.training.fingerprint_stage import fit_fingerprint

        in_first_process(lambda: fit_fingerprint(context))
    else:
        train_stage(name, context)


def copy_published(source: Path, target: Path) -> None:
    """Copies parts that later stages do not train from published weights, unless the state has its own."""
    reads = ("understanding_encoder", "latent_stem", "understanding_connector")
    parts = ["autoencoder", "bridge", *(part for part in reads if (source / part / "config.json").is_file())]
    if lost := [part for part in parts if not (source / part / "config.json").is_file()]:
        raise UserError(f"--init-from {source}: no {lost[0]}/config.json there; give a folder such as weights/mm-tiny")
    for part in parts:
        if not (target / part).exists():
            shutil.copytree(source / part, target / part)
