"""The settings of a drawn picture: what is kept in its PNG, and by which it can be drawn again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from mm.core.errors import UserError
from mm.engine.capabilities import Capabilities
from mm.engine.foreign_pictures import fitting_seed, left_out
from mm.engine.prompts import LORA_TAG
from mm.engine.requests import MAX_BATCH, Draw, Edit, Turn

# Samplers of A1111, ComfyUI and others -> diffusers' class, and further settings of its config.
_SAMPLERS: Mapping[str, str] = {
    "euler": "EulerDiscreteScheduler",
    "euler a": "EulerAncestralDiscreteScheduler",
    "euler ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "plms": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
    "uni pc": "UniPCMultistepScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm 2": "KDPM2DiscreteScheduler",
    "dpm2 a": "KDPM2AncestralDiscreteScheduler",
    "dpm 2 ancestral": "KDPM2AncestralDiscreteScheduler",
    "dpm++ 2m": "DPMSolverMultistepScheduler",
    "dpmpp 2m": "DPMSolverMultistepScheduler",
    "dpm++ sde": "DPMSolverSDEScheduler",
    "dpmpp sde": "DPMSolverSDEScheduler",
    "dpm++ 2s a": "DPMSolverSinglestepScheduler",
    "dpmpp 2s": "DPMSolverSinglestepScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
}


def settings_of(request: Draw | Edit | Turn, can: Capabilities, model: str, seed: int, image: Any) -> dict[str, Any]:
    """Settings under the names that every command and the web app write and read; what is not set is left out."""
    prompt = {Draw: "prompt", Edit: "instruction", Turn: "words"}[type(request)]
    best_of = getattr(request, "best_of", 1)
    settings = {
        "prompt": getattr(request, prompt),
        "negative_prompt": getattr(request, "negative", None),
        "seed": seed,
        "steps": can.steps_of(request),
        "mode": can.mode(request),
        "guidance": can.guidance_of(request),
        "image_guidance": getattr(request, "image_guidance", None),
        "strength": getattr(request, "strength", None),
        "scheduler": request.scheduler,
        "best_of": best_of if best_of > 1 else None,
        "apart": _apart_of(request),
        "refine": _refine_of(request),
        "fast": can.fast_of(request),
        "strict": request.strict,
        "options": _writable(request.options) or None,
        "model": model,
    }
    if isinstance(image, Image.Image):
        settings |= {"width": image.width, "height": image.height}
    return {key: value for key, value in settings.items() if value is not None}


def batch_of(requests: Sequence[Draw | Edit]) -> int:
    """Pictures of a call that can be repeated from any one of them: one prompt, seeds in a row; 0 for another call.

    The last bits of a picture depend on how many were drawn with it, so that its settings hold that number.
    """
    first = requests[0]
    same = [replace(first, seed=(first.seed or 0) + k) for k in range(len(requests))]
    return len(requests) if list(requests) == same else 0


def _apart_of(request: Draw | Edit | Turn) -> bool | dict[str, str] | None:
    """`Draw.apart` as JSON holds it; None where adapters act together."""
    apart = getattr(request, "apart", False)
    return dict(apart) if isinstance(apart, Mapping) else apart or None


def _refine_of(request: Draw | Edit | Turn) -> float | None:
    """The share of the noise from which subjects are drawn again; None where they are not drawn apart."""
    if _apart_of(request) is None or not isinstance(request, Draw):
        return None
    from mm.customization.apart import REFINE  # with torch, which settings need for nothing else

    return REFINE if request.refine is None else request.refine


def _writable(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that JSON can hold; tensors and callbacks cannot be read back from a file."""
    kept = {}
    for key, value in options.items():
        try:
            kept[key] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            continue
    return kept


@dataclass(frozen=True, kw_only=True)
class Again:
    """How a picture is drawn again.

    Args:
        request: that draws it.
        notes: what of its settings this model does not have, or another program's words for it leave open.
        keep: which of the request's pictures it is; None: all of them are wanted.
    """

    request: Draw
    notes: tuple[str, ...] = ()
    keep: int | None = None


def request_of(settings: dict[str, Any], can: Capabilities, **changes: Any) -> Draw:
    """The request that draws a picture with these settings again; see `drawn_again`."""
    return drawn_again(settings, can, **changes).request


def drawn_again(settings: dict[str, Any], can: Capabilities, **changes: Any) -> Again:
    """The request that draws a picture with these settings again.

    Args:
        settings: as `mm.core.png_settings.read_settings` gives them, of mm or of another program.
        can: of the model that draws now; settings that it does not have are left out and named in the notes.
        changes: fields of `Draw` that replace those of the settings.

    Raises:
        UserError: where the settings hold no prompt, a value that is not allowed, or need a picture to start from.
    """
    if not isinstance(settings.get("prompt"), str):
        raise UserError("the picture's settings hold no prompt, so it cannot be drawn again")
    if settings.get("strength") is not None and changes.get("image") is None:
        source = settings.get("source")
        raise UserError(
            f"the picture was drawn from another one{f' ({source})' if source else ''}; give it with --image"
        )
    notes: list[str] = []
    prompt, tags = without_lora_tags(settings["prompt"])
    notes += [
        f"the picture was drawn with the LoRA {name} at {scale}; give --lora FILE:{scale}" for name, scale in tags
    ]
    given: dict[str, Any] = {"prompt": prompt}
    same = {"negative_prompt": "negative", "seed": "seed", "steps": "steps", "guidance": "guidance"}
    same |= {"strength": "strength", "options": "options", "best_of": "best_of", "fast": "fast"}
    same |= {"strict": "strict", "apart": "apart"}
    given |= {field: settings[key] for key, field in same.items() if settings.get(key) is not None}
    if given.get("apart", False) is not False:  # files of before there was `refine` do not hold it
        given["refine"] = settings.get("refine", 0)
    if "seed" in given and "seed" not in changes:
        given["seed"] = fitting_seed(given["seed"], notes)
    notes += left_out(settings)
    if isinstance(given.get("negative"), str):
        given["negative"] = without_lora_tags(given["negative"])[0]
    if settings.get("mode") in can.modes:
        given["mode"] = settings["mode"]
    scheduler = settings.get("scheduler") if settings.get("scheduler") in can.schedulers else settings.get("sampler")
    if scheduler is not None:
        given["scheduler"] = scheduler_named(str(scheduler), can)
        if given["scheduler"] is None:
            notes.append(f"{can.model} has no scheduler {scheduler}; its own is used")
    if all(isinstance(settings.get(side), int) for side in ("width", "height")):
        given["size"] = (settings["width"], settings["height"])
    _fit(given, can, notes)
    request = Draw(**(given | changes))
    others = {"seed", "count", "prompt"} & changes.keys()  # a picture of its own, which no batch needs to repeat
    size, place = (1, 0) if others else _batch(settings.get("batch"), request)
    if size == 1:
        return Again(request=request, notes=tuple(notes))
    whole = replace(request, seed=(request.seed or 0) - place, count=size, batch_size=size)
    return Again(request=whole, notes=tuple(notes), keep=place)


def _batch(found: Any, request: Draw) -> tuple[int, int]:
    """Pictures of the call that a picture was drawn in, and its place there."""
    right = isinstance(found, list) and len(found) == 2 and all(type(number) is int for number in found)
    if not right or not 0 <= found[1] < found[0] <= MAX_BATCH or (request.seed or 0) < found[1]:
        return 1, 0
    return found[0], found[1]


def _fit(given: dict[str, Any], can: Capabilities, notes: list[str]) -> None:
    """Takes out what a model does not have."""
    if can.fixed_size and given.get("size") not in (None, can.size, *can.sizes):
        notes.append(f"{can.model} draws {can.size[0]} x {can.size[1]} only, not {' x '.join(map(str, given['size']))}")
        del given["size"]
    if can.fixed_size and given.get("size") == can.size:
        del given["size"]
    if can.guidance_name is None and given.pop("guidance", None) is not None:
        notes.append(f"{can.model} has no guidance; the picture's is left out")
    negative = given.get("negative")
    if negative and (not can.negative or (can.negative_needs and can.negative_needs not in given.get("options", {}))):
        del given["negative"]
        notes.append(f"{can.model} takes no negative prompt here; the picture's is left out")
    if not can.best_of:
        given.pop("best_of", None)
    if not can.strict:
        given.pop("strict", None)
    if not can.fast and given.pop("fast", None) is not None:
        notes.append(f"{can.model} cannot leave out work (fast); the picture is drawn in full")


def without_lora_tags(prompt: str) -> tuple[str, list[tuple[str, str]]]:
    """A prompt without A1111's `<lora:name:scale>`, and the names and scales."""
    tags = [(name, scale.split(":")[0] or "1") for name, scale in LORA_TAG.findall(prompt)]
    return LORA_TAG.sub("", prompt).strip(), tags


def scheduler_named(name: str, can: Capabilities) -> str | None:
    """The scheduler class that a name means: a class name with or without "Scheduler", or another program's sampler.

    Returns:
        A name of `can.schedulers`; None where none is meant.
    """
    plain = name.lower().replace("_", " ").strip()
    for suffix in (" karras", " exponential", " automatic", " simple", " normal"):
        plain = plain.removesuffix(suffix)
    by_name = {known.lower(): known for known in can.schedulers}
    for wanted in (plain.replace(" ", ""), f"{plain.replace(' ', '')}scheduler", _SAMPLERS.get(plain, "").lower()):
        if wanted in by_name:
            return by_name[wanted]
    flow = by_name.get("flowmatcheulerdiscretescheduler")
    return flow if plain == "euler" else None
