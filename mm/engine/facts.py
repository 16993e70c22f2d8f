"""The capabilities of a loaded pipeline, from its family and from the signature of its call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm.engine.capabilities import Capabilities
from mm.engine.views import call_parameters, schedulers_for
from mm.families.family import Family, resolve

# Task of a request -> task of a family file.
FAMILY_TASKS: Mapping[str, str] = {
    "draw": "text_to_image",
    "image_to_image": "image_to_image",
    "inpaint": "inpaint",
    "edit": "edit",
    "describe": "understanding",
    "converse": "conversation",
}


def capabilities_of(name: str, pipe: Any, family: Family | None) -> Capabilities:
    """What a model can do.

    Args:
        name: of the model, in messages.
        pipe: its pipeline.
        family: its family; None for an unknown one, whose call's signature then decides everything.
    """
    takes = call_parameters(pipe)
    own = {task for task, kin in FAMILY_TASKS.items() if family is not None and kin in family.pipelines}
    tasks = own | _from_signature(pipe, takes)
    guidance_name = family.guidance_name if family is not None and family.guidance is not None else None
    if family is None and "guidance_scale" in takes:
        guidance_name = "guidance_scale"
    return Capabilities(
        model=name,
        tasks=tuple(task for task in FAMILY_TASKS if task in tasks),
        modes=tuple(getattr(pipe, "modes", ()) or (family.modes if family else ())) if "mode" in takes else (),
        steps=_steps(family, takes),
        guidance=None if family is None else family.guidance,
        guidance_name=guidance_name,
        negative="negative_prompt" in takes,
        schedulers=schedulers_for(pipe),
        image_guidance="image_guidance_scale" in takes or ("edit" in own and _edit_takes(family)),
        **_size(pipe, family, takes),
    )


def _from_signature(pipe: Any, takes: Mapping[str, Any]) -> set[str]:
    """Tasks that a call can do by its parameters: a required picture makes it no text-to-image."""
    if "prompt" not in takes:
        return set()
    needs_picture = "image" in takes and takes["image"].default is takes["image"].empty
    if "mask_image" in takes:
        return {"inpaint"}
    if not needs_picture and "image" not in takes:
        return {"draw"}
    if "strength" in takes:
        return {"image_to_image"}
    return {"edit"} if needs_picture else {"draw", "edit"}


def _edit_takes(family: Family | None) -> bool:
    """Whether a family's own editing pipeline has guidance for the source."""
    name = family.pipelines["edit"] if family else ""
    return ":" in name and "image_guidance_scale" in call_parameters_of(resolve(name))


def call_parameters_of(kind: type) -> Mapping[str, Any]:
    """The parameters of a class's call."""
    import inspect

    return inspect.signature(kind.__call__).parameters


def _steps(family: Family | None, takes: Mapping[str, Any]) -> dict[str, int | None]:
    if family is None:
        default = takes["num_inference_steps"].default if "num_inference_steps" in takes else None
        return {"": default if isinstance(default, int) else None}
    if isinstance(family.steps, Mapping):
        return {**family.steps, "": next(iter(family.steps.values()))}
    return dict.fromkeys(("", *family.modes), family.steps)


def _size(pipe: Any, family: Family | None, takes: Mapping[str, Any]) -> dict[str, Any]:
    """Default, multiple, and whether only the default can be drawn."""
    free = "height" in takes and "width" in takes
    rule = None if family is None else family.size
    if rule is None:
        side = _native_side(pipe) or 1024
        return {"size": (side, side), "multiple": 8, "fixed_size": not free}
    side = _native_side(pipe) if family is not None and rule.default > (_native_side(pipe) or rule.default) else None
    chosen = side or rule.default
    return {
        "size": (chosen, chosen),
        "multiple": rule.multiple,
        "fixed_size": not free or rule.multiple == rule.maximum,
    }


def _native_side(pipe: Any) -> int | None:
    """The side in pixels by the denoiser's config and the autoencoder's scale; None where they do not tell."""
    scale = getattr(pipe, "vae_scale_factor", None)
    for name in ("unet", "transformer"):
        sample = getattr(getattr(getattr(pipe, name, None), "config", None), "sample_size", None)
        if isinstance(sample, int) and isinstance(scale, int):
            return sample * scale
    return None
