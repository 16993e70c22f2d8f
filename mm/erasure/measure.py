"""Draws prompts and has a judge name what the pictures show.

Design choices
- A judge is any callable from pictures to labels. None for a picture means that it cannot be read.
- A picture's seed depends on the run's seed, its prompt and its index alone. Before and after a patch the same seeds
  are drawn, so that changes are paired.
- What the unchanged model drew can be kept and used for the next patch on it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from mm.families import family_of
from mm.families.frames import one_frame, pictures_of
from mm.families.wording import as_written

Labels = frozenset[str] | None
Judge = Callable[[Sequence[Image.Image]], Sequence[Labels]]
Progress = Callable[[float, str], None]


def seed_of(seed: int, prompt: str, index: int = 0) -> int:
    """The seed of one picture of a prompt."""
    digest = hashlib.blake2s(f"{seed} {prompt} {index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


@dataclass(kw_only=True)
class Measurer:
    """Draws with a pipeline and judges.

    Args:
        pipe: any pipeline that draws from text.
        judge: gives the labels of pictures.
        seed: of the run.
        batch_size: prompts a call.
        call: further arguments of the pipeline, such as steps, guidance and mode.
        kept: labels by prompt of the model in one state, filled and read by `labels(..., base=True)`: of the unchanged
            model, or in `mm.erasure.certify.certify`'s attacks of the patched one.
    """

    pipe: Any
    judge: Judge
    seed: int = 0
    batch_size: int = 16
    call: Mapping[str, Any] = field(default_factory=dict)
    kept: dict[str, Labels] = field(default_factory=dict)
    progress: Callable[[int, str], None] = lambda count, text: None

    def on(self, pipe: Any) -> Measurer:
        """The same measurement of another pipeline, with nothing kept."""
        return dataclasses.replace(self, pipe=pipe, kept={})

    def draw(self, prompts: Sequence[str], *, index: int = 0, **more: Any) -> list[Image.Image]:
        """One picture a prompt."""
        made: list[Image.Image] = []
        for start in range(0, len(prompts), self.batch_size):
            part = list(prompts[start : start + self.batch_size])
            seeds = [torch.Generator().manual_seed(seed_of(self.seed, p, index)) for p in part]
            made += draw(self.pipe, part, seeds, **{**self.call, **more})
            self.progress(len(part), "drawing")
        return made

    def labels(self, prompts: Sequence[str], *, base: bool = False) -> list[Labels]:
        """What the pictures of prompts show; with `base` pictures that were judged before are not drawn again."""
        new = list(dict.fromkeys(p for p in prompts if not base or p not in self.kept))
        found = dict(zip(new, self.judge(self.draw(new)) if new else (), strict=True))
        if base:
            self.kept |= found
            return [self.kept[p] for p in prompts]
        return [found[p] for p in prompts]


def draw(pipe: Any, prompts: Sequence[str], seeds: Sequence[torch.Generator], **call: Any) -> list[Image.Image]:
    """One PIL picture a prompt, with the family's steps and guidance where none are given."""
    takes = inspect.signature(type(pipe).__call__).parameters
    family = family_of(pipe)
    given: dict[str, Any] = {"prompt": list(prompts), "generator": list(seeds), "output_type": "pil"}
    given |= as_written(takes) | one_frame(takes)
    if family is not None:
        given["num_inference_steps"] = family.steps_for(call.get("mode"))
        if family.guidance is not None:
            given[family.guidance_name] = family.guidance
    given |= {key: value for key, value in call.items() if value is not None}
    quiet = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the words: the prompts are not the user's
            return list(pictures_of(pipe(**{key: value for key, value in given.items() if key in takes})))
    finally:
        pipe.set_progress_bar_config(**quiet)
