"""What a loaded model can do: tasks, sizes, defaults, modes, schedulers; and requests checked against that.

Design choices
- Facts come from the family file where it states them, else from the signature of the pipeline's call.
- A request is checked once, before anything is drawn. An error names the value and what this model takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mm.core.checks import shown
from mm.core.errors import UserError
from mm.core.pictures import check_output_type
from mm.engine.requests import Describe, Draw, Edit, Request, Sampling, Turn
from mm.families.family import resolve
from mm.families.sizes import check_size

ADAPTIVE = "mm.fast.guidance:adaptive_settings"  # a `Capabilities.fast` that acts on guidance alone
TASKS = ("draw", "image_to_image", "inpaint", "edit", "describe", "converse")


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """Of one model.

    Args:
        model: its name in messages.
        tasks: of `TASKS`, those that it can do.
        modes: ways of drawing; empty where there is only one.
        steps: default steps by mode, under "" without modes; None where the pipeline's own default counts.
        guidance: default guidance scale; None where the pipeline's own default counts.
        guidance_name: the argument of the pipeline's call that classifier-free guidance goes to; None without any.
        size: default (width, height).
        multiple: width and height are multiples of this many pixels.
        fixed_size: whether only the default size, or one of `sizes`, can be drawn.
        sizes: all sizes of a model of fixed size that has several.
        size_known: whether `size` is the family's; else the pipeline's own default counts.
        largest: pixels of the largest side; 0 where that is not known.
        negative: whether a negative prompt is taken.
        negative_needs: the argument without which a negative prompt has no effect; empty where guidance suffices.
        negative_default: the negative prompt where none is given.
        best_of: whether pictures can be drawn again until the model reads in them what was asked for.
        strict: whether prompts are read by a list of words, so that others can be refused.
        apart: whether adapters can be kept apart, each in a place of its own.
        schedulers: class names that can be chosen.
        image_guidance: whether editing takes a guidance of its own for the source.
        fast: "module:function" of `Family.fast`; empty where no work can be left out.
        fast_tasks: those of `tasks` that it serves.
    """

    model: str
    tasks: tuple[str, ...]
    modes: tuple[str, ...] = ()
    steps: Mapping[str, int | None] = field(default_factory=dict)
    guidance: float | None = None
    guidance_name: str | None = "guidance_scale"
    size: tuple[int, int] = (1024, 1024)
    multiple: int = 16
    fixed_size: bool = False
    sizes: tuple[tuple[int, int], ...] = ()
    size_known: bool = True
    largest: int = 0
    negative: bool = True
    negative_needs: str = ""
    negative_default: str = ""
    best_of: bool = False
    strict: bool = False
    apart: bool = False
    schedulers: tuple[str, ...] = ()
    image_guidance: bool = False
    fast: str = ""
    fast_tasks: tuple[str, ...] = ()

    def mode(self, request: Sampling) -> str | None:
        """The mode of a request: its own, or the model's first."""
        return request.mode or (self.modes[0] if self.modes else None)

    def steps_of(self, request: Sampling) -> int | None:
        """Steps of a request: its own, those of `fast`, or the default of its mode."""
        if request.steps is not None:
            return request.steps
        own = (self.fast_of(request) or {}).get("steps")
        return own if own is not None else self.steps.get(self.mode(request) or "")

    def guidance_of(self, request: Sampling) -> float | None:
        """Guidance of a request: its own, or the model's default."""
        return self.guidance if request.guidance is None else float(request.guidance)

    def fast_of(self, request: Sampling) -> dict[str, Any] | None:
        """Settings by which a request leaves out work; None where it does all.

        Raises:
            UserError: where the model cannot, or has no such settings.
        """
        if request.fast is False:
            return None
        self._check_fast(request)
        given = {} if isinstance(request.fast, bool) else dict(request.fast)
        return resolve(self.fast)(self.mode(request), given)

    def tries_of(self, request: Sampling) -> int:
        """The most times that a picture of a request is drawn: `best_of`, or those of `fast`."""
        return request.best_of if request.best_of > 1 else (self.fast_of(request) or {}).get("tries", 1)

    def check(self, request: Request) -> None:
        """Raises UserError for what this model cannot do, naming the value and the allowed ones."""
        self._has(task_of(request))
        if isinstance(request, Sampling):
            self._check_sampling(request)
        if isinstance(request, Draw | Edit):
            if request.negative:
                self._check_negative(request)
            self._check_size(request)
        if isinstance(request, Draw) and request.apart is not False:
            self._check_apart(request)
        if isinstance(request, Edit) and request.image_guidance is not None and not self.image_guidance:
            raise UserError(f"{self.model} has no image guidance (given: {request.image_guidance:g}); leave it out")

    def _check_apart(self, request: Draw) -> None:
        if not self.apart:
            raise UserError(
                f"{self.model} cannot keep adapters apart; docs/customization.md lists the models that can; leave "
                "apart out"
            )
        if self.mode(request) not in (None, *self.modes[:1]):
            raise UserError(
                f"mode is {shown(request.mode)}; {self.model} keeps adapters apart in the mode {self.modes[0]} only"
            )
        from mm.customization.apart import check_options  # with torch, which capabilities need for nothing else

        check_options(self.modes, request.options)

    def _has(self, task: str) -> None:
        if task not in self.tasks:
            can = ", ".join(name.replace("_", " ") for name in self.tasks)
            raise UserError(f"{self.model} cannot {VERBS[task]}; it can: {can}")

    def _check_options(self, request: Sampling) -> None:
        """Options must be such as pipelines take, and must not contradict the request's own fields."""
        check_output_type(request.options)
        names = _FIELDS | ({self.guidance_name: "guidance"} if self.guidance_name else {})
        for name in request.options:
            field = names.get(name, "")
            if name in _ALWAYS or getattr(request, field, None) not in (None, _UNSET.get(field)):
                field = "instruction" if isinstance(request, Edit) and field == "prompt" else field
                raise UserError(
                    f"options hold {name} = {shown(request.options[name])}, which the request's {field} decides; "
                    f"give it as {field} and leave it out of the options (--set)"
                )

    def _check_sampling(self, request: Sampling) -> None:
        self._check_options(request)
        if request.mode is not None and request.mode not in self.modes:
            known = f"the modes {', '.join(self.modes)}" if self.modes else "no modes; leave it out"
            raise UserError(f"mode is {shown(request.mode)}; {self.model} has {known}")
        if request.guidance is not None and self.guidance_name is None:
            raise UserError(f"guidance is {request.guidance:g}; {self.model} has none; leave it out")
        self.fast_of(request)
        if request.best_of > 1 and not self.best_of:
            raise UserError(f"best_of is {request.best_of}; {self.model} does not read what it drew; leave it out")
        if request.strict is not None and not self.strict:
            raise UserError(
                f"strict is {request.strict}; {self.model} has no list of words that it knows; leave it out"
            )
        if request.scheduler is not None and request.scheduler not in self.schedulers:
            known = ", ".join(self.schedulers) or "only its own"
            raise UserError(f"scheduler is {shown(request.scheduler)}; {self.model} takes {known}")

    def _check_fast(self, request: Sampling) -> None:
        if not self.fast:
            raise UserError(
                f"fast leaves out predictions that no longer matter, and {self.model} makes none that mm could leave "
                "out; leave fast out"
            )
        task = task_of(request)
        if task not in self.fast_tasks:
            served = ", ".join(name.replace("_", " ") for name in self.fast_tasks)
            raise UserError(f"{self.model} is fast in these tasks only: {served}; leave fast out")
        if self.negative_needs and self.negative_needs not in request.options:
            raise UserError(
                f"fast leaves out guidance that no longer matters, and that of {self.model} is distilled into the "
                f"model; leave fast out, or give {self.negative_needs} and a negative prompt as well"
            )
        guidance = self.guidance_of(request)
        if self.fast == ADAPTIVE and guidance is not None and guidance <= 1 and not self.negative_needs:
            raise UserError(f"fast leaves out guidance, and guidance is {guidance:g} (off); leave fast out")

    def _check_negative(self, request: Draw | Edit) -> None:
        said = f"(given: {shown(request.negative)})"
        if not self.negative:
            raise UserError(f"{self.model} takes no negative prompt {said}; leave it out")
        if self.negative_needs and self.negative_needs not in request.options:
            name = self.negative_needs
            raise UserError(
                f"a negative prompt {said} has no effect on {self.model}, whose guidance is distilled; leave it out, "
                f"or give {name} above 1 as well (--set {name}=4), which takes twice as long"
            )
        if not self.negative_needs and request.guidance is not None and request.guidance <= 1:
            raise UserError(
                f"a negative prompt {said} acts only with guidance above 1, and guidance is {request.guidance:g}; "
                "raise it, or leave the negative prompt out"
            )

    def _check_size(self, request: Draw | Edit) -> None:
        if request.size is not None:
            check_size(
                request.size,
                model=self.model,
                own=self.size,
                multiple=self.multiple,
                fixed=self.fixed_size,
                sizes=self.sizes,
            )


# Fields of a request by the names under which diffusers' pipelines take them.
_FIELDS = {
    "prompt": "prompt", "generator": "seed", "num_images_per_prompt": "count", "negative_prompt": "negative",
    "num_inference_steps": "steps", "mode": "mode", "strict": "strict", "fast": "fast", "strength": "strength",
    "best_of": "best_of", "height": "size", "width": "size", "image": "image", "mask_image": "mask",
    "image_guidance_scale": "image_guidance",
}  # fmt: skip
_ALWAYS = ("prompt", "generator", "num_images_per_prompt")  # a request always decides these
_UNSET = {"best_of": 1, "fast": False}  # values of fields that decide nothing

VERBS = {
    "draw": "draw from a prompt alone",
    "image_to_image": "draw from a picture",
    "inpaint": "fill in a part of a picture",
    "edit": "edit by an instruction",
    "describe": "read pictures",
    "converse": "converse",
}


def task_of(request: Request | Sampling) -> str:
    """The task that a request is for."""
    if isinstance(request, Draw):
        return "inpaint" if request.mask is not None else "image_to_image" if request.image is not None else "draw"
    return {Edit: "edit", Describe: "describe", Turn: "converse"}[type(request)]
