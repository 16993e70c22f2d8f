"""A look at a run on its way: a grid of what the averaged weights draw, and the judge's score of it.

Design choices
- The prompts are the tuning ones, never those for reporting, with fixed seeds: looks of one run can be compared.
- The score goes into the run's own log, so that `training.md` shows the curve that matters beside the losses.
- A few prompts a task: a look takes seconds, not minutes. It is a compass, not a measurement.

This module does not know losses or the loop.
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


def judged_preview(
    module: Any, autoencoder: Autoencoder, judge: Path, out: Path, *, limit: int = LIMIT
) -> dict[str, float]:
    """Draws the first `limit` tuning prompts of each task in both modes that the module has learned.

    Writes `preview-MODE.png` (latest) into `out`; returns the overall scores as `compose` and `compose_codes`.
    """
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
        file = out / f"preview-{mode}.json"
        config = ComposeConfig(mode=mode, limit=limit, pictures=1)
        with torch.autocast(module.trunk.device.type, torch.bfloat16):
            report = evaluate_compose(pipe, Judge.from_pretrained(judge), config, prompts=COMPOSE_TUNE, json_file=file)
        scores[name] = report["overall"]
    return scores
