"""The capabilities of a loaded pipeline, from its family and from the signature of its call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm.customization.objectives.watched import can_be_watched
from mm.engine.capabilities import ADAPTIVE, Capabilities
from mm.engine.views import call_parameters, schedulers_for
from mm.families.family import Family, resolve
from mm.families.sizes import native_side
from mm.families.stepping import gives_latents
from mm.fast.hook import DENOISERS

# Task of a request -> task of a family file.
FAMILY_TASKS: Mapping[str, str] = {
    "draw": "text_to_image",
    "image_to_image": "image_to_image",
    "inpaint": "inpaint",
    "edit": "edit",
    "describe": "understanding",
    "converse": "conversation",
}


# Pipelines that fail for reasons of their own, with the reason.
UNUSABLE: Mapping[str, str] = {
    "ChromaInpaintPipeline": "diffusers' ChromaInpaintPipeline reads a setting that Chroma's transformer does not have",
}


def capabilities_of(name: str, pipe: Any, family: Family | None, folder: Path | None = None) -> Capabilities:
    """What a model can do.

    Args:
        name: of the model, in messages.
        pipe: its pipeline.
        family: its family; None for an unknown one, whose call's signature then decides everything.
        folder: where the model was loaded from, for components that only some of the family's pipelines have.
    """
    takes = call_parameters(pipe)
    tasks = _tasks(pipe, family, takes, folder)
    guidance_name = _guidance_name(pipe, family, takes)
    return Capabilities(
        model=name,
        tasks=tuple(task for task in FAMILY_TASKS if task in tasks),
        modes=tuple(getattr(pipe, "modes", ()) or (family.modes if family else ())) if "mode" in takes else (),
        steps=_steps(family, takes),
        guidance=None if family is None or guidance_name is None else family.guidance,
        guidance_name=guidance_name,
        negative="negative_prompt" in takes,
        negative_needs="true_cfg_scale" if _distilled(guidance_name, takes) else "",
        negative_default=family.negative_prompt if family is not None and "negative_prompt" in takes else "",
        schedulers=schedulers_for(pipe),
        image_guidance="image_guidance_scale" in takes or ("edit" in tasks and _edit_takes(family)),
        best_of="best_of" in takes,
        apart=_apart(pipe, family, tasks),
        strict="strict" in takes,
        fast=(fast := _fast(pipe, family, takes, guidance_name)),
        fast_tasks=_fast_tasks(family, tasks) if fast else (),
        **_size(pipe, family, takes),
    )


def _apart(pipe: Any, family: Family | None, tasks: set[str]) -> bool:
    """Whether adapters can be kept apart; a family without an objective may still be refused once it is watched."""
    if family is None or "draw" not in tasks or not gives_latents(pipe):
        return False
    return family.objective is not None or can_be_watched(pipe)


def _guidance_name(pipe: Any, family: Family | None, takes: Mapping[str, Any]) -> str | None:
    """The argument that guidance goes to; None without any, or where one of a distilled model would have no effect."""
    if family is None:
        return "guidance_scale" if "guidance_scale" in takes else None
    if family.guidance is None or ("distilled" in family.guidance_name and not _reads_guidance(pipe)):
        return None
    return family.guidance_name


def _reads_guidance(pipe: Any) -> bool:
    """Whether a denoiser has guidance among its inputs."""
    denoisers = [getattr(pipe, name, None) for name in DENOISERS]
    return any(getattr(part.config, "guidance_embeds", False) for part in denoisers if part is not None)


def _fast(pipe: Any, family: Family | None, takes: Mapping[str, Any], guidance_name: str | None) -> str:
    """What resolves the settings of less work a picture; empty where the pipeline computes nothing to leave out."""
    if "fast" in takes:
        return "" if family is None else family.fast
    denoiser = any(getattr(pipe, name, None) is not None for name in DENOISERS)
    if guidance_name is None or not denoiser or getattr(pipe, "scheduler", None) is None:
        return ""
    return "" if _reads_guidance(pipe) and "true_cfg_scale" not in takes else ADAPTIVE


def _fast_tasks(family: Family | None, tasks: set[str]) -> tuple[str, ...]:
    """The drawing tasks that can be fast: of a family's own classes those whose call takes `fast`."""
    named = {} if family is None else {t: family.pipelines.get(k, "") for t, k in FAMILY_TASKS.items()}
    own = {task: ":" not in name or "fast" in call_parameters_of(resolve(name)) for task, name in named.items()}
    return tuple(t for t in FAMILY_TASKS if t in tasks and t not in ("describe", "converse") and own.get(t, True))


def _distilled(guidance_name: str | None, takes: Mapping[str, Any]) -> bool:
    """Whether guidance is an input of the denoiser (FLUX), so that a negative prompt needs guidance of its own."""
    return "true_cfg_scale" in takes and guidance_name != "true_cfg_scale"


def _tasks(pipe: Any, family: Family | None, takes: Mapping[str, Any], folder: Path | None) -> set[str]:
    """Tasks by the family where its pipelines can be made of the components that are there, else by the call."""
    named = {} if family is None else {t: family.pipelines[k] for t, k in FAMILY_TASKS.items() if k in family.pipelines}
    own = {task for task, name in named.items() if usable(pipe, task, name, folder)}
    if "draw" in own and "image" in takes and not {"strength", "mask_image"} & takes.keys():
        own.add("edit")  # one class for both, with a picture or without
    return own or _from_signature(pipe, takes)


def usable(pipe: Any, task: str, name: str, folder: Path | None) -> bool:
    """Whether a pipeline class of a family works with the components of `pipe`, or with those in its folder."""
    if name in UNUSABLE or not _fits_unet(pipe, task):
        return False
    kind = class_of(name)
    if kind is None:
        return False
    if kind in type(pipe).__mro__[:2]:  # the second is that of `mm.engine.outline`
        return True
    there = {key for key, part in pipe.components.items() if part is not None}
    if ":" in name and folder is not None:
        there |= {path.name for path in folder.iterdir() if path.is_dir()}
    return required_of(kind) <= there


def class_of(name: str) -> Any:
    """A pipeline class by the name in a family file; None where this diffusers does not have it."""
    if ":" in name:
        return resolve(name)
    import diffusers

    return getattr(diffusers, name, None)


def required_of(kind: Any) -> set[str]:
    """Names of the components that a pipeline class cannot do without."""
    found = inspect.signature(kind.__init__).parameters.items()
    needed = {key for key, value in found if key != "self" and value.default is value.empty}
    return needed - set(getattr(kind, "_optional_components", ()))


def _fits_unet(pipe: Any, task: str) -> bool:
    """Whether a UNet's input channels are those of a task: latents, and for some also a source, or source and mask."""
    unet, vae = getattr(pipe, "unet", None), getattr(pipe, "vae", None)
    latents = getattr(getattr(vae, "config", None), "latent_channels", None)
    if unet is None or latents is None:
        return True
    fitting = {"inpaint": (latents, 2 * latents + 1), "edit": (2 * latents,)}.get(task, (latents,))
    return unet.config.in_channels in fitting


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
    name = family.pipelines.get("edit", "") if family else ""
    return ":" in name and "image_guidance_scale" in call_parameters_of(resolve(name))


def call_parameters_of(kind: type) -> Mapping[str, Any]:
    """The parameters of a class's call."""
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
        side = native_side(pipe) or 1024
        return {"size": (side, side), "multiple": 8, "fixed_size": not free, "size_known": False}
    native = native_side(pipe) or rule.default
    chosen = min(native, rule.default)
    sides = getattr(pipe, "sides", ())
    return {
        "sizes": tuple((side, side) for side in sides) if len(sides) > 1 else (),
        "size": (chosen, chosen),
        "multiple": rule.multiple,
        "fixed_size": not free or rule.fixed,
        "largest": rule.maximum,
    }
