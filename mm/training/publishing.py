"""Writes trained parts as a diffusers folder that the pipelines load."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from mm.models.text import build_text_tokenizer

_FILE = "diffusion_pytorch_model.safetensors"
_LARGEST = "12MB"  # of one file: some hosts of git repositories refuse larger ones
PUBLISHED = ("trunk", "velocity_decoder", "code_head")


def publish_drawing(module: Any, folder: Path) -> None:
    """Writes the trained parts in bf16 with their configs, for the pipeline to load."""
    for name in PUBLISHED:
        publish(getattr(module, name), folder / name)
    build_text_tokenizer().save_pretrained(folder / "text_tokenizer")


def publish(part: Any, folder: Path) -> None:
    """Writes one part in bf16 with its config."""
    # A copy, since a cast there and back would round the fp32 weights.
    copy.deepcopy(part).to(torch.bfloat16).save_pretrained(folder, max_shard_size=_LARGEST)
    # diffusers leaves the index of an earlier save in several files beside a single file, and reads it first
    single, index = folder / _FILE, folder / f"{_FILE}.index.json"
    if not any(folder.glob("*-of-*.safetensors")):
        index.unlink(missing_ok=True)
    elif index.is_file():
        single.unlink(missing_ok=True)
