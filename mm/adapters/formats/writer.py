"""`write_lora`: a patch as a LoRA file of another program.

Design choices
- Thin products are written with their scale in `up`. Where a layout has an alpha, all layers have that of the largest
  rank, and `up` the rest of the factor: diffusers 0.42 misses alphas of a UNet's attention in kohya's files where they
  differ.
- Two files that belong together (an adapter and its settings) are written both or not at all, and settings that belong
  to another adapter are not replaced.
- Changes of a whole weight and of a bias go into LyCORIS' keys, factors as factors and others as `diff` and `diff_b`,
  which kohya's layout and ComfyUI's know; the others hold a bias beside a product only, and diffusers' and peft's DoRA;
  peft's holds LoHa, LoKr and OFT by its own names.
  What a layout cannot hold is an error, and nothing is written then.
- kohya's scripts and ComfyUI call some families' layers by their original names, with q, k and v in one. The model says
  which: such a layer is written whole, rows without a change as zeros.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mm.adapters.factors import WHOLE
from mm.adapters.formats.family_names import TABLES
from mm.adapters.formats.lycoris import WeightOf, dense_of, lycoris_tensors, weights_of
from mm.adapters.formats.names import DENOISERS, Names, Piece, outputs
from mm.adapters.formats.peft_layout import factors_of_peft, peft_type
from mm.adapters.patch import Entry, Patch
from mm.core.checks import check_kind, check_path
from mm.core.errors import UserError
from mm.core.files import read_regular, write_bytes, write_files
from mm.core.safe_tensors import tensor_bytes
from mm.layers.surgery import roots_of

Layout = Literal["peft", "diffusers", "kohya", "comfyui"]
LAYOUTS = ("diffusers", "peft", "kohya", "comfyui")
CONFIG = "adapter_config.json"  # of peft, beside the file
_LONGEST = 4 << 20
_PARTS = (*DENOISERS, "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
_KOHYA = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}
_COMFYUI = {"text_encoder": "text_encoders.clip_l.transformer.", "text_encoder_2": "text_encoders.clip_g.transformer."}
_COMFYUI |= {"text_encoder_3": "text_encoders.t5xxl.transformer."}


def write_lora(patch: Patch, path: str | Path, layout: Layout = "diffusers", *, target: Any = None) -> None:
    """Writes a patch for another program.

    Args:
        patch: of low-rank entries for all tokens; kohya's and ComfyUI's layout also take changes of whole weights and
            biases, diffusers' and peft's DoRA, peft's LoHa, LoKr and OFT.
        path: the file; one that is there is replaced, as a whole. Layout "peft" writes `adapter_config.json` beside it.
        layout: "diffusers", "peft", "kohya" or "comfyui".
        target: the model or pipeline of the patch. The last two layouts need it where they call a family's layers by
            other names (`mm.adapters.formats.family_names`), and for OFT; "comfyui" always does.

    Raises:
        UserError: for what the layout cannot hold; nothing is written then.
    """
    check_kind("patch", patch, Patch, "a patch, such as mm.erase and mm.read_lora make")
    check_path("path", path)
    tensors, config = lora_tensors(patch, layout, target)
    said = {"format": "pt"} | ({"mm_base": patch.base} if patch.base else {})  # which `read_lora` compares
    write_adapter(path, tensor_bytes(tensors, said), config)


def lora_tensors(patch: Patch, layout: Layout, target: Any = None) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a patch in a layout, and peft's settings where the layout has a file of them.

    Raises:
        UserError: as `write_lora`.
    """
    if layout not in LAYOUTS:
        raise UserError(f"the layout is {layout!r}; there are {', '.join(LAYOUTS)}")
    if not patch.entries:
        raise UserError("the patch is empty; there is nothing to write")
    for where, entry in patch.entries.items():
        if entry.kind not in ("lowrank", "bias", *WHOLE) or entry.scope:
            what = f"a branch for {entry.scope} tokens only" if entry.scope else f"an entry of kind {entry.kind!r}"
            raise UserError(f"{where} is {what}, which no LoRA file holds; truncate the patch first")
    if layout == "comfyui" and target is None:
        raise UserError("ComfyUI's names depend on the model; give target=")
    if layout == "peft" and peft_type(patch.entries):
        return _by_peft(patch)
    flat = layout in ("kohya", "comfyui")
    tensors = _flat(patch, layout, target) if flat else _plain(patch, layout)
    return tensors, json.dumps(settings_of_peft(tensors), indent=2) if layout == "peft" else None


def write_adapter(path: str | Path, data: bytes, config: str | None) -> None:
    """Writes an adapter, and its settings beside it where it has some; both or none.

    Raises:
        UserError: where settings of another adapter lie there.
    """
    target = Path(path)
    if config is None:
        write_bytes(target, data)
        return
    beside = target.parent / CONFIG
    before = read_regular(beside, "adapter config", most=_LONGEST) if beside.is_file() else None
    others = [other.name for other in target.parent.glob("*.safetensors") if other.name != target.name]
    if before is not None and before != config.encode() and others:
        raise UserError(
            f"{beside} holds the settings of another adapter ({others[0]}); peft reads one a folder, so give a folder "
            "of its own"
        )
    write_files({beside: config.encode(), target: data})


def _split(where: str) -> tuple[str, str]:
    """Component and path below; the component is empty for a patch of a bare module."""
    component, _, below = where.partition(".")
    return (component, below) if component in _PARTS else ("", where)


# ---- peft and diffusers ---------------------------------------------------------------------------------------------


def _check_one(patch: Patch) -> None:
    """Raises UserError for a patch of several models, of which a file of peft holds one."""
    components = {_split(where)[0] for where in patch.entries}
    if len(components) > 1:
        raise UserError(f"a file of peft holds one model's adapter, this patch changes {', '.join(sorted(components))}")


def _by_peft(patch: Patch) -> tuple[dict[str, Tensor], str]:
    """LoHa, LoKr and OFT, with peft's settings."""
    _check_one(patch)
    tensors, settings = factors_of_peft({_split(where)[1]: entry for where, entry in patch.entries.items()})
    return {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, json.dumps(settings, indent=2)


def _plain(patch: Patch, layout: str) -> dict[str, Tensor]:
    if layout == "peft":
        _check_one(patch)
    out: dict[str, Tensor] = {}
    for where, entry in patch.entries.items():
        product = patch.entries.get(where.removesuffix(".bias"))
        plain = entry.kind == "lowrank" or (entry.kind == "dora" and entry.scale == 1)
        if not plain and not (entry.kind == "bias" and product is not None and product.kind == "lowrank"):
            raise UserError(
                f"{where} is an entry of kind {entry.kind!r}, which {layout}'s layout does not hold; write layout "
                "'kohya' or 'comfyui', or truncate the patch first"
            )
        component, below = _split(where)
        stem = f"base_model.model.{below}" if layout == "peft" else f"{component}.{below}".strip(".")
        if entry.kind == "bias":
            out[f"{stem.removesuffix('.bias')}.lora_B.bias"] = entry.scale * entry.tensors["delta"]
        else:
            out[f"{stem}.lora_A.weight"] = entry.tensors["down"]
            out[f"{stem}.lora_B.weight"] = entry.scale * entry.tensors["up"]
            if entry.kind == "dora":
                out[f"{stem}.lora_magnitude_vector"] = entry.tensors["magnitude"]
    return _of_one_type(out)


def _of_one_type(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A DoRA's tensors, all of the widest type among them; others as they are.

    Files hold wider types first. Where a magnitude comes first, diffusers 0.42 takes the file for one of its own older
    layout, renames `to_out.lora_magnitude_vector` to `to_out.0`, and misses it in FLUX.2.
    """
    if not any(name.endswith(".lora_magnitude_vector") for name in tensors):
        return tensors
    widest = reduce(torch.promote_types, {tensor.dtype for tensor in tensors.values()})
    return {name: tensor.to(widest) for name, tensor in tensors.items()}


def settings_of_peft(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """peft's settings for products that act in full, by peft's names."""
    ends = ".lora_A.weight"
    ranks = {k.removesuffix(ends).removeprefix("base_model.model."): len(t) for k, t in tensors.items()
             if k.endswith(ends)}  # fmt: skip
    most = max(ranks.values())
    others = {f"^{name}": rank for name, rank in ranks.items() if rank != most}
    config = {"peft_type": "LORA", "r": most, "lora_alpha": most, "rank_pattern": others, "alpha_pattern": others}
    config |= {"target_modules": sorted(ranks), "lora_bias": any(k.endswith(".lora_B.bias") for k in tensors)}
    if any(k.endswith(".lora_magnitude_vector") for k in tensors):
        config["use_dora"] = True
    return config


# ---- kohya and ComfyUI ----------------------------------------------------------------------------------------------


def _flat(patch: Patch, layout: str, target: Any) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    weight_of = weights_of(target)
    named = list(_named(patch, target, weight_of))
    most = max((len(entry.tensors["down"]) for *_, entry in named if entry.kind == "lowrank"), default=1)
    for component, name, where, entry in named:
        stem = _stem(component, name, layout)
        if entry.kind == "lowrank":
            rank = len(entry.tensors["down"])
            out[f"{stem}.lora_down.weight"] = entry.tensors["down"]
            out[f"{stem}.lora_up.weight"] = entry.scale * rank / most * entry.tensors["up"]
            out[f"{stem}.alpha"] = torch.tensor(float(most))
        elif entry.kind == "bias":
            out[f"{stem}.diff_b"] = entry.scale * entry.tensors["delta"]
        else:
            out |= {f"{stem}.{end}": tensor for end, tensor in lycoris_tensors(entry, where, weight_of).items()}
    return out


def _stem(component: str, name: str, layout: str) -> str:
    if component.startswith("text_encoder"):
        if name.startswith("encoder.block."):
            component = "text_encoder_3"  # T5 has the third prefix in FLUX too, where it is the second encoder
        elif name.startswith("encoder.layers."):
            name = f"text_model.{name}"  # a level of CLIP that transformers 5 dropped
    if layout == "kohya":
        return (_KOHYA.get(component, "lora_unet_") + name).replace(".", "_")
    return _COMFYUI.get(component, "diffusion_model.") + name


def _named(patch: Patch, target: Any, weight_of: WeightOf) -> Iterator[tuple[str, str, str, Entry]]:
    """Component, name in the original code, path here and entry; layers that are one there are joined."""
    originals = {} if target is None else _originals(target)
    names = None if target is None else Names(target)
    done: set[tuple[str, str, str]] = set()
    for where, entry in patch.entries.items():
        bias = entry.kind == "bias"
        component, below = _split(where.removesuffix(".bias") if bias else where)
        foreign = originals.get((component, below))
        if foreign is None or names is None:
            yield component, below, where, entry
            continue
        key = (component, foreign, "bias" if bias else "weight")
        if key in done:
            continue
        done.add(key)
        pieces = names.find(f"{component}.{foreign}".strip(".")) or ()
        alone = len(pieces) == 1 and pieces[0].count == outputs(pieces[0].layer)
        yield component, foreign, where, entry if alone else _joined(patch, pieces, bias, foreign, weight_of)


def _originals(target: Any) -> dict[tuple[str, str], str]:
    """The original name of each layer of the families that have their own, by component and path."""
    found: dict[tuple[str, str], str] = {}
    names = Names(target)
    for component, root in roots_of(target).items():
        if not any(kind.__name__ in TABLES for kind in type(root).__mro__):
            continue
        for foreign in names.original_names(component):
            for piece in names.find(f"{component}.{foreign}".strip(".")) or ():
                below = piece.path.removeprefix(f"{component}.") if component else piece.path
                found.setdefault((component, below), foreign)
    return found


def _joined(patch: Patch, pieces: tuple[Piece, ...], bias: bool, foreign: str, weight_of: WeightOf) -> Entry:
    """One entry for a layer of the original code from those of the layers it stands for here."""
    suffix = ".bias" if bias else ""
    here = [
        (piece, patch.entries[f"{piece.path}{suffix}"]) for piece in pieces if f"{piece.path}{suffix}" in patch.entries
    ]
    total = sum(piece.count for piece in pieces)
    kinds = {entry.kind for _, entry in here}
    if kinds == {"lowrank"}:
        return _joined_product(here, total)
    if len(kinds) > 1 and not kinds <= set(WHOLE):
        raise UserError(f"{foreign} is one layer in this layout, and its parts have entries of kinds {sorted(kinds)}")
    delta: Tensor | None = None
    for piece, entry in here:
        own = entry.scale * entry.tensors["delta"] if bias else dense_of(entry, piece.path, weight_of)
        if delta is None:
            delta = torch.zeros(total, *own.shape[1:], dtype=own.dtype)
        delta[piece.source : piece.source + piece.count] = own[piece.start : piece.start + piece.count]
    assert delta is not None
    return Entry(kind="bias" if bias else "dense", tensors={"delta": delta})


def _joined_product(here: list[tuple[Piece, Entry]], total: int) -> Entry:
    """Products that share `down` and scale (they were split from one) share it again; others stand below each other."""
    groups: list[tuple[Tensor, float]] = []
    spots: list[int] = []
    for _, entry in here:
        down = entry.tensors["down"]
        spot = next((i for i, (d, s) in enumerate(groups) if s == entry.scale and torch.equal(d, down)), len(groups))
        if spot == len(groups):
            groups.append((down, entry.scale))
        spots.append(spot)
    ranks = [len(down) for down, _ in groups]
    dtype = here[0][1].tensors["up"].dtype
    up = torch.zeros(total, sum(ranks), dtype=dtype)
    for spot, (piece, entry) in zip(spots, here, strict=True):
        start = sum(ranks[:spot])
        rows = entry.tensors["up"][piece.start : piece.start + piece.count].to(dtype)
        factor = entry.scale if len(groups) > 1 else 1.0
        up[piece.source : piece.source + piece.count, start : start + ranks[spot]] = factor * rows
    scale = groups[0][1] if len(groups) == 1 else 1.0
    return Entry(kind="lowrank", tensors={"down": torch.cat([d for d, _ in groups]), "up": up}, scale=scale)
