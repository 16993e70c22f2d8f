"""What a run of `mm.customize` learns from: the user's pictures, those made of them, and prompts that stay.

Design choices
- Pictures of a slider without a folder are drawn by the base.
- Further pictures depend on the kind: of subjects beside known things, of other things in a style's colours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm.customization.captions import renamed
from mm.customization.checks import check_names_read, warn_of_captions, warn_of_long, warn_of_small
from mm.customization.companions import companions
from mm.customization.config import TrainingConfig
from mm.customization.data import Example, Kind, read_folder, read_regularization
from mm.customization.objectives.protocol import Objective
from mm.customization.previews import draw
from mm.customization.recoloured import recoloured
from mm.customization.sliders import SliderPrompts
from mm.families import family_of

PRESERVED = 48  # unrelated prompts that are held to the base
OnProgress = Callable[[float, str], None]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What a run learns from.

    Attributes:
        own: the user's.
        beside: made of the user's and of what the base draws.
        plain: that the base drew, on which prompts are held.
        of_class: regularization pictures.
    """

    own: Sequence[Example]
    beside: Sequence[Example]
    plain: Sequence[Example]
    of_class: Sequence[Example] | None


def gathered(
    objective: Objective, folder: str | Path | None, name: str, kind: Kind, noun: str, prompts: SliderPrompts | None,
    regularization: str | Path | None, config: TrainingConfig, steps: int | None, progress: OnProgress,
) -> Pictures:  # fmt: skip
    """Reads the user's pictures, and makes further ones."""
    of_class = None if regularization is None else read_regularization(regularization, noun=noun, name=name)
    own = _examples(objective, folder, name, kind, noun, prompts, config, steps, progress)
    warn_of_captions(objective, name, [one.caption for one in (*own, *(of_class or ()))])
    check_names_read(objective, name, [one.caption for one in own])
    warn_of_long(objective, [one.caption for one in (*own, *(of_class or ()))])
    warn_of_small(own, objective.side)
    beside, plain = _companions(objective, own, name, noun, kind, config, steps, progress)
    return Pictures(own=own, beside=beside, plain=plain, of_class=of_class)


def _examples(
    objective: Objective, folder: str | Path | None, name: str, kind: Kind, noun: str, prompts: SliderPrompts | None,
    config: TrainingConfig, steps: int | None, progress: OnProgress,
) -> list[Example]:  # fmt: skip
    """The pictures of the folder; of a slider without one, pictures that the base draws of its neutral prompts."""
    if folder is not None:
        return read_folder(folder, name=name, kind=kind, noun=noun)
    assert prompts is not None
    words = [triple[0] for triple in prompts.triples()]
    count = max(config.slider_pictures, len(words))
    examples = []
    for k in range(count):
        progress(0.0, f"picture {k + 1} of {count}")
        caption = words[k % len(words)]
        picture = draw(objective.pipe, caption, side=objective.side, seed=config.seed + k, steps=steps)
        examples.append(Example(path=Path(f"{k}.png"), caption=caption, picture=picture.convert("RGB")))
    return examples


def _companions(
    objective: Objective, examples: Sequence[Example], name: str, noun: str, kind: Kind, config: TrainingConfig,
    steps: int | None, progress: OnProgress,
) -> tuple[list[Example], list[Example]]:  # fmt: skip
    """Further training pictures, made of the user's and of what the base draws, and pictures to hold prompts on."""
    given: dict[str, Any] = {"name": name, "seed": config.seed, "steps": steps, "progress": progress}
    if kind == "subject":
        return companions(objective, examples, noun=noun, count=config.companions, **given), []
    if kind == "style":
        return recoloured(objective, examples, count=config.recoloured, **given)
    return [], []


def preserved_prompts(
    objective: Objective, examples: Sequence[Example], name: str, noun: str, kind: str, given: Sequence[str] | None
) -> list[str]:  # fmt: skip
    """Prompts whose pictures stay: those given, or the family's own and those of the subject's class."""
    if given is not None:
        return list(given)
    if kind == "edit":
        return objective.kept_instructions(PRESERVED)
    if kind == "slider":
        # A slider acts on every prompt of its kind; guidance compares with the empty one, which stays as it is.
        return [""]
    family = family_of(objective.pipe)
    own = family.calibration_prompts(PRESERVED) if family is not None else []
    classes = [re.sub(r"\s+", " ", renamed(renamed(e.caption, f"{name} {noun}", noun), name, noun)) for e in examples]
    return list(dict.fromkeys([*own, *(classes if noun else [])]))
