"""Sites of a model by the registry, and which parts of a pipeline are quantized by default."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mm.core.checks import texts
from mm.core.errors import UserError
from mm.families.registry import families, is_denoiser, is_text_encoder, rules_of
from mm.families.rules import generic
from mm.layers.sites import Site, match_sites

if TYPE_CHECKING:
    from torch import nn

_NAMES = ("transformer", "unet", "prior", "decoder", "denoiser", "dit")
_OTHERS = (
    "vae", "vq", "autoencoder", "controlnet", "adapter", "safety", "image_encoder", "vision", "tokenizer", "vocoder",
)  # fmt: skip


def find_sites(root: nn.Module) -> list[Site]:
    """Every linear layer of a model as a site, in the model's order.

    Args:
        root: a denoiser, a text encoder, or any other module.

    Returns:
        The sites by the rules of the model's family; by the generic rules, with a warning, for an unknown class.
    """
    from mm.layers.surgery import linears

    paths = [path for path, _ in linears(root)]
    rules = rules_of(root)
    if rules is None and paths:
        warnings.warn(
            f"mm.families has no rules for {type(root).__name__}, so the generic ones are used, by the names of its "
            "layers; docs/families.md says how to add a family",
            stacklevel=2,
        )
    return match_sites(root, rules or (), generic(paths))


def quantizable_parts(target: Any, components: str | Iterable[str] | None = None) -> dict[str, nn.Module]:
    """The parts of a pipeline that are quantized, by name and out of wrappers; a bare module under the name "model".

    Args:
        target: a pipeline or a module.
        components: names of parts, to choose them oneself. None: the parts that draw, which are those of a class that a
            family names, those named transformer or unet, and diffusers' models with attention that are neither
            autoencoder, text encoder nor controlnet.

    Raises:
        UserError: where the pipeline has no such part.
    """
    from torch import nn

    from mm.layers.surgery import unwrapped

    if isinstance(target, nn.Module):
        return {"model": unwrapped(target)}
    parts = {n: unwrapped(m) for n, m in getattr(target, "components", {}).items() if isinstance(m, nn.Module)}
    if components is not None:
        wanted = texts("components", components)
        if missing := [name for name in wanted if name not in parts]:
            raise UserError(f"the pipeline has no module {', '.join(missing)}; it has {', '.join(parts) or 'none'}")
        return {name: parts[name] for name in wanted}
    chosen = {name: part for name, part in parts.items() if _draws(name, part)}
    if not chosen:
        shown = ", ".join(f"{n} ({type(m).__name__})" for n, m in parts.items()) or type(target).__name__
        raise UserError(f"found no part that draws among {shown}; name the parts to quantize with components=[...]")
    return chosen


def _draws(name: str, part: nn.Module) -> bool:
    if is_denoiser(part):
        return True
    kinds = {kind.__name__ for kind in type(part).__mro__}
    if is_text_encoder(part) or any(word in name.lower() or word in type(part).__name__.lower() for word in _OTHERS):
        return False
    if name.startswith("text_encoder") or not _has_attention(part):
        return False
    return name.split("_")[0].rstrip("0123456789") in _NAMES or "ModelMixin" in kinds


def _has_attention(part: nn.Module) -> bool:
    from mm.layers.surgery import linears

    return any(
        "attn" in path.lower() or "attention" in path.lower() or path.rpartition(".")[2] in ("to_q", "q_proj", "q")
        for path, _ in linears(part)
    )


def known_denoisers() -> list[str]:
    """Class names of all denoisers with rules of their own, in alphabetical order."""
    return sorted({name for known in families() for name in known.denoisers})
