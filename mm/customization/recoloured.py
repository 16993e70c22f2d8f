"""Training pictures of other things in a style's colours, made of what the base draws and of the user's pictures.

A style that is learned from a few pictures alone stays with the things that these show: other things are drawn without
it, or as the things that it was learned with. Pictures of other things in its colours teach what belongs to the style.

Design choices
- The base redraws the user's pictures under their captions without the style, from almost pure noise (Meng et al. 2021,
  SDEdit, arXiv 2108.01073): the layout stays, and the colours become the base's. Each pixel then says which colour
  stands in the style for which.
- From these pairs one map of colours is fitted by least squares: a polynomial of the second degree (Finlayson et al.
  2015, "Color correction using root-polynomial regression", compare such maps). What is not a matter of colours, such
  as strokes, is learned from the user's own pictures.
- The map is tried on each picture with the others alone. One that explains less than `_EXPLAINED` of the colours is not
  used, with a warning.
- The base's own pictures come along: on them unrelated prompts are held to the base. On pictures in the style the
  adapter has to know the style without a prompt, too, since guidance compares with the empty one.
- Everything is drawn from seeds, so that a run that was stopped makes the same pictures again.

Legend: N pictures, P pixels, F terms of the polynomial, S side of the pictures.
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mm.customization.batches import hash_of
from mm.customization.data import Example, to_tensor
from mm.customization.methods.stydeco import without_style
from mm.customization.objectives.protocol import Objective
from mm.customization.objectives.sampling import redrawn
from mm.customization.previews import draw

_STRENGTH = 0.95  # of the noise from which the user's pictures are redrawn
_GUIDANCE = 3.0
_STEPS = 16
_TIMES = 2  # that each picture is redrawn
_RIDGE = 1e-4
_EXPLAINED = 0.1  # share of the variance of colours


def recoloured(
    objective: Objective, examples: Sequence[Example], *, name: str, count: int, seed: int, steps: int | None = None,
    progress: Callable[[float, str], None] = lambda share, text: None,
) -> tuple[list[Example], list[Example]]:  # fmt: skip
    """Pictures of other things in the colours of a style, and the same as the base drew them.

    Args:
        objective: of the base, without what is trained.
        examples: the user's pictures, two or more.
        name: of the style, in their captions.
        count: of pictures; none where no map of colours was found.
        seed: of things and drawings.
        steps: of sampling.
        progress: called with 0, since nothing is trained yet, and a text.
    """
    if not count or len(examples) < 2:
        return [], []
    progress(0.0, "redrawing the pictures without the style")
    words = [without_style(example.caption, name) for example in examples]
    styled_N3SS = torch.stack([to_tensor(example.picture, objective.side) for example in examples])
    plain = [_redrawn(objective, styled_N3SS, words, seed + k) for k in range(_TIMES)]
    terms_NPF = torch.cat([terms(pictures) for pictures in plain], 1)
    colours_NP3 = torch.cat([_pixels(styled_N3SS)] * _TIMES, 1)
    if explained(terms_NPF, colours_NP3) < _EXPLAINED:
        warnings.warn(
            "the colours of the style do not follow from those that the base draws, so the style is learned from the "
            "pictures alone; recoloured=0 skips this",
            stacklevel=3,
        )
        return [], []
    map_F3 = fitted_map(terms_NPF, colours_NP3)
    rng = random.Random(f"recoloured {seed}")
    made, plain_made = [], []
    for number in range(count):
        progress(0.0, f"picture {number + 1} of {count} in the style's colours")
        at = number % len(examples)
        prompt = about(words[at], objective.known_nouns(), rng)
        picture = draw(objective.pipe, prompt, side=objective.side, seed=rng.randrange(2**31), steps=steps)
        caption = renamed(examples[at].caption, words[at], prompt, name)
        path = Path(f"{examples[at].path.stem}-recoloured-{number}.png")
        plain_made.append(Example(path=path, caption=prompt, picture=picture.convert("RGB")))
        made.append(Example(path=path, caption=caption, picture=in_colours(plain_made[-1].picture, map_F3)))
    return made, plain_made


def about(words: str, nouns: Sequence[str], rng: random.Random) -> str:
    """A caption about something else: another known noun in the place of the one that it names, or that noun alone."""
    other = rng.choice([noun for noun in nouns if not re.search(rf"\b{re.escape(noun)}\b", words)] or list(nouns))
    known = f"{'an' if other[:1] in 'aeiou' else 'a'} {other}"
    for noun in sorted(nouns, key=len, reverse=True):
        found = re.search(rf"\b(?:an?|the)\s+{re.escape(noun)}\b", words)
        if found is not None:
            return f"{words[: found.start()]}{known}{words[found.end() :]}"
    return known


def renamed(caption: str, words: str, prompt: str, name: str) -> str:
    """A caption in the style whose words about the content are replaced by a prompt."""
    if not words:
        return f"{prompt}, {caption}"
    return caption.replace(words, prompt, 1) if words in caption else f"{prompt}, {name} style"


def in_colours(picture: Image.Image, map_F3: Tensor) -> Image.Image:
    """A picture with the colours that a map gives."""
    side = picture.size
    colours_P3 = (terms(to_tensor(picture, min(side))[None])[0] @ map_F3).clamp(0, 1)
    values = (colours_P3 * 255).round().to(torch.uint8).view(min(side), min(side), 3)
    return Image.fromarray(values.numpy())


def terms(pictures_N3SS: Tensor) -> Tensor:
    """Colours r, g, b in [0, 1] of pictures in [-1, 1] as (N, P, F = 10): 1, r, g, b, and their products."""
    rgb_NP3 = _pixels(pictures_N3SS)
    one, two = torch.triu_indices(3, 3)
    return torch.cat([torch.ones_like(rgb_NP3[..., :1]), rgb_NP3, rgb_NP3[..., one] * rgb_NP3[..., two]], 2)


def fitted_map(terms_NPF: Tensor, colours_NP3: Tensor) -> Tensor:
    """The map (F, 3) of least squares, with a small ridge."""
    terms_F, colours = terms_NPF.flatten(0, 1), colours_NP3.flatten(0, 1)
    ridge = _RIDGE * len(terms_F) * torch.eye(terms_F.shape[1], dtype=terms_F.dtype)
    return torch.linalg.solve(terms_F.T @ terms_F + ridge, terms_F.T @ colours)


def explained(terms_NPF: Tensor, colours_NP3: Tensor) -> float:
    """Share of the variance of each picture's colours that a map explains which was fitted to the others."""
    left = total = 0.0
    for k in range(len(terms_NPF)):
        rest = [i for i in range(len(terms_NPF)) if i != k]
        found = terms_NPF[k] @ fitted_map(terms_NPF[rest], colours_NP3[rest])
        left += float((found - colours_NP3[k]).square().mean())
        total += float((colours_NP3[k] - colours_NP3[rest].flatten(0, 1).mean(0)).square().mean())
    return 1 - left / max(total, 1e-12)


def _pixels(pictures_N3SS: Tensor) -> Tensor:
    """Colours (N, P, 3) in [0, 1], in float64."""
    return (pictures_N3SS.double().cpu() / 2 + 0.5).clamp(0, 1).flatten(2).transpose(1, 2)


@torch.no_grad()
def _redrawn(objective: Objective, styled_N3SS: Tensor, words: Sequence[str], seed: int) -> Tensor:
    """The pictures as the base draws them without the style, one at a time, in [-1, 1]."""
    made = []
    for k, (picture, prompt) in enumerate(zip(styled_N3SS, words, strict=True)):
        clean = objective.encode_pictures(picture[None].to(objective.device)).to(objective.device).float()
        generator = torch.Generator().manual_seed(hash_of(seed + 307, k))
        latents = redrawn(
            objective, clean, [prompt], strength=_STRENGTH, guidance=_GUIDANCE, steps=_STEPS, generator=generator
        )
        made.append(objective.decode_latents(latents).float().cpu())
    return torch.cat(made)
