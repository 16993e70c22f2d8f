"""LoRA files of other programs: peft's, diffusers' and kohya's layouts into patches, and patches into files.

Design choices
- Keys tell the layout. Strength follows each program's convention: kohya's alpha tensors, peft's and diffusers'
  settings in the metadata (rslora included), full strength where neither is there.
- Names that only make sense for a family (kohya's flattened names, LDM's block numbers, fused qkv) are resolved against
  the model at hand; what its own linear layers do not tell goes through the family's `lora_state_dict` in diffusers.
- DoRA, LoKr and LoHa are not products of two thin matrices. They are refused by name, or truncated to a rank with the
  loss printed; DoRA needs the model for that.

This module does not know how branches run.
Legend: N outputs, K inputs, r rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mm.adapters.patch import Entry, Patch
from mm.core.errors import UserError
from mm.core.files import write_bytes
from mm.layers.surgery import linears, roots_of

Layout = Literal["peft", "diffusers", "kohya"]
_DOWN = (".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora.down.weight", "_lora.down.weight")
_UP = (".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight", ".lora.up.weight", "_lora.up.weight")
_DENSE = {"lokr_": "LoKr", "hada_": "LoHa", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA"}
_KOHYA = {"lora_unet_": ("unet", "transformer", "trunk"), "lora_te_": ("text_encoder",), "lora_te1_": ("text_encoder",)}
_KOHYA |= {"lora_te2_": ("text_encoder_2",), "lora_transformer_": ("transformer",)}


def read_lora(
    source: str | Path | Mapping[str, Tensor], target: Any, *, name: str = "lora", truncate_to: int | None = None
) -> Patch:
    """A LoRA as a patch for `target` (a module or pipeline). Raises UserError when keys are not understood.

    `truncate_to`: a rank to which LoKr, LoHa and DoRA are cut down; without it they are refused.
    """
    tensors, settings = _load(source)
    foreign = sorted({kind for mark, kind in _DENSE.items() if any(mark in key for key in tensors)})
    if foreign and truncate_to is None:
        raise UserError(
            f"this is a {' and '.join(foreign)} adapter, not a LoRA: its changes are no thin products; "
            "give truncate_to=RANK to take the nearest one (what is lost is printed)"
        )
    if foreign:
        dense = _dense_entries(tensors, target)
        return Patch(entries=dense, method="+".join(foreign).lower(), name=name).truncated(truncate_to or 1)
    if not all(_module_of(key) for key in tensors):
        converted = _through_diffusers(source, target)
        if converted is None:
            odd = next(key for key in tensors if not _module_of(key))
            raise UserError(f"the key {odd!r} is in no LoRA layout that mm reads (peft, diffusers, kohya)")
        tensors, settings = converted
    entries = _entries(tensors, settings, target)
    if entries is None:
        converted = _through_diffusers(source, target)
        entries = None if converted is None else _entries(*converted, target)
    if entries is None:
        unknown = [m for m in _modules(tensors) if _resolve(m, target) is None]
        raise UserError(
            f"{len(_modules(tensors)) - len(unknown)} of {len(_modules(tensors))} LoRA layers are in this model; "
            f"not: {', '.join(unknown[:3])}"
        )
    return Patch(entries=entries, name=name, settings={"alpha": "as in the file"})


def write_lora(patch: Patch, path: str | Path, layout: Layout = "diffusers") -> None:
    """Writes low-rank entries for other programs; the scale goes into `up` (peft, diffusers) or alpha (kohya)."""
    out: dict[str, Tensor] = {}
    for where, entry in patch.entries.items():
        if entry.kind != "lowrank" or entry.scope:
            raise UserError(
                f"{where}: only low-rank entries for all tokens fit into a LoRA file; truncate the patch first"
            )
        down, up = entry.tensors["down"], entry.tensors["up"]
        if layout == "kohya":
            component, _, below = where.partition(".")
            prefix = next((p for p, parts in _KOHYA.items() if component in parts), "")
            flat = f"{prefix}{below}" if prefix else f"lora_unet_{where}"
            flat = flat.replace(".", "_")
            out |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
            out[f"{flat}.alpha"] = torch.tensor(entry.scale * len(down))
        else:
            stem = f"base_model.model.{where}" if layout == "peft" else where
            out |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": entry.scale * up}
    write_bytes(Path(path), save({k: t.contiguous() for k, t in out.items()}, metadata={"format": "pt"}))


def _load(source: str | Path | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if isinstance(source, Mapping):
        return dict(source), {}
    path = Path(source)
    if not path.is_file():
        raise UserError(f"no LoRA at {path}; give a .safetensors file")
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            text = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
            settings = json.loads(text)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} is no safetensors file ({error}); pickled adapters are not read") from error
    beside = path.parent / "adapter_config.json"
    if not settings and beside.is_file():
        settings = json.loads(beside.read_text(encoding="utf-8"))
    return tensors, settings


def _module_of(key: str) -> str | None:
    """The module that a key belongs to; None when it is no LoRA key."""
    for end in (*_DOWN, *_UP, ".alpha"):
        if key.endswith(end):
            return key.removesuffix(end).removeprefix("base_model.model.").replace(".processor.", ".")
    return None


def _modules(tensors: Mapping[str, Tensor]) -> list[str]:
    return list(dict.fromkeys(m for key in tensors if (m := _module_of(key))))


def _resolve(module: str, target: Any) -> str | None:
    """The path of a module in the target, with its component's name; flattened names are told by all linear layers."""
    roots = roots_of(target)
    paths = {f"{name}.{path}".strip("."): None for name, root in roots.items() for path, _ in linears(root)}
    plain = {path.replace(".base_layer", ""): path for path in paths}
    candidates = [module, *(module.partition(".")[2:] if "" in roots else ())]
    below = module.partition(".")[2]  # under another program's name for the part: "transformer.", "unet."
    candidates += [f"{name}.{path}" for name in roots if name for path in (module, below)]
    for candidate in candidates:
        if candidate in plain:
            return plain[candidate]
    for prefix, parts in _KOHYA.items():
        if module.startswith(prefix):
            rest = module.removeprefix(prefix)
            for path in plain:
                component, _, below = path.partition(".") if "" not in roots else ("", "", path)
                if below.replace(".", "_") == rest and (not component or component in parts):
                    return plain[path]
    return None


def _strength(module: str, rank: int, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> float:
    """alpha / rank of a layer, by whichever convention the file has."""
    for key in (f"{module}.alpha", f"base_model.model.{module}.alpha"):
        if key in tensors:
            return float(tensors[key]) / rank
    prefix = module.partition(".")[0]
    own = {k.removeprefix(f"{prefix}."): v for k, v in settings.items() if k.startswith(f"{prefix}.")} or settings
    pattern = own.get("alpha_pattern") or {}
    named = (v for k, v in pattern.items() if re.fullmatch(rf"(.*\.)?({k})", module))  # peft's rule: ends of names
    alpha = next(named, own.get("lora_alpha"))
    if alpha is None:
        return 1.0
    return float(alpha) / (math.sqrt(rank) if own.get("use_rslora") else rank)


def _entries(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], target: Any) -> dict[str, Entry] | None:
    """Low-rank entries by path; None when a module is not in the target."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module = _module_of(key) or ""
        side = "down" if key.endswith(_DOWN) else "up" if key.endswith(_UP) else None
        if side:
            if tensor.ndim == 4 and tensor.shape[2:] != (1, 1):
                raise UserError(
                    f"{key} is a {tensor.shape[2]} x {tensor.shape[3]} convolution; branches go onto linears"
                )
            halves.setdefault(module, {})[side] = tensor.flatten(1)
    out = {}
    for module, pair in halves.items():
        path = _resolve(module, target)
        if path is None:
            return None
        if set(pair) != {"down", "up"}:
            raise UserError(f"{module} has only its {next(iter(pair))} half; the file is incomplete")
        out[path] = Entry(kind="lowrank", tensors=pair, scale=_strength(module, len(pair["down"]), tensors, settings))
    return out


def _through_diffusers(source: Any, target: Any) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The same LoRA in diffusers' layout, converted by the pipeline's own class; None when it has no such call."""
    convert = getattr(type(target), "lora_state_dict", None)
    if convert is None or isinstance(target, nn.Module):
        return None
    given = dict(source) if isinstance(source, Mapping) else str(source)
    result = convert(given, return_alphas=True) if "Flux" in type(target).__name__ else convert(given)
    tensors, alphas = result if isinstance(result, tuple) else (result, None)
    return dict(tensors) | {k: torch.as_tensor(float(v)) for k, v in (alphas or {}).items()}, {}


def _dense_entries(tensors: Mapping[str, Tensor], target: Any) -> dict[str, Entry]:
    """LoKr, LoHa and DoRA as dense changes."""
    grouped: dict[str, dict[str, Tensor]] = {}
    marks = (".lokr_", ".hada_", ".dora_scale", ".lora_magnitude_vector", *_DOWN, *_UP, ".alpha")
    for key, tensor in tensors.items():
        mark = next((m for m in marks if m in key), None)
        if mark is None:
            raise UserError(f"the key {key!r} is not understood")
        stem, _, rest = key.partition(mark)
        grouped.setdefault(stem.removeprefix("base_model.model."), {})[(mark + rest).strip(".")] = tensor.float()
    out = {}
    for module, parts in grouped.items():
        path = _resolve(module, target)
        if path is None:
            raise UserError(f"{module} is in no layer of this model")
        out[path] = Entry(kind="dense", tensors={"delta": _delta(parts, path, target)})
    return out


def _delta(parts: Mapping[str, Tensor], path: str, target: Any) -> Tensor:
    """The change of a weight that an adapter's parts stand for (LyCORIS' conventions)."""

    def factor(name: str) -> Tensor:
        whole = parts.get(name)
        return parts[f"{name}_a"] @ parts[f"{name}_b"] if whole is None else whole

    alpha = float(parts["alpha"]) if "alpha" in parts else None
    if "hada_w1_a" in parts:
        delta = factor("hada_w1") * factor("hada_w2")
        return delta * (1.0 if alpha is None else alpha / parts["hada_w1_b"].shape[0])
    if any(name.startswith("lokr_") for name in parts):
        rank = next((t.shape[0] for n, t in parts.items() if n.endswith("_b")), None)
        delta = torch.kron(factor("lokr_w1"), factor("lokr_w2"))
        return delta * (1.0 if alpha is None or rank is None else alpha / rank)
    down = next(t for n, t in parts.items() if n in [e.strip(".") for e in _DOWN])
    up = next(t for n, t in parts.items() if n in [e.strip(".") for e in _UP])
    delta = up @ down * (1.0 if alpha is None else alpha / len(down))
    magnitude = next(t for n, t in parts.items() if "dora_scale" in n or "magnitude" in n).flatten()
    name, _, below = path.partition(".") if "" not in roots_of(target) else ("", "", path)
    layer: Any = roots_of(target)[name].get_submodule(below)
    weight = layer.weight.detach().float()
    merged = weight + delta
    return merged * (magnitude / merged.norm(dim=1))[:, None] - weight
