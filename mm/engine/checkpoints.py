"""The weights of a checkpoint in one file as ordinary tensors, whatever program wrote it; what is packed is refused.

Design choices
- ComfyUI's 8-bit floats come with a scale for each layer (`scale_weight`, in newer files `weight_scale`). diffusers
  passes these over, and the weights would be hundreds of times too large; so they are multiplied here.
- Integers and 4-bit floats (bitsandbytes, GGUF, NVFP4, int8) are refused by name: most of them cannot become 16-bit
  weights without the program that packed them, and quantizing rounded weights again would err twice.
- Names of the format are removed here, so that what diffusers still does not know is a fault of the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.core.errors import UserError, shown
from mm.core.safe_json import parse_object
from mm.core.safe_tensors import INTEGERS, Header, load_tensors, read_header

_SCALES = (".scale_weight", ".weight_scale")
_INPUT_SCALES = (".scale_input", ".input_scale")  # of inputs that are rounded, which is not done here
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_LAYER = ".comfy_quant"  # JSON of one layer, as bytes
_LAYERS = "_quantization_metadata"  # JSON of all layers, in the metadata
_PACKERS = {  # parts of tensor names that one program alone writes
    ".quant_state.bitsandbytes": "bitsandbytes (4 bits)",
    ".SCB": "bitsandbytes (8 bits)",
    ".weight_scale_2": "NVFP4",
    "._data": "quanto",
}
PREFIX = "model.diffusion_model."
_PREFIXES = (PREFIX, "diffusion_model.", "transformer.", "unet.")


def check_plain(header: Header) -> None:
    """Raises UserError where a file holds weights that another program has packed.

    Args:
        header: of a checkpoint in one file.
    """
    for name, tensor in header.tensors.items():
        packer = next((packer for part, packer in _PACKERS.items() if part in name), "")
        if packer or (name.endswith(".weight") and tensor.dtype in INTEGERS):
            by = f", packed by {packer}" if packer else ""
            raise UserError(
                f"{header.path}: {shown(name, 120)} is of type {tensor.dtype}{by}; give the file with weights of 16 "
                "bits, or of 8-bit floats"
            )


def scaled(header: Header) -> bool:
    """Whether a file holds weights that count only with their scales."""
    return any(name.endswith(_SCALES) for name in header.tensors)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a denoiser alone, with scales multiplied into the weights.

    Args:
        path: a safetensors file, of any suffix.

    Returns:
        Tensors by their names in the file, without a prefix that all of them have. Scaled weights are bfloat16.

    Raises:
        UserError: where the file is damaged or packed by another program, or a scale does not fit its weights.
    """
    header = read_header(path, "checkpoint")
    check_plain(header)
    _check_formats(header)
    tensors = load_tensors(header)
    for name in [name for name in tensors if name.endswith(_SCALES)]:
        _multiply(tensors, name, path)
    ours = (*_INPUT_SCALES, _LAYER)
    kept = {name: x for name, x in tensors.items() if not name.endswith(ours) and _last(name) != "scaled_fp8"}
    prefix = next((prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in kept)), "")
    return {name.removeprefix(prefix): tensor for name, tensor in kept.items()}


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _multiply(tensors: dict[str, Tensor], name: str, path: Path) -> None:
    """Takes a scale out of the tensors, and multiplies its weights by it."""
    scale = tensors.pop(name)
    weight = next(name.removesuffix(end) for end in _SCALES if name.endswith(end)) + ".weight"
    if weight not in tensors:
        raise UserError(f"{path}: {shown(name, 120)} has no {shown(weight, 120)} that it scales; copy the file again")
    own = tensors[weight]
    fits = scale.numel() == 1 or (own.ndim > 0 and scale.numel() == own.shape[0] == scale.shape[0])
    if not scale.is_floating_point() or not fits:
        raise UserError(
            f"{path}: {shown(name, 120)} has shape {list(scale.shape)} and type "
            f"{str(scale.dtype).removeprefix('torch.')}; one float for {shown(weight, 120)}, or one a row, is read"
        )
    by = scale.float().reshape(-1, *[1] * (own.ndim - 1)) if scale.numel() > 1 else scale.float().reshape(())
    tensors[weight] = (own.float() * by).to(torch.bfloat16)


def _check_formats(header: Header) -> None:
    """Raises UserError where the file says that a layer has another format than 8-bit floats."""
    names = [name for name in header.tensors if name.endswith(_LAYER)]
    layers: dict[str, Any] = {}
    if _LAYERS in header.metadata:
        found = parse_object(header.metadata[_LAYERS].encode(), f"{header.path}: {_LAYERS}").get("layers")
        layers |= found if isinstance(found, dict) else {}
    for name, tensor in load_tensors(header, names).items():
        layers[name.removesuffix(_LAYER)] = parse_object(_bytes(tensor), f"{header.path}: {shown(name, 120)}")
    for layer, said in layers.items():
        kind = said.get("format") if isinstance(said, Mapping) else said
        if kind not in _FORMATS:
            raise UserError(
                f"{header.path}: {shown(layer, 120)} has the format {json.dumps(kind)}; {' and '.join(_FORMATS)} are "
                "read; give the file with weights of 16 bits"
            )


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.flatten().view(torch.uint8).tolist())
