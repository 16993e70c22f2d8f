"""Previews of a run: a grid of pictures drawn with the averaged weights, and the judge's score of them.

Design choices
- The prompts are the tuning ones, never those for reporting, with fixed seeds, so that previews of a run can be
  compared.
- The score goes into the run's log, so that `training.md` shows it beside the losses.
- A few prompts a task: a preview takes seconds. It is an indication, not a measurement.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from mm.core.paths import weights_dir
from mm.evaluation.compose import ComposeConfig, evaluate_compose
from mm.evaluation.prompts import COMPOSE_TUNE
from mm.models.text import build_text_tokenizer
from mm.pipelines.text_to_image import TextToImagePipeline
from mm.tokenizers import Autoencoder
from mm.world.judge import Judge

LIMIT = 4  # prompts of each task


def find_judge(state: Path) -> Path | None:
    """The run's own judge, or the embedded one; None where neither is there yet."""
    for folder in (state / "judge", weights_dir() / "judge"):
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            return folder
    return None


def judged_preview(trainer: Any, autoencoder: Autoencoder, state: Path, *, limit: int = LIMIT) -> dict[str, float]:
    """Draws the first `limit` tuning prompts of each task in the modes that the trainer's module learns.

    Writes `preview-MODE.png` into the trainer's folder, replacing older ones.

    Returns:
        The overall scores as `compose` and `compose_codes`; nothing where there is no judge.
    """
    judge = find_judge(state)
    if judge is None:
        return {}
    module = trainer.bare
    parts = {name: copy.deepcopy(getattr(module, name)).eval() for name in ("trunk", "velocity_decoder", "code_head")}
    pipe = TextToImagePipeline(
        **parts,
        bridge=module.bridge,
        autoencoder=autoencoder.to(module.trunk.device),
        text_tokenizer=build_text_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    modes = {"flow": "compose"} | ({"codes": "compose_codes"} if module.config.codes_share > 0 else {})
    scores = {}
    for mode, name in modes.items():
        file = trainer.out / f"preview-{mode}.json"
        config = ComposeConfig(mode=mode, limit=limit, pictures=1)
        with torch.autocast(module.trunk.device.type, torch.bfloat16):
            report = evaluate_compose(pipe, Judge.from_pretrained(judge), config, prompts=COMPOSE_TUNE, json_file=file)
        scores[name] = report["overall"]
    return scores
