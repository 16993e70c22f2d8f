"""Sizes of pictures that a model takes, asked before any work is done for one."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from mm.core.errors import UserError
from mm.families.registry import family_of


def check_size(
    size: tuple[int, int], *, model: str, own: tuple[int, int], multiple: int, fixed: bool,
    sizes: tuple[tuple[int, int], ...] = (),
) -> None:  # fmt: skip
    """Checks a size against what a model takes.

    Args:
        size: (width, height) in pixels.
        model: its name, for the message.
        own: the model's usual size, which is always taken.
        multiple: each side is a multiple of so many pixels.
        fixed: whether only `own`, or one of `sizes`, is taken.
        sizes: of a model of fixed size that has several.

    Raises:
        UserError: with the sizes that the model takes.
    """
    if size == own or size in sizes:
        return
    said = f"size is {size[0]} x {size[1]}"
    if fixed:
        if sizes:
            known = " and ".join(f"{width} x {height}" for width, height in sizes)
            raise UserError(f"{said}; {model} draws {known} only; give one of these, or leave it out")
        raise UserError(f"{said}; {model} draws {own[0]} x {own[1]} only; leave it out")
    if any(side % multiple or side < 1 for side in size):
        near = " x ".join(str(max(1, round(side / multiple)) * multiple) for side in size)
        raise UserError(f"{said}; {model} takes multiples of {multiple}, for example {near}")


def usual_side(pipe: Any) -> int:
    """Of the pictures that a pipeline's family is trained at, in pixels."""
    family = family_of(pipe)
    if family is None or family.size is None:
        return 512
    return min(native_side(pipe) or family.size.default, family.size.default)


def check_side(pipe: Any, side: int) -> None:
    """Raises UserError where a pipeline takes no square pictures of a side; without a rule it takes any."""
    family = family_of(pipe)
    rule = None if family is None else family.size
    if rule is None:
        return
    own = native_side(pipe) or rule.default
    name = type(pipe).__name__
    check_size((side, side), model=name, own=(own, own), multiple=rule.multiple, fixed=rule.fixed)


def exact_size(takes: Container[str], width: int, height: int) -> dict[str, Any]:
    """Arguments of a call by which a pipeline draws in just this size.

    PixArt and SANA would round it to a list of sizes, and FLUX.1 Kontext would draw its usual area, and bring source
    pictures to one of its usual sizes.

    Args:
        takes: names of the call's arguments.
        width: in pixels.
        height: in pixels.
    """
    given = {
        "height": height, "width": width, "max_area": width * height, "use_resolution_binning": False,
        "_auto_resize": False,
    }  # fmt: skip
    return {name: value for name, value in given.items() if name in takes}


def native_side(pipe: Any) -> int | None:
    """The side in pixels that a model was made for; None where neither pipeline nor config says it."""
    side = getattr(pipe, "side", None)
    if isinstance(side, int):
        return side
    scale = getattr(pipe, "vae_scale_factor", None)
    for name in ("transformer", "unet", "prior", "decoder"):
        sample = getattr(getattr(getattr(pipe, name, None), "config", None), "sample_size", None)
        if isinstance(sample, int) and isinstance(scale, int):
            return sample * scale
    return None
