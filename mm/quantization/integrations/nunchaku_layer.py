"""One quantized layer of a Nunchaku file as what mm computes with: integers, scales, smoothing, branch, bias.

Design choices
- INT4 weights and their scales are taken over exactly: same integers, same scales, our order.
- NVFP4 weights become 8-bit ones in groups of 64, their inputs stay at 16 bits. Our kernels have no FP4; at 8 bits the
  layer keeps its smoothing and branch apart and takes half the memory of 16. Rounding again errs by about 0.6 % of the
  weights' norm, where FP4 had erred by some 10 %.
- AWQ's weights have a zero point a group: q * scale + zero. Ours have none, so q - 8 are the integers, and what is
  left, one number a row and group, is a branch whose `down` sums a group's inputs: the same layer, not a near one.
- INT4 files round what comes out of a GELU without a sign, shifted, and have taken the shift's part off the bias. Where
  inputs are not rounded that way here, that part is put back (`unshifted`).

Legend: N outputs, K inputs, G groups of 64, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mm.kernels.packing import GROUP
from mm.layers.linear import ActivationRule, BranchedLinear
from mm.quantization.integrations import nunchaku_layout as layout
from mm.quantization.numerics import Rounded, group_scales, round_to_nearest

GELU_SHIFT = 0.171875
MICRO = 16  # inputs a scale of NVFP4
TILE = 16  # ranks a tile
_W4A4 = {"qweight", "wscales"}
_W4A4_MAY = {"bias", "smooth_factor", "smooth_factor_orig", "proj_down", "proj_up", "wcscales", "wtscale"}
_AWQ = {"qweight", "wscales", "wzeros"}

_HALF = ("BF16", "F16", "F32")

Get = Callable[[str], Tensor]
Header = tuple[tuple[int, ...], str]  # shape and safetensors' name of the type


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """A layer, or some columns of one. shift: of inputs that are rounded without a sign; 0 = with one."""

    integers: Rounded
    bits: int
    bias_N: Tensor | None
    smooth_K: Tensor | None = None
    down_RK: Tensor | None = None
    up_NR: Tensor | None = None
    shift: float = 0.0

    def unshifted(self) -> Piece:
        """The same layer with a bias for inputs that are not shifted."""
        if not self.shift:
            return self
        steps = 1.0 if self.smooth_K is None else 1.0 / self.smooth_K.float()
        lifted_N = (self.integers.dense() * steps).sum(1) * self.shift
        bias = lifted_N if self.bias_N is None else self.bias_N.float() + lifted_N
        return replace(self, bias_N=bias, shift=0.0)

    def rows(self, rows: slice) -> Piece:
        """Some of the outputs."""
        return replace(
            self,
            integers=Rounded(self.integers.values[rows], self.integers.scales[rows]),
            bias_N=None if self.bias_N is None else self.bias_N[rows],
            up_NR=None if self.up_NR is None else self.up_NR[rows],
        )


def joined(pieces: Sequence[Piece]) -> Piece:
    """Pieces that read neighbouring columns of one input, as one layer: their outputs were added."""
    if len(pieces) == 1:
        return pieces[0]
    pieces = [piece.unshifted() for piece in pieces]
    biases = [piece.bias_N.float() for piece in pieces if piece.bias_N is not None]
    branched = [p for p in pieces if p.down_RK is not None and p.up_NR is not None]
    smooth = [
        torch.ones(p.integers.values.shape[1]).to(p.integers.scales) if p.smooth_K is None else p.smooth_K
        for p in pieces
    ]
    return Piece(
        integers=Rounded(
            torch.cat([p.integers.values for p in pieces], 1), torch.cat([p.integers.scales for p in pieces], 1)
        ),
        bits=pieces[0].bits,
        bias_N=torch.stack(biases).sum(0) if biases else None,
        smooth_K=torch.cat(smooth),
        down_RK=_blocks(pieces) if branched else None,
        up_NR=torch.cat([p.up_NR for p in branched if p.up_NR is not None], 1) if branched else None,
    )


def _blocks(pieces: Sequence[Piece]) -> Tensor:
    """Every piece's `down` in its own columns, one below the other."""
    widths = [piece.integers.values.shape[1] for piece in pieces]
    placed = []
    for i, piece in enumerate(pieces):
        if piece.down_RK is not None:
            placed.append(F.pad(piece.down_RK, (sum(widths[:i]), sum(widths[i + 1 :]))))
    return torch.cat(placed)


# ---- from packed tensors ---------------------------------------------------------------------------------------------


def misfit(headers: dict[str, Header], outputs: int, inputs: int) -> str:
    """Why tensors of these names, shapes and types are no layer of that size; empty when they are one."""
    present = set(headers)
    awq = "wzeros" in present
    must, may = (_AWQ, {"bias"}) if awq else (_W4A4, _W4A4_MAY)
    if must - present:
        return f"lacks {', '.join(sorted(must - present))}"
    if present - must - may:
        return f"has {', '.join(sorted(present - must - may))}, which is not known"
    if ("proj_down" in present) != ("proj_up" in present):
        return "has one half of a branch only"
    if awq and (inputs % GROUP or outputs % 4):
        return f"is AWQ's, which takes inputs in groups of {GROUP} and outputs in fours, not {inputs} and {outputs}"
    for name, (_, kind) in headers.items():
        kinds = _types(name, awq)
        if kind not in kinds:
            return f"has a {name} of type {kind}, not {' or '.join(kinds)}"
    if awq:
        want = awq_shapes(outputs, inputs)
    else:
        rank = (headers["proj_down"][0] or (0,))[-1] if "proj_down" in headers else 0
        want = w4a4_shapes(outputs, inputs, rank=rank, fp4=headers["wscales"][1] == "F8_E4M3")
    for name, (shape, _) in headers.items():
        if shape != want.get(name, shape) and not (name == "wtscale" and shape == ()):
            return f"has {name} {list(shape)}, not {list(want[name])}"
    return ""


def _types(name: str, awq: bool) -> tuple[str, ...]:
    """The types that a tensor of a layer may have, by safetensors' names."""
    if name == "qweight":
        return ("I32",) if awq else ("I8", "U8")
    return (*_HALF, "F8_E4M3") if name == "wscales" and not awq else _HALF


def awq_shapes(outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    """Shapes in a file by name."""
    scales = (inputs // GROUP, outputs)
    return {"qweight": (outputs // 4, inputs // 2), "wscales": scales, "wzeros": scales, "bias": (outputs,)}


def w4a4_shapes(outputs: int, inputs: int, *, rank: int, fp4: bool) -> dict[str, tuple[int, ...]]:
    """Shapes in a file by name."""
    n, k = layout.tiled(outputs), layout.tiled(inputs)
    rank = -(-rank // TILE) * TILE
    return {
        "qweight": (n, k // 2),
        "wscales": (k // (MICRO if fp4 else GROUP), n),
        "bias": (n,),
        "smooth_factor": (k,),
        "proj_down": (k, rank),
        "proj_up": (n, rank),
        "wcscales": (n,),
        "wtscale": (1,),
    }


def read_w4a4(get: Get, names: set[str], outputs: int, inputs: int, *, after_gelu: bool) -> Piece:
    """A layer of 4-bit weights and inputs; `get` gives its packed tensors."""
    codes = layout.unpack_codes(get("qweight"))[:outputs, :inputs]
    scales = get("wscales")
    fp4 = scales.dtype == torch.float8_e4m3fn
    vectors = {name: layout.unpack_vector(get(name)) for name in ("bias", "smooth_factor", "wcscales") if name in names}
    if fp4:
        rows = layout.unpack_micro_scales(scales)[:outputs].float()
        if "wcscales" in vectors:
            rows = rows * vectors["wcscales"][:outputs, None].float()
        if "wtscale" in names:
            rows = rows * get("wtscale").float().reshape(())
        integers = _eight_bits(codes, rows)
    else:
        groups = -(-inputs // GROUP)
        integers = Rounded(layout.signed(codes), layout.unpack_scales(scales)[:outputs, :groups])
    branch = "proj_down" in names and get("proj_down").shape[1] > 0
    return Piece(
        integers=integers,
        bits=8 if fp4 else 4,
        bias_N=vectors["bias"][:outputs] if "bias" in vectors else None,
        smooth_K=vectors["smooth_factor"][:inputs] if "smooth_factor" in vectors else None,
        down_RK=layout.unpack_down(get("proj_down"))[:, :inputs] if branch else None,
        up_NR=layout.unpack_up(get("proj_up"))[:outputs] if branch else None,
        shift=GELU_SHIFT if after_gelu and not fp4 else 0.0,
    )


def _eight_bits(codes_NK: Tensor, steps_NG: Tensor) -> Rounded:
    table = torch.tensor(layout.FP4, device=codes_NK.device)
    dense_NK = table[codes_NK.long()] * steps_NG.repeat_interleave(MICRO, 1)[:, : codes_NK.shape[1]]
    return round_to_nearest(dense_NK, group_scales(dense_NK, 8, torch.bfloat16), 8)


def read_awq(get: Get, names: set[str], outputs: int, inputs: int, *, splits: int) -> Piece:
    """A layer of 4-bit weights with zero points and 16-bit inputs, its adaLN rows back in chunks."""

    def chunks(rows: Tensor) -> Tensor:
        return rows.reshape(outputs // splits, splits, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)

    values = chunks(layout.unpack_awq(get("qweight"))).to(torch.int8) - 8
    scales_NG, zeros_NG = (chunks(get(name).T.contiguous()) for name in ("wscales", "wzeros"))
    left_NG = (zeros_NG.float() + 8 * scales_NG.float()).to(scales_NG.dtype)
    bias = None
    if "bias" in names:
        bias = chunks(get("bias")).float()
        if splits > 1:  # diffusers adds the 1 of a scale itself
            bias.view(splits, -1)[[1, splits - 2] if splits > 3 else [1]] -= 1
    sums_GK = torch.eye(left_NG.shape[1]).to(scales_NG).repeat_interleave(GROUP, 1)
    plain = not left_NG.any()
    return Piece(
        integers=Rounded(values, scales_NG),
        bits=4,
        bias_N=bias,
        down_RK=None if plain else sums_GK,
        up_NR=None if plain else left_NG,
    )


def build(piece: Piece, rule: ActivationRule, dtype: torch.dtype, device: torch.device) -> BranchedLinear:
    """The layer, ready to run."""
    outputs, inputs = piece.integers.values.shape
    rank = 0 if piece.down_RK is None else piece.down_RK.shape[0]
    made = BranchedLinear.empty(
        inputs, outputs, bias=piece.bias_N is not None, bits=piece.bits, rank=rank, smooth=piece.smooth_K is not None,
        dtype=dtype, activation=rule, device="meta",
    )  # fmt: skip
    tensors = {
        "weight_scales": piece.integers.scales,
        "bias": piece.bias_N,
        "smooth": piece.smooth_K,
        "down": piece.down_RK,
        "up": piece.up_NR,
    }
    # A copy each: q, k and v come with the same tensors, and a file holds no tensor twice.
    state = {n: t.to(device, dtype, copy=True).contiguous() for n, t in tensors.items() if t is not None}
    state["qweight"] = piece.integers.packed(piece.bits).to(device)
    made.load_state_dict(state, assign=True)
    return made.requires_grad_(False)
