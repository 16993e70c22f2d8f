"""LoRA files of every layout and kind: by peft and diffusers where they write them, else by their published formulas.

`made(family, layout, kind, folder)` gives a file (or tensors) and the model outputs that the writing program, and where
it reads the layout diffusers, has with it. Formulas: kohya's networks/lora.py, LyCORIS (Yeh et al. 2024), DoRA (Liu et
al. 2024); written here from the papers, apart from mm's reader.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lora_families import FAMILIES, Named, fresh, noise, pipeline_of, run
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

LAYOUTS = ("diffusers", "peft", "kohya", "kohya-LDM", "ComfyUI", "XLabs", "attention processors")
KINDS = ("LoRA", "rsLoRA", "DoRA", "LoHa", "LoKr", "LoCon 1x1", "LoCon 3x3")
RANK, ALPHA = 4, 3.0
LDM_CONVS = ("input_blocks.4.0.skip_connection", "input_blocks.1.0.in_layers.2")


@dataclass(kw_only=True)
class Made:
    """`source` for `read_lora`, and the outputs to reach, by the program that gave them."""

    source: Any
    wanted: dict[str, Tensor]
    keys: int


def why_not(family: str, layout: str, kind: str) -> str:
    """Why there are no such files; empty where there are."""
    unet = FAMILIES[family].part == "unet"
    if layout == "kohya-LDM" and not unet:
        return "block numbers of latent diffusion are a UNet's"
    if layout == "XLabs" and family != "FLUX":
        return "XLabs writes for FLUX only"
    if layout in ("XLabs", "attention processors") and kind != "LoRA":
        return "the layout holds plain LoRAs only"
    place = ("LoCon 1x1", "LoCon 3x3").index(kind) if kind.startswith("LoCon") else None
    if place is not None and not FAMILIES[family].convs[place]:
        return "the model has no such convolution"
    return ""


def cells() -> Iterator[tuple[str, str, str]]:
    """Family, layout and kind of all files that there are."""
    for cell in itertools.product(FAMILIES, LAYOUTS, KINDS):
        if not why_not(*cell):
            yield cell


def made(family: str, layout: str, kind: str, folder: Path) -> Made:
    """A file of one cell of the table, with the outputs to reach."""
    if layout in ("diffusers", "peft"):
        return _by_peft(family, layout, kind, folder)
    return _by_formula(family, layout, kind)


# ---- by peft and diffusers ------------------------------------------------------------------------------------------


def peft_config(family: str, kind: str) -> Any:
    spec = FAMILIES[family]
    layers = spec.linears
    if kind.startswith("LoCon"):
        layers = [spec.convs[("LoCon 1x1", "LoCon 3x3").index(kind)]]
    common: dict[str, Any] = {"r": RANK, "target_modules": layers}
    if kind == "LoHa":
        return LoHaConfig(**common, alpha=ALPHA, init_weights=False)
    if kind == "LoKr":
        return LoKrConfig(**common, alpha=ALPHA, init_weights=False, decompose_both=True)
    pattern = {f"^{layers[0]}": 7.0}
    extra = {"use_rslora": kind == "rsLoRA", "use_dora": kind == "DoRA", "alpha_pattern": pattern}
    return LoraConfig(**common, lora_alpha=ALPHA, init_lora_weights=False, **extra)


def _stir(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.0 + 0.3 * noise(*parameter.shape, seed=5)


def _by_peft(family: str, layout: str, kind: str, folder: Path) -> Made:
    torch.manual_seed(11)
    twin, config = fresh(family), peft_config(family, kind)
    if layout == "peft":
        wrapped = get_peft_model(twin, config)
        _stir(wrapped)
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)
        tensors = get_peft_model_state_dict(wrapped)
    else:
        part, pipeline = FAMILIES[family].part, FAMILIES[family].pipeline
        twin.add_adapter(config)
        _stir(twin)
        tensors = get_peft_model_state_dict(twin)
        layers = {f"{part}_lora_layers": tensors, f"{part}_lora_adapter_metadata": config.to_dict()}
        pipeline.save_lora_weights(str(folder), **layers)
    return Made(source=folder, wanted={layout: run(family, twin.eval())}, keys=len(tensors))


# ---- by formula -----------------------------------------------------------------------------------------------------


def _names(family: str, layout: str, kind: str) -> list[tuple[str, Named, bool]]:
    """Name in the file, what it stands for, and whether diffusers reads it."""
    spec, unet = FAMILIES[family], FAMILIES[family].part == "unet"
    ldm = unet and layout in ("kohya-LDM", "ComfyUI")
    if kind.startswith("LoCon"):
        index = ("LoCon 1x1", "LoCon 3x3").index(kind)
        name = (
            LDM_CONVS[index] if ldm else {"pos_embed.proj": "x_embedder.proj"}.get(spec.convs[index], spec.convs[index])
        )
        named = [((name, [spec.convs[index]], False), False)]
    else:
        # diffusers maps block numbers for SDXL only; of SD 1.5 it leaves such layers out.
        named = [(n, not ldm or (layout == "kohya-LDM" and family == "SDXL")) for n in
                 (spec.ldm if ldm else spec.original)]  # fmt: skip
        named += [(n, False) for n in (() if ldm else spec.only_ours)]
    if layout == "XLabs":
        return _xlabs()
    if layout == "attention processors":
        return _processors(family)
    flat = layout.startswith("kohya")
    return [("lora_unet_" + n[0].replace(".", "_") if flat else f"diffusion_model.{n[0]}", n, r) for n, r in named]


def _xlabs() -> list[tuple[str, Named, bool]]:
    attention = "transformer_blocks.0.attn."
    found = {
        "double_blocks.0.processor.qkv_lora1": [attention + a for a in ("to_q", "to_k", "to_v")],
        "double_blocks.0.processor.qkv_lora2": [attention + a for a in ("add_q_proj", "add_k_proj", "add_v_proj")],
        "double_blocks.0.processor.proj_lora1": [attention + "to_out.0"],
        "double_blocks.0.processor.proj_lora2": [attention + "to_add_out"],
        "single_blocks.1.processor.qkv_lora": [f"single_transformer_blocks.1.attn.to_{a}" for a in "qkv"],
        "single_blocks.1.processor.proj_lora": ["single_transformer_blocks.1.proj_out"],
    }
    return [(name, (name, paths, False), True) for name, paths in found.items()]


def _processors(family: str) -> list[tuple[str, Named, bool]]:
    spec, found = FAMILIES[family], []
    for path in spec.linears:
        parent, _, leaf = path.removesuffix(".0").rpartition(".")
        if leaf in ("to_q", "to_k", "to_v", "to_out"):
            name = f"{spec.part}.{parent}.processor.{leaf}_lora"
            found.append((name, (name, [path], False), spec.part == "unet"))
    return found


def _by_formula(family: str, layout: str, kind: str) -> Made:
    twin, read, tensors = fresh(family), {}, {}
    for seed, (stem, (_, paths, swapped), readable) in enumerate(_names(family, layout, kind)):
        layers = [twin.get_submodule(path) for path in paths]
        weight = torch.cat([layer.weight for layer in layers])
        weight = _swapped(weight) if swapped else weight
        part, changed = factors(layout, kind, stem, weight, seed)
        changed = _swapped(changed) if swapped else changed
        for layer, rows in zip(layers, changed.split([len(layer.weight) for layer in layers]), strict=True):
            layer.weight.data = rows.clone()
        tensors |= part
        read |= part if readable else {}
    wanted = {"the formula": run(family, twin)}
    if kind in ("LoRA", "rsLoRA") and len(read) == len(tensors):
        wanted["diffusers"] = _diffusers(family, read)
    return Made(source=tensors, wanted=wanted, keys=len(tensors))


def _diffusers(family: str, tensors: dict[str, Tensor]) -> Tensor:
    model = fresh(family)
    pipeline_of(family, model).load_lora_weights({k: t.clone() for k, t in tensors.items()}, adapter_name="a")
    return run(family, model.eval())


def _swapped(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def factors(layout: str, kind: str, stem: str, weight: Tensor, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """An adapter's tensors for one layer, and the weight with it."""
    outputs, rest = len(weight), weight[0].numel()
    g = itertools.count(100 * seed + 1)

    def random(*shape: int) -> Tensor:
        return noise(*shape, seed=next(g)) / shape[-1] ** 0.5

    if kind == "LoHa":
        a, b, c, d = random(outputs, RANK), random(RANK, rest), random(outputs, RANK), random(RANK, rest)
        parts = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": torch.tensor(ALPHA)}
        delta = ALPHA / RANK * torch.einsum("nr,rk,ns,sk->nk", a, b, c, d)
    elif kind == "LoKr":
        rows, columns = (2 if size % 2 == 0 else 1 for size in (outputs, rest))
        left, a, b = random(rows, columns), random(outputs // rows, RANK), random(RANK, rest // columns)
        parts = {"lokr_w1": left, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(ALPHA)}
        delta = ALPHA / RANK * torch.einsum("ac,br,rd->abcd", left, a, b).reshape(outputs, rest)
    else:
        down, up = random(RANK, *weight.shape[1:]), random(outputs, RANK)
        up = up.reshape(outputs, RANK, *[1] * (weight.ndim - 2))
        parts, scale = _lora_parts(layout, kind, down, up)
        delta = scale * (up.flatten(1) @ down.flatten(1))
    changed = weight + delta.reshape(weight.shape)
    if kind == "DoRA":
        norm = changed.flatten(1).norm(dim=1)
        magnitude = norm * (1.0 + 0.3 * random(outputs))
        parts["dora_scale"] = magnitude.reshape(-1, *[1] * (weight.ndim - 1))
        changed = changed * (magnitude / norm).reshape(-1, *[1] * (weight.ndim - 1))
    return {f"{stem}.{part}": tensor.contiguous() for part, tensor in parts.items()}, changed


def _lora_parts(layout: str, kind: str, down: Tensor, up: Tensor) -> tuple[dict[str, Tensor], float]:
    if layout in ("XLabs", "attention processors"):
        return {"down.weight": down, "up.weight": up}, 1.0
    if layout == "ComfyUI" and kind == "LoRA":
        return {"lora_A.weight": down, "lora_B.weight": up}, 1.0
    scale = ALPHA / RANK**0.5 if kind == "rsLoRA" else ALPHA / RANK  # LyCORIS saves rsLoRA's alpha for alpha / rank
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(scale * RANK)}, scale


# ---- the table in the docs ------------------------------------------------------------------------------------------


def table() -> str:
    """The cells as a Markdown table: which families a layout and kind is tested for, and why the others are not."""
    reasons: list[str] = []
    lines = ["| layout | " + " | ".join(KINDS) + " |", "|---" * (1 + len(KINDS)) + "|"]
    for layout in LAYOUTS:
        row = [_cell(layout, kind, reasons) for kind in KINDS]
        lines.append(f"| {layout} | " + " | ".join(row) + " |")
    notes = [f"{number}. {reason[0].upper()}{reason[1:]}." for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes])


def _cell(layout: str, kind: str, reasons: list[str]) -> str:
    works = [family for family in FAMILIES if not why_not(family, layout, kind)]
    missing = dict.fromkeys(why for family in FAMILIES if (why := why_not(family, layout, kind)))
    for why in missing:
        if why not in reasons:
            reasons.append(why)
    marks = ", ".join(f"({reasons.index(why) + 1})" for why in missing)
    return ("all 8" if not missing else f"{', '.join(works) or '-'} {marks}").strip()


def write_table(docs: Path) -> None:
    """Puts the table between its marks in docs/adapters.md."""
    text = docs.read_text(encoding="utf-8")
    head, _, rest = text.partition(TABLE_MARKS[0])
    docs.write_text(f"{head}{TABLE_MARKS[0]}\n\n{table()}\n\n{TABLE_MARKS[1]}{rest.partition(TABLE_MARKS[1])[2]}")


TABLE_MARKS = ("<!-- table of LoRA files: python tests/lora_writers.py -->", "<!-- end of the table -->")

if __name__ == "__main__":
    write_table(Path(__file__).resolve().parents[1] / "docs" / "adapters.md")
