"""How a diffusers pipeline is called to calibrate it: every argument by keyword, as its signature asks.

Design choices
- Nothing is passed by position: some fifty of diffusers' pipelines take `image` or `video` first.
- What a pipeline needs beside a prompt (a source picture, a mask, edges, a video) is the caller's where a calibration
  item is a mapping, and made by procedure where it is not (`mm.quantization.pictures`). What cannot be made (embeddings
  of another model, poses) is named in one error.
- Both branches of guidance run where the pipeline has them by default: pipelines with `true_cfg_scale` above 1 need a
  negative prompt for that, the others get one on every second call.
- A few frames stand for a video: activations hardly depend on how many there are, time does.
- Few-step models keep their own number of steps, which their scheduler may insist on.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mm.core.errors import UserError
from mm.families import family_of
from mm.families.frames import FRAME_NAMES
from mm.families.sizes import exact_size, native_side
from mm.families.sources import EDGES, MASKS, PICTURES, VIDEOS
from mm.families.wording import as_written
from mm.quantization import pictures
from mm.quantization.config import SVDQuantConfig

FRAMES = 9  # fits video autoencoders that compress time by 4 and by 8: 4k + 1 and 8k + 1
NEGATIVE = "blurry, low quality"
LEAST_STEPS = 8  # of pictures that are compared
_FALLBACK = 512  # pixels a side where neither caller nor model says
# These draw from text alone as well as from a picture: both are calibrated in turns.
_EITHER = ("Flux2", "FluxKontext", "ZImageOmni")


def parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """The arguments of a pipeline's call."""
    found = dict(inspect.signature(type(pipe).__call__).parameters)
    found.pop("self", None)
    return found


def draw(pipe: Any, item: str | Mapping[str, Any], config: SVDQuantConfig, number: int, **options: Any) -> Any:
    """Calls the pipeline once as calibration does.

    Args:
        pipe: a pipeline of diffusers' kind.
        item: a prompt, or keyword arguments that win over what is chosen here.
        config: says steps, size and seed.
        number: of the call; seeds are `config.seed + number`, and modes and negative prompts go in turns.
        options: more arguments of the call, for example `output_type`.

    Returns:
        The pipeline's output.

    Raises:
        UserError: when an argument is needed that cannot be made, or when the pipeline refuses the call.
    """
    given = {"prompt": item} if isinstance(item, str) else dict(item)
    arguments = arguments_for(pipe, given, config, number) | options
    takes = parameters(pipe)
    arguments = {name: value for name, value in arguments.items() if name in takes}
    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        return pipe(**arguments)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{type(pipe).__name__} refused a call with {', '.join(sorted(arguments))} ({type(error).__name__}: "
            f"{error}); calibrate with calibration=[{{keyword arguments}}, ...] or a callable that gets the pipeline"
        ) from error
    finally:
        pipe.set_progress_bar_config(**({"disable": False} | bar))


def arguments_for(pipe: Any, given: Mapping[str, Any], config: SVDQuantConfig, number: int) -> dict[str, Any]:
    """Keyword arguments of the call: what was given, and the rest by the signature. Raises UserError as `draw` does."""
    takes = parameters(pipe)
    _check_names(pipe, given, takes)
    made: dict[str, Any] = {}
    if "output_type" in takes:
        made["output_type"] = "latent"
    made |= as_written(takes)
    if "generator" in takes:
        made["generator"] = torch.Generator().manual_seed(config.seed + number)
    if "num_inference_steps" in takes:
        made["num_inference_steps"] = steps_of(pipe, config.steps)
    modes = getattr(pipe, "modes", ())
    if "mode" in takes and modes:
        made["mode"] = modes[number % len(modes)]
    made |= _guidance(pipe, takes, number)
    made |= _sizes(pipe, takes, config)
    made |= _pictures_for(pipe, takes, given, config, number)
    if "class_labels" in takes:
        classes = getattr(getattr(getattr(pipe, "transformer", None), "config", None), "num_embeds_ada_norm", 1000)
        made["class_labels"] = [(config.seed + 37 * number) % classes]
    made |= given
    needed = [n for n, p in takes.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if missing := [name for name in needed if name not in made]:
        raise UserError(
            f"{type(pipe).__name__} needs {', '.join(missing)}, which calibration cannot make; give it as "
            "calibration=[{'prompt': ..., '" + missing[0] + "': ...}, ...], or calibrate with a callable"
        )
    return made


def steps_of(pipe: Any, wanted: int) -> int:
    """Steps of a call: as many as wanted, but no more than the pipeline's own default, by which few-step models go."""
    parameter = parameters(pipe).get("num_inference_steps")
    own = parameter.default if parameter is not None else None
    return min(wanted, own) if isinstance(own, int) else wanted


def _check_names(pipe: Any, given: Mapping[str, Any], takes: Mapping[str, inspect.Parameter]) -> None:
    unknown = [name for name in given if name not in takes and name != "prompt"]
    if unknown:
        raise UserError(f"{type(pipe).__name__} takes no {', '.join(unknown)}; it takes {', '.join(takes)}")


def _guidance(pipe: Any, takes: Mapping[str, inspect.Parameter], number: int) -> dict[str, Any]:
    family = family_of(pipe)
    if "negative_prompt" not in takes or (family is not None and family.model_types):  # these have one of their own
        return {}
    true_scale = takes.get("true_cfg_scale")
    if true_scale is not None:
        runs_twice = isinstance(true_scale.default, (int, float)) and true_scale.default > 1
        return {"negative_prompt": NEGATIVE if number % 2 else " "} if runs_twice else {}
    return {"negative_prompt": NEGATIVE} if number % 2 else {}


def _sizes(pipe: Any, takes: Mapping[str, inspect.Parameter], config: SVDQuantConfig) -> dict[str, Any]:
    made: dict[str, Any] = {name: FRAMES for name in FRAME_NAMES if name in takes}
    side = config.size or native_side(pipe)
    if side and {"height", "width"} <= set(takes):
        made |= exact_size(takes, side, side)
    return made


def _pictures_for(
    pipe: Any, takes: Mapping[str, inspect.Parameter], given: Mapping[str, Any], config: SVDQuantConfig, number: int
) -> dict[str, Any]:
    """Pictures, masks, edges and videos for the arguments that are there and were not given."""
    side = config.size or native_side(pipe) or _default_side(takes)
    seed = config.seed + number
    name = type(pipe).__name__
    made: dict[str, Any] = {}
    for argument in takes:
        if argument in given:
            continue
        if argument in VIDEOS:
            made[argument] = pictures.video(seed, side, side, FRAMES)
        elif argument in EDGES or (argument == "image" and _is_controlled(pipe, takes)):
            made[argument] = _for_each_net(pipe, pictures.edges(seed, side, side))
        elif argument in PICTURES:
            one = pictures.picture(seed, side, side)
            made[argument] = [one] if argument in ("images", "input_images") else one
        elif argument in MASKS:
            made[argument] = pictures.mask(seed, side, side)
    if "image" in made and number % 2 and name.startswith(_EITHER) and "mask_image" not in takes:
        del made["image"]  # text alone
    return _without_alternatives(made, takes)


def _without_alternatives(made: dict[str, Any], takes: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Pipelines that take a picture or a video, both optional, get the video only where it is needed."""
    both = "image" in made and "video" in made
    if both and takes["image"].default is not inspect.Parameter.empty:
        del made["video" if takes["video"].default is not inspect.Parameter.empty else "image"]
    return made


def _is_controlled(pipe: Any, takes: Mapping[str, inspect.Parameter]) -> bool:
    """Whether `image` is what a control network reads: it is, where there is one and no `control_image` beside it."""
    nets = any(getattr(pipe, name, None) is not None for name in ("controlnet", "adapter"))
    return nets and "control_image" not in takes


def _for_each_net(pipe: Any, one: Any) -> Any:
    nets = getattr(getattr(pipe, "controlnet", None), "nets", None)
    return one if nets is None else [one] * len(nets)


def _default_side(takes: Mapping[str, inspect.Parameter]) -> int:
    sides = [takes[n].default for n in ("height", "width") if n in takes and isinstance(takes[n].default, int)]
    return min(sides, default=_FALLBACK)


def pixels_of(output: Any) -> Tensor:
    """The pictures of an output in "pt" or "np" form, by what it holds: images, or a video's frames one by one.

    Args:
        output: a pipeline's output with `images` or `frames`.

    Returns:
        (N, C, H, W) in fp32 on the CPU.

    Raises:
        UserError: where it holds neither.
    """
    found = next((getattr(output, name) for name in ("images", "frames", "image") if hasattr(output, name)), None)
    if found is None:
        raise UserError(f"{type(output).__name__} holds neither images nor frames, so there is nothing to compare")
    return _flat(found)


def _flat(found: Any) -> Tensor:
    if isinstance(found, (list, tuple)):
        return torch.cat([_flat(each) for each in found])
    pixels = torch.as_tensor(found).detach().float().cpu()
    if pixels.ndim == 3:
        pixels = pixels[None]
    if pixels.ndim == 5:
        pixels = pixels.flatten(0, 1)
    return pixels if pixels.shape[1] in (1, 3, 4) else pixels.movedim(-1, 1)


def preview(pipe: Any, prompts: Sequence[str], config: SVDQuantConfig, title: str, progress: bool) -> Tensor:
    """Pictures (N, C, H, W) in [0, 1] of some prompts, from seeds 0, 1, ...; the title stands beside a bar.

    Raises:
        UserError: as `draw` does.
    """
    config = dataclasses.replace(config, seed=0, steps=max(config.steps, LEAST_STEPS))
    made = []
    for number, prompt in enumerate(tqdm(prompts, desc=title, unit="picture", leave=False, disable=not progress)):
        options: dict[str, Any] = {"mode": pipe.modes[0]} if getattr(pipe, "modes", ()) else {}
        if number % 2 and "negative_prompt" in parameters(pipe):
            options["negative_prompt"] = arguments_for(pipe, {"prompt": prompt}, config, 0).get("negative_prompt")
        made.append(pixels_of(draw(pipe, {"prompt": prompt} | options, config, number, output_type="pt")))
    return torch.cat(made)
