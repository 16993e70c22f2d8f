"""StyDeco: a style learned from pairs that the frozen base makes, with a word whose meaning is apart from the content.

Source: Yang et al. 2025, arXiv 2508.01215. Its two parts, as they are here:

- Prior-guided data distillation. The frozen model makes the missing half of each pair. The paper stylizes plain
  pictures; a user of `mm.customize` brings pictures in the style instead, so that the base redraws each of them without
  it. The adapter then learns both directions: noised plain pictures under the style's caption give the picture in the
  style, and noised pictures in the style under the plain caption give the plain one.
- Contrastive semantic decoupling. Text features of captions with the style and of those without are to form two
  clusters. The paper's formula could not be read here; this is the contrast with the two classes' means (Li et al.
  2020, arXiv 2005.04966).

The paper's adversarial and cycle losses, which belong to its one-step translator of pictures, are left out.

Legend: B pictures of a step, N pictures, C channels, H x W latents, D width of text features.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.core.errors import UserError
from mm.customization.batches import encode, hash_of
from mm.customization.captions import pattern_of
from mm.customization.methods.dreambooth import DreamBooth, branches_and_word
from mm.customization.methods.protocol import Job, Learner
from mm.customization.objectives.sampling import redrawn, split

_STEPS = 16  # levels of redrawing, over the whole range
_TOGETHER = 8  # pictures that are redrawn at once


@dataclass(kw_only=True)
class _Learner(Learner):
    styled: Tensor  # (N, C, H, W), the user's pictures
    plain: Tensor  # the same shape, as the base redraws them without the style
    words: Sequence[str]  # the captions without the style
    chosen: Sequence[int] = field(default_factory=tuple)
    number: int = 0  # of the step

    def before_step(self, chosen: Sequence[int]) -> None:
        self.chosen = chosen

    def extra_loss(self) -> Tensor:
        s = self.job.settings
        return s["pair_weight"] * self._paired() + s["apart_weight"] * self._apart()

    def _paired(self) -> Tensor:
        """One direction a step, in turn: the error of the clean latents, which is bounded at every level."""
        objective, device = self.job.objective, self.job.objective.device
        generator = torch.Generator().manual_seed(hash_of(self.job.seed + 211, self.number))
        index = torch.tensor(list(self.chosen))
        level_B = objective.levels(len(index), generator).to(device)
        noise = torch.randn(self.styled[index].shape, generator=generator).to(device)
        ends = (self.plain[index].to(device), self.styled[index].to(device))
        captions = (self.captions(self.chosen), [self.words[i] for i in self.chosen])
        back = self.number % 2
        noisy = objective.noised(ends[back], noise, level_B)
        given = objective.predict(noisy, level_B, objective.conditions(captions[back]))
        clean, _ = split(objective, noisy, level_B, given)
        return F.mse_loss(clean, ends[1 - back])

    def _apart(self) -> Tensor:
        objective = self.job.objective
        style_BD = objective.text_features(self.captions(self.chosen))
        plain_BD = objective.text_features([self.words[i] for i in self.chosen])
        return decoupling(style_BD, plain_BD, self.job.settings["temperature"])

    def after_step(self, number: int) -> None:
        self.number = number + 1

    def kept(self) -> dict[str, Tensor]:
        return {"number": torch.tensor([float(self.number)])}

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        self.number = int(kept["number"])


def decoupling(one_BD: Tensor, other_BD: Tensor, temperature: float) -> Tensor:
    """The contrast of two classes of features with their means: low where each is near its own mean alone.

    Args:
        one_BD: features of the first class.
        other_BD: of the second.
        temperature: divides cosines.

    Returns:
        The mean over all features of -log softmax of the cosine with the mean of their own class, the means without
        gradients.
    """
    both = [F.normalize(features, dim=-1) for features in (one_BD, other_BD)]
    means_2D = F.normalize(torch.stack([features.detach().mean(0) for features in both]), dim=-1)
    logits = torch.cat(both) @ means_2D.T / temperature
    classes = torch.cat([torch.full((len(features),), k, device=logits.device) for k, features in enumerate(both)])
    return F.cross_entropy(logits, classes)


def without_style(caption: str, name: str) -> str:
    """A caption without what names the style: "a cat, <ink> style" and "a cat in the style of <ink>" give "a cat"."""
    word = pattern_of(name).pattern
    forms = (rf"[,;]?\s*(?:in|with)\s+(?:the\s+)?style\s+of\s+{word}", rf"[,;]?\s*(?:in\s+)?{word}(?:\s+style)?")
    for form in forms:
        caption = re.sub(form, "", caption, flags=re.IGNORECASE)
    return re.sub(r"\s+", " ", caption).strip(" ,;")


class StyDeco:
    """DreamBooth-LoRA and a word, with pairs of the base's making, for styles alone."""

    name = "stydeco"
    defaults: Mapping[str, Any] = {
        **DreamBooth.defaults, "pair_weight": 0.5, "apart_weight": 0.1, "temperature": 0.1, "redraw": 0.7,
        "guidance": 3.0,
    }  # fmt: skip

    def begin(self, job: Job) -> Learner:
        """Redraws the pictures without the style, then puts branches and the word onto the model."""
        _check(job)
        words = [without_style(example.caption, job.name) for example in job.examples]
        styled, _ = encode(job.objective, job.examples)
        generator = torch.Generator().manual_seed(hash_of(job.seed + 211, 2**32))
        plain = [
            redrawn(
                job.objective, styled[k : k + _TOGETHER].to(job.objective.device), words[k : k + _TOGETHER],
                strength=job.settings["redraw"], guidance=job.settings["guidance"], steps=_STEPS,
                generator=generator,
            ).cpu()
            for k in range(0, len(words), _TOGETHER)
        ]  # fmt: skip
        pieces = branches_and_word(job, always=True)
        return _Learner(job=job, pieces=pieces, styled=styled, plain=torch.cat(plain), words=words)


def _check(job: Job) -> None:
    """Raises UserError for another kind, and for settings out of range."""
    if job.kind != "style":
        raise UserError(f"stydeco learns styles, and the kind is {job.kind!r}; give kind='style' (--kind style)")
    s = job.settings
    if not 0 < s["redraw"] <= 1:
        raise UserError(f"redraw is {s['redraw']}; give a number above 0, at most 1")
    for name in ("pair_weight", "apart_weight", "guidance"):
        if not 0 <= s[name] < float("inf"):
            raise UserError(f"{name} is {s[name]}; give 0 or more")
    if not 0 < s["temperature"] < float("inf"):
        raise UserError(f"temperature is {s['temperature']}; give a number above 0")
