"""Writes trained parts as a diffusers folder that the pipelines load.

This module does not know stages or state folders.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from mm.models.text import build_text_tokenizer

PUBLISHED = ("trunk", "velocity_decoder", "code_head")


def publish_drawing(module: Any, folder: Path) -> None:
    """Writes the trained parts in bf16, each beside its config, for the pipeline to load."""
    for name in PUBLISHED:
        # A copy, since casting there and back would round the fp32 masters.
        copy.deepcopy(getattr(module, name)).to(torch.bfloat16).save_pretrained(folder / name)
    build_text_tokenizer().save_pretrained(folder / "text_tokenizer")
