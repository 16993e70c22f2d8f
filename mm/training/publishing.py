"""Writes trained parts as a diffusers folder that the pipelines load."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from mm.models.text import build_text_tokenizer

PUBLISHED = ("trunk", "velocity_decoder", "code_head")


def publish_drawing(module: Any, folder: Path) -> None:
    """Writes the trained parts in bf16 with their configs, for the pipeline to load."""
    for name in PUBLISHED:
        publish(getattr(module, name), folder / name)
    build_text_tokenizer().save_pretrained(folder / "text_tokenizer")


def publish(part: Any, folder: Path) -> None:
    """Writes one part in bf16 with its config."""
    # A copy, since a cast there and back would round the fp32 weights.
    copy.deepcopy(part).to(torch.bfloat16).save_pretrained(folder)
