"""The blocks by which orthogonal adapters (OFT) turn a weight, computed in fp32 once the shapes fit.

Sources: Qiu et al. 2023, OFT, arXiv 2306.07280. A block's rotation comes from a skew-symmetric matrix Q by Cayley's
transform. Files differ in the rest:

- peft (`oft_R`) turns a layer's inputs: W' = W R^T. It keeps the upper triangle of Q in rows. R is (I - Q)(I + Q)^-1,
  or with `use_cayley_neumann` a series of (I + Q)(I - Q)^-1 cut after some terms (Qiu et al. 2025, arXiv 2506.19847).
- kohya's scripts and LyCORIS (`oft_blocks`) turn its outputs: W' = R^T W, R = (I + Q)(I - Q)^-1 with Q = B - B^T. The
  norm of Q is at most alpha times the outputs; LyCORIS takes an alpha of 0 for no bound, and may scale the outputs
  (`rescale`).

Legend: N outputs, K inputs, r blocks of b x b values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mm.adapters.cayley import side_of
from mm.adapters.entry import Entry
from mm.adapters.factors import MOST_TERMS
from mm.adapters.formats.layouts import Parts
from mm.core.errors import UserError

KOHYA = "oft_unet_"  # names in files of kohya's scripts begin so
PARTS = {"oft_R", "oft_blocks", "rescale"}
_TERMS = 5  # of peft's series, by default


def blocks_of(module: str, parts: Parts, shape: tuple[int, ...], settings: Mapping[str, Any]) -> Entry:
    """The blocks of a matrix B, W' - W = W B or B W, as an entry of the kind that says which.

    Args:
        module: its name in the file.
        parts: its tensors.
        shape: of the layer's weight.
        settings: peft's, for the module.

    Raises:
        UserError: where the tensors do not fit, or do not say how they are meant.
    """
    extra = set(parts.tensors) - PARTS - {"alpha"}
    if extra or len(PARTS & set(parts.tensors) - {"rescale"}) != 1:
        raise UserError(f"{module} has tensors of several adapters at once: {', '.join(parts.keys.values())}")
    if "oft_R" in parts.tensors:
        return _of_inputs(module, parts, shape, settings)
    return Entry(kind="output_blocks", tensors={"blocks": _of_outputs(module, parts, shape[0])})


def _of_inputs(module: str, parts: Parts, shape: tuple[int, ...], settings: Mapping[str, Any]) -> Entry:
    """peft's, of a layer's inputs."""
    if "alpha" in parts.tensors or "rescale" in parts.tensors:
        raise UserError(f"{module} has tensors of several adapters at once: {', '.join(parts.keys.values())}")
    if math.prod(shape[2:]) > 1:
        raise UserError(f"{module} is a convolution over several pixels, whose inputs peft's OFT turns apart; not read")
    neumann, terms = settings.get("use_cayley_neumann"), settings.get("num_cayley_neumann_terms", _TERMS)
    if (
        not isinstance(neumann, bool)
        or isinstance(terms, bool)
        or not isinstance(terms, int)
        or not 1 <= terms <= MOST_TERMS
    ):
        raise UserError(
            f"{parts.keys['oft_R']!r} is an OFT of peft whose settings do not say how it is meant (use_cayley_neumann, "
            "num_cayley_neumann_terms); keep adapter_config.json beside the file"
        )
    rows, key = parts.tensors["oft_R"], parts.keys["oft_R"]
    side = side_of(rows.shape[-1])
    inputs = math.prod(shape[1:])
    shared = rows.ndim == 2 and len(rows) == 1 and side != inputs
    if rows.ndim != 2 or not side or inputs % side or (
        not shared and len(rows) * side != inputs
    ):  # fmt: skip
        raise UserError(f"{key!r} has shape {tuple(rows.shape)}, and {module} has {inputs} inputs here")
    return Entry(kind="oft", tensors={"skew": rows, "terms": torch.tensor([terms if neumann else 0])})


def _of_outputs(module: str, parts: Parts, outputs: int) -> Tensor:
    """R^T - I of each block of outputs, or with scales s of outputs s R^T - I."""
    blocks, key = parts.tensors["oft_blocks"].float(), parts.keys["oft_blocks"]
    if blocks.ndim == 4:
        raise UserError(f"{key!r} is of a BOFT of LyCORIS (shape {tuple(blocks.shape)}), which mm does not apply")
    if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2] or blocks.shape[0] * blocks.shape[1] != outputs:
        raise UserError(f"{key!r} has shape {tuple(blocks.shape)}, and {module} has {outputs} outputs here")
    skew = blocks - blocks.transpose(1, 2)
    alpha = float(parts.tensors["alpha"]) if "alpha" in parts.tensors else None
    if alpha is not None and (alpha > 0 or module.startswith(KOHYA)):
        norm = float(skew.norm())
        skew = skew * (min(norm, max(0.0, alpha) * outputs) + 1e-8) / (norm + 1e-8)
    eye = torch.eye(blocks.shape[1])
    rotation = torch.linalg.solve(eye - skew, eye + skew, left=False)
    made = rotation.transpose(1, 2)
    if "rescale" not in parts.tensors:
        return made - eye
    scale = parts.tensors["rescale"].float()
    if scale.numel() != outputs:
        raise UserError(
            f"{parts.keys['rescale']!r} has shape {tuple(scale.shape)}; {module} has {outputs} outputs here"
        )
    return made * scale.view(len(blocks), -1, 1) - eye
