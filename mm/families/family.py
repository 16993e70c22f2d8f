"""What mm has to know of one family of models, as data.

Design choices
- Classes are named, never imported: diffusers' and transformers' by class name, others as "module:Class". A family
  therefore costs nothing to read, and the general half of mm imports none of the code that a family stands for.
- What only code can say (captions of one's own grammar, a score of drawn pictures) is a dotted name, "module:function",
  imported when it is called.
- Families that share a denoiser class differ in the pipeline's class, or in values of the denoiser's config.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mm.core.checks import texts
from mm.core.errors import UserError
from mm.layers.sites import Rule

Rules = tuple[Rule, ...]
Task = Literal[
    "text_to_image", "image_to_image", "inpaint", "edit", "control", "layers", "text_to_video", "image_to_video",
    "video_to_video", "prior", "refine", "conversation", "understanding",
]  # fmt: skip


def resolve(name: str) -> Any:
    """The object that "module:name" stands for.

    Raises:
        UserError: where the name has no colon.
    """
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise UserError(f"{name!r} names nothing to import; write module:name")
    return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True, kw_only=True)
class SizeRule:
    """Sizes of pictures in pixels: the default, the divisor of each side, and the largest side."""

    default: int = 1024
    multiple: int = 16
    maximum: int = 2048

    def __post_init__(self) -> None:
        if not 1 <= self.multiple <= self.default <= self.maximum:
            raise UserError(
                f"sizes: multiple {self.multiple}, default {self.default} and maximum {self.maximum} must be positive "
                "and rise in this order"
            )
        if self.default % self.multiple:
            raise UserError(f"the default size {self.default} is no multiple of {self.multiple}")

    @property
    def fixed(self) -> bool:
        """Whether there is one size alone."""
        return self.multiple == self.maximum

    def nearest(self, pixels: int) -> int:
        """The allowed side that is nearest to `pixels`."""
        return min(self.maximum // self.multiple, max(1, round(pixels / self.multiple))) * self.multiple


@dataclass(frozen=True, kw_only=True)
class LoraNames:
    """How programs name the components of this family in LoRA files.

    `components`: a prefix of dotted names -> the pipeline's component ("unet" -> "unet"). `kohya`: a prefix of
    flattened names -> the component ("lora_te2_" -> "text_encoder_2"). `converter`: diffusers' loader class whose
    `lora_state_dict` converts other layouts, by class name.
    """

    components: Mapping[str, str] = field(default_factory=dict)
    kohya: Mapping[str, str] = field(default_factory=dict)
    converter: str | None = None

    @property
    def text(self) -> tuple[str, ...]:
        """Components that are text encoders."""
        found = [*self.components.values(), *self.kohya.values()]
        return tuple(dict.fromkeys(name for name in found if name.startswith("text_encoder")))


@dataclass(frozen=True, kw_only=True)
class LatentPreview:
    """A linear map from latents to RGB: x (..., C) @ factors (C, 3) + bias (3), in [-1, 1].

    Latents are those that the denoiser sees, scaled and shifted. `source`: where the numbers come from.
    """

    factors: tuple[tuple[float, float, float], ...]
    bias: tuple[float, float, float] = (0.0, 0.0, 0.0)
    source: str

    def __post_init__(self) -> None:
        if not self.factors or any(len(row) != 3 for row in self.factors) or len(self.bias) != 3:
            raise UserError("a latent preview has three factors a channel and three numbers as bias")
        if not self.source:
            raise UserError("a latent preview says where its factors come from")


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models.

    Attributes:
        name: in lower case, for example "flux-kontext".
        pipelines: a task -> the pipeline's class name, or "module:Class" for classes outside diffusers.
        more_pipelines: class names of further pipelines of the family.
        denoisers: class names of the modules that draw (transformer, UNet) -> their site rules.
        text_encoders: class names of the text encoders -> their site rules.
        config: values of the denoiser's config that distinguish this family from others of the same denoiser class.
        model_types: `model_type` values of transformers' configs, where a family is no diffusers pipeline.
        steps: sampling steps where nothing is said, a number or one a mode.
        guidance: guidance scale where nothing is said. None: the family has no guidance argument.
        guidance_name: the pipeline's argument for it.
        negative_prompt: where nothing is said.
        top_k: codes that sampling keeps where nothing is said, for models that draw in codes; 0 = all.
        size: of pictures; None where the model decides.
        modes: ways of drawing that the pipeline's `mode` argument names.
        prompts: for calibration: a tuple, or "module:function" called with (count, seed).
        preview: latents to RGB; None where no map is known, and `no_preview` says why.
        text_sites: patterns over the denoiser's module paths: linear layers that see text features.
        edit_sites: patterns over the denoiser's module paths: linear layers where concepts are edited.
        lora: names in LoRA files.
        contexts: "module:Class" that gives prompts for erasing concepts (`mm.erasure.concepts.Contexts`); None takes
            templates of plain English.
        objective: "module:Class" that says how the family's denoiser is trained
            (`mm.customization.objectives.protocol.Objective`); None: the pipeline's call is watched, where it suits
            (`mm.customization.objectives.watched`).
        score: "module:function" called with (pipe, limit), which gives a list of booleans, one a picture; or None.
        fast: "module:function" called with (mode, settings): all settings of less work a picture, the measured mix
            where none are given. Empty: those of Adaptive Guidance, for pipelines of diffusers (`mm.fast`).
        mixed: whether prompts of different lengths can share a call without changing; not where nothing hides padding.
        dtype: "float32" for models that are small enough not to be loaded in 16 bits.
    """

    name: str
    pipelines: Mapping[str, str]
    more_pipelines: tuple[str, ...] = ()
    denoisers: Mapping[str, Rules] = field(default_factory=dict)
    text_encoders: Mapping[str, Rules] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    model_types: tuple[str, ...] = ()
    steps: int | Mapping[str, int] = 50
    guidance: float | None = None
    guidance_name: str = "guidance_scale"
    negative_prompt: str = ""
    top_k: int = 0
    size: SizeRule | None = None
    modes: tuple[str, ...] = ()
    prompts: tuple[str, ...] | str = "mm.families.prompts:general"
    preview: LatentPreview | None = None
    no_preview: str = ""
    text_sites: tuple[str, ...] = ()
    edit_sites: tuple[str, ...] = ()
    lora: LoraNames = LoraNames()
    contexts: str | None = None
    objective: str | None = None
    score: str | None = None
    fast: str = ""
    mixed: bool = True
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("more_pipelines", "model_types", "modes", "text_sites", "edit_sites"):
            object.__setattr__(self, name, texts(name, getattr(self, name)))
        if not self.name or self.name != self.name.lower() or " " in self.name:
            raise UserError(f"the family's name {self.name!r} must be in lower case and without blanks")
        if not self.pipelines and not self.denoisers:
            raise UserError(f"the family {self.name} names neither a pipeline nor a denoiser")
        if isinstance(self.steps, Mapping) and set(self.steps) != set(self.modes):
            raise UserError(f"the family {self.name} has steps for {list(self.steps)}, and modes {list(self.modes)}")
        if (self.preview is None) == (not self.no_preview):
            raise UserError(f"the family {self.name} needs either a latent preview or `no_preview`, a reason")

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of all pipeline classes, without their modules."""
        return tuple(name.rpartition(":")[2] for name in (*self.pipelines.values(), *self.more_pipelines))

    def steps_for(self, mode: str | None = None, steps: int | None = None) -> int:
        """`steps`, or what the mode takes by itself; an unknown mode counts as the first."""
        if steps is not None:
            return steps
        if isinstance(self.steps, int):
            return self.steps
        return self.steps.get(mode or self.modes[0], self.steps[self.modes[0]])

    def calibration_prompts(self, count: int, seed: int = 0) -> list[str]:
        """`count` prompts, or as many as there are."""
        if isinstance(self.prompts, tuple):
            return list(self.prompts[:count])
        made: Callable[[int, int], list[str]] = resolve(self.prompts)
        return made(count, seed)
