"""Files of other erasers as patches, and patches as files that other programs read.

Read are
- partial checkpoints, as the scripts of UCE and ESD write them: new weights of some layers, under the denoiser's own
  names, with or without the component in front. The patch is the difference to the model that is given. Where that is
  of low rank, as UCE's is, the entries are low-rank, so that they go onto a 4-bit model as they are;
- LECO's LoRAs (sd-scripts): kohya's layout, which `mm.read_lora` reads.

Written are LoRA files in every layout of `mm.adapters.formats.writer`: "diffusers" and "kohya" serve diffusers, A1111,
Forge and ComfyUI.

Legend: N outputs, D inputs, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm.adapters.entry import Entry
from mm.adapters.formats.reader import read_lora
from mm.adapters.formats.writer import Layout, write_lora
from mm.adapters.patch import Patch
from mm.core.errors import UserError
from mm.core.nouns import counted
from mm.core.safe_tensors import read_tensors
from mm.families.registry import is_denoiser, is_text_encoder
from mm.layers.base_hash import base_hash
from mm.layers.linear import BranchedLinear
from mm.layers.offloading import stored
from mm.layers.surgery import roots_of

LOW = 64  # at most this rank is kept as a low-rank entry
TOLERANCE = 1e-3  # of the change's norm that a low-rank entry may lose
_LORA = (".lora_", "lora_unet_", "lora_te", ".hada_", ".lokr_", "lora_transformer_")


def read_erasure(path: str | Path, target: Any, *, name: str | None = None) -> Patch:
    """A file of another eraser as a patch.

    Args:
        path: safetensors: a partial checkpoint of UCE or ESD, or a LoRA of LECO.
        target: the model or pipeline that it was made for, with 16-bit weights and without patches.
        name: of the patch; by default the name of the file without its suffix.

    Returns:
        The patch, not applied.

    Raises:
        UserError: where the file is none of these, a tensor fits no layer, or nothing differs from the model.
    """
    file = Path(path)
    tensors = read_tensors(file, "erasure file").tensors
    name = file.stem if name is None else name
    if any(part in key for key in tensors for part in _LORA):
        made = read_lora(file, target, name=name)
        made.method = "leco"
        return made
    modules = _modules(target)
    entries: dict[str, Entry] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        found = modules.get(key)
        if found is None:
            unknown.append(key)
            continue
        where, module, part = found
        entry = _entry(where, module, part, tensor)
        if entry is not None:
            entries[where if part == "weight" else f"{where}.bias"] = entry
    if unknown:
        raise UserError(
            f"{file}: {len(unknown)} of {counted(len(tensors), 'tensor')} fit no layer of "
            f"{type(target).__name__}, {unknown[0]!r} "
            "first; give the model that the file was made for"
        )
    if not entries:
        raise UserError(f"{file} holds the model's own weights: nothing is erased by it")
    first = next(iter(entries)).partition(".")[0]
    roots = roots_of(target)
    base = base_hash(roots.get(first, next(iter(roots.values()))))
    report = {"file": file.name, "layers": list(entries)}
    return Patch(entries=entries, method="partial checkpoint", base=base, name=name, report=report)


def _modules(target: Any) -> dict[str, tuple[str, nn.Module, str]]:
    """Names of tensors in such files -> path below the pipeline, module, and which tensor of it."""
    found: dict[str, tuple[str, nn.Module, str]] = {}
    roots = roots_of(target)
    drawn = [n for n, r in roots.items() if len(roots) == 1 or is_denoiser(r)]
    for name, root in roots.items():
        if name not in drawn and not is_text_encoder(root):
            continue
        for path, module in root.named_modules():
            for part in ("weight", "bias"):
                if getattr(module, part, None) is not None and not isinstance(module, nn.Embedding):
                    whole = f"{name}.{path}".strip(".")
                    found[f"{whole}.{part}"] = (whole, module, part)
                    if name in drawn:
                        found.setdefault(f"{path}.{part}", (whole, module, part))
    return found


def _entry(where: str, module: nn.Module, part: str, new: Tensor) -> Entry | None:
    """The change of one tensor; None where there is none."""
    if isinstance(module, BranchedLinear):
        raise UserError(f"{where} is quantized or carries a patch; read the file against the plain 16-bit model")
    old = stored(module, part)
    if old is None or old.shape != new.shape:
        shape = None if old is None else list(old.shape)
        raise UserError(f"{where}.{part} has shape {list(new.shape)} in the file and {shape} in the model")
    delta = new.float() - old.detach().float().cpu()
    if float(delta.norm()) <= 1e-6 * float(old.float().norm()):
        return None
    if part == "bias":
        return Entry(kind="bias", tensors={"delta": delta})
    if delta.ndim != 2:
        return Entry(kind="dense", tensors={"delta": delta})
    return _thin(delta) or Entry(kind="dense", tensors={"delta": delta})


def _thin(delta_ND: Tensor) -> Entry | None:
    """A low-rank entry that loses next to nothing, where there is one."""
    left, sizes, right = torch.linalg.svd(delta_ND, full_matrices=False)
    tails = sizes.flip(0).square().cumsum(0).flip(0).sqrt() / sizes.norm()
    rank = int((tails > TOLERANCE).sum())
    if not 0 < rank <= min(LOW, min(delta_ND.shape) // 2):
        return None
    root = sizes[:rank].sqrt()
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    return Entry(kind="lowrank", tensors={"down": down.contiguous(), "up": up.contiguous()})


def export(
    patch: Patch, path: str | Path, layout: Layout = "diffusers", *, target: Any = None, rank: int = 64
) -> Patch:
    """Writes an erasure as a LoRA file of another program.

    Args:
        patch: of any method. Changes of whole weights and rotations are truncated to `rank` where the layout holds no
            others; what that loses is printed and in the report of the patch that is returned.
        path: the file; one that is there is replaced, as a whole.
        layout: "diffusers", "peft", "kohya" or "comfyui".
        target: the model, which rotations and some layouts need.
        rank: of truncated entries.

    Returns:
        The patch as it was written.

    Raises:
        UserError: for what the layout cannot hold; nothing is written then.
    """
    kinds = {entry.kind for entry in patch.entries.values()}
    if "rotation" in kinds or ("dense" in kinds and layout in ("diffusers", "peft")):
        patch = patch.truncated(rank, target)
    write_lora(patch, path, layout, target=target)
    return patch


def partial_checkpoint(patch: Patch, target: Any) -> Mapping[str, Tensor]:
    """The new weights of a patch's layers, named as UCE's and ESD's scripts name them."""
    made: dict[str, Tensor] = {}
    modules = {whole: module for whole, module, part in _modules(target).values() if part == "weight"}
    for where, entry in patch.entries.items():
        if where not in modules or entry.kind not in ("lowrank", "dense"):
            raise UserError(f"{where}: an entry of kind {entry.kind!r} is no new weight of one layer")
        old = stored(modules[where], "weight")
        assert old is not None
        t = entry.tensors
        delta = t["up"] @ t["down"] if entry.kind == "lowrank" else t["delta"]
        made[f"{where}.weight"] = (old.detach().float().cpu() + entry.scale * delta).to(old.dtype)
    return made
