"""Keyword arguments of a pipeline's call for requests.

Design choices
- A picture that is drawn from another one keeps its size, rounded down to what the model can draw; the source is scaled
  here, since pipelines do it each in its own way and some ignore the size of the source.
- Requests that share everything but prompt, negative prompt and seed go into one call (`call_key`, `grouped`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from PIL import Image

from mm.core.pictures import as_mask, flattened
from mm.engine.capabilities import Capabilities
from mm.engine.requests import Draw, Edit
from mm.families.frames import one_frame
from mm.families.sizes import exact_size
from mm.families.wording import as_written

_OWN = ("prompt", "negative", "seed", "count", "batch_size")  # of a picture; everything else is shared in a call

# Latents a side for which diffusers has lists of sizes; SANA-Sprint's pipeline knows one.
_BINNED = (16, 32, 64, 128, 256)
_BINNED_SPRINT = (32,)


def call_key(request: Draw | Edit) -> tuple[Any, ...]:
    """What pictures of one call have in common; pictures are compared by identity."""
    values = {field.name: getattr(request, field.name) for field in fields(request) if field.name not in _OWN}
    return (type(request), *(id(v) if isinstance(v, Image.Image) else repr(v) for v in values.values()))


def grouped(
    requests: Sequence[Draw | Edit], size: int, *, mixed: bool, mixed_negatives: bool
) -> Iterator[list[tuple[int, Draw | Edit]]]:
    """Requests of one picture each in the calls that draw them, with their positions.

    Args:
        requests: one picture each.
        size: the most pictures of a call.
        mixed: whether a call may have several prompts.
        mixed_negatives: whether it may have several negative prompts.
    """
    groups: dict[tuple[Any, ...], list[tuple[int, Draw | Edit]]] = {}
    for at, request in enumerate(requests):
        own = (
            None if mixed or not isinstance(request, Draw) else request.prompt,
            None if mixed and mixed_negatives else request.negative,
        )
        groups.setdefault((call_key(request), own), []).append((at, request))
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def arguments_of(
    requests: Sequence[Draw | Edit], can: Capabilities, takes: Mapping[str, Any], *, one_negative: bool = False
) -> dict[str, Any]:
    """Keyword arguments of a call.

    Args:
        requests: that share a call; one of several pictures counts once.
        can: of the model.
        takes: parameters of the call by name.
        one_negative: whether a call takes one negative prompt for all pictures, and no list.
    """
    first = requests[0]
    given = one_frame(takes)
    if can.modes:
        given["mode"] = can.mode(first)
    if can.guidance_name:
        given[can.guidance_name] = can.guidance_of(first)
    given |= _prompts(requests, can, one_negative)
    given |= as_written(takes)
    given |= {"strict": first.strict} if can.strict else {}
    given |= {"best_of": first.best_of if first.best_of > 1 else None}
    if isinstance(first, Draw):
        given |= _drawn_from(first, can, takes) | {"strength": first.strength}
    else:
        given |= _edited(first, takes)
    return given | first.options


def unbinned(pipe: Any, takes: Mapping[str, Any]) -> dict[str, Any]:
    """What turns off the rounding to a list of sizes (PixArt, SANA), where diffusers has no list for the model's size.

    Such a pipeline would refuse every call.
    """
    config = getattr(getattr(pipe, "transformer", None), "config", None)
    size = getattr(config, "sample_size", None)
    known = _BINNED_SPRINT if "Sprint" in type(pipe).__name__ else _BINNED
    binned = "use_resolution_binning" not in takes or size is None or size in known
    return {} if binned else {"use_resolution_binning": False}


def _prompts(requests: Sequence[Draw | Edit], can: Capabilities, one_negative: bool) -> dict[str, Any]:
    prompts = [r.prompt if isinstance(r, Draw) else r.instruction for r in requests]
    negatives = [can.negative_default if r.negative is None else r.negative for r in requests]
    same = len(set(prompts)) == len(set(negatives)) == 1
    given: dict[str, Any] = {"prompt": prompts[0] if same else prompts}
    if any(negatives):
        given["negative_prompt"] = negatives[0] if same or one_negative else negatives
    return given


def size_of(request: Draw | Edit, can: Capabilities) -> tuple[int, int] | None:
    """Width and height that a request is drawn in; None where the pipeline decides."""
    if request.size is not None:
        return request.size
    if isinstance(request, Edit) or can.fixed_size:
        return None
    if request.image is not None:
        return fitted(request.image.size, can.multiple, can.largest)
    return can.size if can.size_known else None


def fitted(size: tuple[int, int], multiple: int, largest: int) -> tuple[int, int]:
    """The size nearest below one whose sides are multiples, and at most `largest` where that is not 0."""
    scale = min(1.0, largest / max(size)) if largest else 1.0
    width, height = (max(1, int(side * scale) // multiple) * multiple for side in size)
    return width, height


def _drawn_from(request: Draw, can: Capabilities, takes: Mapping[str, Any]) -> dict[str, Any]:
    size = size_of(request, can)
    given: dict[str, Any] = {}
    if size is not None and {"width", "height"} <= takes.keys():
        given |= _sized(size, takes)
    if request.image is not None:
        if size is not None and size != request.image.size and request.size is None:
            old, new = (f"{w} x {h}" for w, h in (request.image.size, size))
            text = f"the picture is {old}; {can.model} draws multiples of {can.multiple}, so it is scaled to {new}"
            warnings.warn(text, stacklevel=2)
        given["image"] = scaled(flattened(request.image), size)
    if request.mask is not None:
        given["mask_image"] = scaled(as_mask(request.mask), size or (request.image or request.mask).size)
    return given


def _edited(request: Edit, takes: Mapping[str, Any]) -> dict[str, Any]:
    given: dict[str, Any] = {"image": flattened(request.image), "image_guidance_scale": request.image_guidance}
    if request.size is not None and {"width", "height"} <= takes.keys():
        given |= _sized(request.size, takes)
    elif request.size is not None:
        given["image"] = scaled(given["image"], request.size)
    elif "max_area" in takes:  # Kontext draws this area in the proportions that it is given, and squares without
        given |= {"width": request.image.width, "height": request.image.height}
    if request.mask is not None:
        given["mask_image"] = as_mask(request.mask)
    return given


def _sized(size: tuple[int, int], takes: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for a size. A list of sizes (PixArt, SANA) is kept: such pipelines scale their pictures to the size."""
    given = exact_size(takes, *size)
    return {name: given[name] for name in ("width", "height", "max_area") if name in given}


def scaled(picture: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    """The picture in another size; masks keep sharp edges."""
    if size is None or picture.size == size:
        return picture
    kind = Image.Resampling.NEAREST if picture.mode == "L" else Image.Resampling.LANCZOS
    return picture.resize(size, kind)
