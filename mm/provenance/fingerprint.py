"""Fingerprints: bits that modulate a decoder's convolutions, and the reader that finds them in its pictures.

Source: Kim et al. 2024, WOUAF, arXiv 2306.04744: each user gets a decoder whose convolutions are modulated by the
user's bits, so that every picture carries them without a step that could be left out.

Design choices
- A convolution's weight becomes W (1 + scale) over its inputs, and its bias b + shift; both are linear in the bits.
  Shifts give a pattern that repeats with the decoder's upsampling, which also marks flat regions.
- While it is trained, every picture of a batch has bits of its own, by hooks. `stamp` writes the same change into the
  weights, after which nothing beside the decoder is needed.
- Beside the bits there is a constant part, by which the reader finds a fingerprint, and its place, at all.

Legend: B pictures, K bits, C channels, H x W pixels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.core.checks import texts
from mm.core.errors import UserError
from mm.core.files import write_bytes
from mm.core.nouns import counted, with_article
from mm.core.safe_tensors import read_tensors, tensor_bytes
from mm.provenance.readers import NetworkReader, TileReader

FORMAT = "mm-fingerprint-2"
_ADVICE = "(format mm-fingerprint-2); make one with `mm train mm-tiny --stage fingerprint --init-from weights/mm-tiny`"
_STEP = "|step"  # of 8-bit levels
PRESENT = 0.5  # probability from which a picture counts as marked
_SURE = 0.95  # probability of a bit, or of its opposite, below which it is uncertain


@dataclass(frozen=True, kw_only=True)
class FingerprintConfig:
    """A fingerprint.

    Attributes:
        bits: K.
        convolutions: how many of the decoder's are modulated, from its end.
        layers: their paths instead.
        side: of the pictures that the decoder draws, in pixels.
        period: of the pattern, for the reader of tiles: by how much the modulated part of the decoder enlarges. 0 takes
            a network as reader.
        eye: channels of the convolutions by which the reader of tiles sees a picture; 0 leaves them out, as the closed
            form needs.
        widths: channels of the network's layers.
    """

    bits: int = 32
    convolutions: int = 11
    layers: tuple[str, ...] = ()
    side: int = 128
    period: int = 8
    eye: int = 0
    widths: tuple[int, ...] = (24, 32, 48, 64)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", texts("layers", self.layers))
        for name in ("bits", "convolutions"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give 1 or more")
        if self.side < 16:
            raise UserError(f"side is {self.side}; give 16 pixels or more")
        if not 0 <= self.period <= self.side:
            raise UserError(f"period is {self.period}; give 0 to {self.side}")
        if self.eye < 0:
            raise UserError(f"eye is {self.eye}; give 0 or more")
        if not self.widths or min(self.widths) < 1:
            raise UserError(f"widths is {self.widths}; give numbers of channels")


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """What was read: probabilities (B, K) that bits are set, and (B,) that there is a fingerprint."""

    bits_BK: Tensor
    present_B: Tensor

    def numbers(self) -> list[int | None]:
        """The bits of each picture as a number, the highest first; None where there is no fingerprint."""
        return [
            int("".join("1" if bit > 0.5 else "0" for bit in bits), 2) if present > PRESENT else None
            for bits, present in zip(self.bits_BK.tolist(), self.present_B.tolist(), strict=True)
        ]

    def uncertain(self) -> list[int]:
        """How many bits of each picture are less than .95 sure."""
        sure_BK = torch.maximum(self.bits_BK, 1 - self.bits_BK)
        return (sure_BK < _SURE).sum(1).tolist()


class Fingerprint(nn.Module):
    """What the bits change in each convolution, and the reader.

    Args:
        shapes: (inputs, outputs) of the modulated convolutions by path.
        config: see `FingerprintConfig`.
    """

    def __init__(self, shapes: dict[str, tuple[int, int]], config: FingerprintConfig) -> None:
        super().__init__()
        self.config, self.shapes = config, dict(shapes)
        rows = config.bits + 1  # the last is the constant part
        # Scales change what a picture holds, which averages away over tiles unless convolutions see it first.
        scaled = {} if config.period and not config.eye else shapes
        self.scale = nn.ParameterDict({_key(p): torch.zeros(rows, i) for p, (i, _) in scaled.items()})
        self.shift = nn.ParameterDict({_key(p): torch.zeros(rows, o) for p, (_, o) in shapes.items()})
        self.reader: TileReader | NetworkReader = (
            TileReader(config.bits, config.side, config.period, config.eye)
            if config.period
            else NetworkReader(config.bits, config.side, config.widths)
        )

    def start(self, spread: float, generator: torch.Generator) -> None:
        """Starting values of what the bits change."""
        with torch.no_grad():
            for table in (self.scale, self.shift):
                for value in table.values():
                    value.copy_(spread * torch.randn(value.shape, generator=generator))

    def changes(self, path: str, bits_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Scales (B, inputs), or (B, 1) of zeros, and shifts (B, outputs) of one convolution."""
        signs_BK = F.pad(2 * bits_BK.float() - 1, (0, 1), value=1.0)
        root = self.config.bits**-0.5
        shift_BC = root * signs_BK @ self.shift[_key(path)]
        if _key(path) not in self.scale:
            return torch.zeros_like(shift_BC[:, :1]), shift_BC
        return root * signs_BK @ self.scale[_key(path)], shift_BC

    @contextmanager
    def modulating(self, module: nn.Module, bits_BK: Tensor) -> Iterator[None]:
        """Within the context, picture b that the module decodes carries the bits b."""
        changes = {path: self.changes(path, bits_BK) for path in self.shapes}
        scales = {path: scale for path, (scale, _) in changes.items() if _key(path) in self.scale}
        with shifting(module, {path: shift for path, (_, shift) in changes.items()}, scales):
            yield

    @torch.no_grad()
    def stamp(self, module: nn.Module, bits: int | Sequence[int]) -> None:
        """Writes bits into the module's weights for good.

        Args:
            module: that decodes, as in training.
            bits: a number of K bits, or K bits.

        Raises:
            UserError: for bits that do not fit, or another module; nothing is changed then.
        """
        bits_1K = self.bits_of(bits)[None]
        layers = {path: _convolution(module, path) for path in self.shapes}
        for path, layer in layers.items():
            if (layer.in_channels // layer.groups, layer.out_channels) != self.shapes[path] or layer.bias is None:
                raise UserError(f"{path} is no convolution of shape {self.shapes[path]} with a bias; another decoder")
        for path, layer in layers.items():
            scale_1C, shift_1C = self.changes(path, bits_1K)
            tail = [1] * (layer.weight.ndim - 2)
            layer.weight.mul_((1 + scale_1C.view(1, -1, *tail)).to(layer.weight))
            assert layer.bias is not None
            layer.bias.add_(shift_1C[0].to(layer.bias))

    def bits_of(self, bits: int | Sequence[int]) -> Tensor:
        """Bits as a tensor (K,), the highest first."""
        count = self.config.bits
        if isinstance(bits, int):
            if not 0 <= bits < 2**count:
                raise UserError(
                    f"the fingerprint {bits:#x} does not fit into {counted(count, 'bit')}; give 0 to {2**count - 1:#x}"
                )
            bits = [(bits >> (count - 1 - k)) & 1 for k in range(count)]
        if len(bits) != count or any(bit not in (0, 1) for bit in bits):
            raise UserError(f"{counted(len(bits), 'bit')} where the fingerprint has {count}; give {count} of 0 and 1")
        return torch.tensor(list(bits), dtype=torch.float32)

    @torch.no_grad()
    def read(self, pictures_B3HW: Tensor) -> Found:
        """What pictures in [0, 1] carry, of any size."""
        logits_BN1, before_N = self.reader.candidates(pictures_B3HW.float())
        scores_BN = logits_BN1[..., -1] + before_N
        best_B = scores_BN.argmax(1)
        rows = torch.arange(len(best_B), device=best_B.device)
        # Of N places the best of plain pictures seems N times as likely.
        present_B = torch.sigmoid(scores_BN[rows, best_B] - math.log(len(before_N)))
        return Found(bits_BK=torch.sigmoid(logits_BN1[rows, best_B, :-1]), present_B=present_B)

    # ---- files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, report: dict[str, Any] | None = None) -> None:
        """Writes one safetensors file, whole or not at all; one that is there is replaced.

        Matrices are stored in 8 bits with a scale a row, the rest in 16.
        """
        meta = {
            "format": FORMAT, "config": json.dumps(asdict(self.config)), "shapes": json.dumps(self.shapes),
            "report": json.dumps(report or {}),
        }  # fmt: skip
        tensors: dict[str, Tensor] = {}
        for name, value in self.state_dict().items():
            tensors |= _packed(name, value.detach().cpu().float())
        write_bytes(path, tensor_bytes(tensors, meta))

    @classmethod
    def load(cls, path: str | Path) -> Fingerprint:
        """Reads a file that `save` wrote. Raises UserError for any other."""
        read = read_tensors(Path(path), "fingerprint", types=("F32", "F16", "I8"))
        if read.metadata.get("format") != FORMAT:
            raise UserError(f"{path} is no fingerprint of mm {_ADVICE}")
        try:
            given = json.loads(read.metadata["config"])
            config = FingerprintConfig(**given | {key: tuple(given[key]) for key in ("widths", "layers")})
            shapes = {path: (int(i), int(o)) for path, (i, o) in json.loads(read.metadata["shapes"]).items()}
            made = cls(shapes, config)
            made.load_state_dict(_unpacked(read.tensors))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{path} is a damaged fingerprint: {str(error).splitlines()[0]}") from error
        return made.eval().requires_grad_(False)


def _packed(name: str, value: Tensor) -> dict[str, Tensor]:
    """A tensor as it is stored."""
    if value.ndim < 2:
        return {name: value.half().contiguous()}
    rows = value.flatten(1)
    steps = (rows.abs().amax(1) / 127).clamp_min(1e-6).half()
    levels = (rows / steps.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return {name: levels.view(value.shape).contiguous(), f"{name}{_STEP}": steps}


def _unpacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in tensors.items():
        if name.endswith(_STEP):
            continue
        steps = tensors.get(f"{name}{_STEP}")
        tail = [1] * (value.ndim - 1)
        found[name] = value.float() if steps is None else value.float() * steps.float().view(-1, *tail)
    return found


@contextmanager
def shifting(
    module: nn.Module, shifts: Mapping[str, Tensor], scales: Mapping[str, Tensor] | None = None
) -> Iterator[None]:  # fmt: skip
    """Within the context convolutions get shifts (B, outputs) and scales (B, inputs), by path."""
    handles = []
    for path, shift_BC in shifts.items():
        layer = _convolution(module, path)

        def after(_: nn.Module, args: Any, output: Tensor, shift_BC: Tensor = shift_BC) -> Tensor:
            return output + _grid(shift_BC, output)

        handles.append(layer.register_forward_hook(after))
    for path, scale_BC in (scales or {}).items():

        def before(_: nn.Module, args: tuple[Any, ...], scale_BC: Tensor = scale_BC) -> tuple[Any, ...]:
            return (args[0] * (1 + _grid(scale_BC, args[0])), *args[1:])

        handles.append(_convolution(module, path).register_forward_pre_hook(before))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _key(path: str) -> str:
    return path.replace(".", "/")


def _grid(values_BC: Tensor, like: Tensor) -> Tensor:
    return values_BC.to(like)[(...,) + (None,) * (like.ndim - 2)]


def _convolution(module: nn.Module, path: str) -> Any:
    try:
        layer = module.get_submodule(path)
    except AttributeError as error:
        raise UserError(f"the decoder has no layer {path}; the fingerprint is for another one") from error
    if not isinstance(layer, (nn.Conv2d, nn.Conv3d)):
        raise UserError(
            f"{path} is {with_article(type(layer).__name__)}, no convolution; the fingerprint is for another decoder"
        )
    return layer


@torch.no_grad()
def fingerprint_of(module: nn.Module, decode: Callable[[], Any], config: FingerprintConfig) -> Fingerprint:
    """An untrained fingerprint for the last convolutions that a decoder runs.

    Args:
        module: that holds the convolutions.
        decode: decodes one picture with it, by which the order is found.
        config: see `FingerprintConfig`.

    Raises:
        UserError: where the decoder has no convolution with a bias.
    """
    order: list[str] = []
    handles = [
        layer.register_forward_hook(lambda *_, path=path: order.append(path))
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.bias is not None
    ]
    try:
        decode()
    finally:
        for handle in handles:
            handle.remove()
    chosen = list(dict.fromkeys(order))[-config.convolutions :]
    if config.layers:
        lost = next((path for path in config.layers if path not in order), None)
        if lost is not None:
            raise UserError(f"{lost} is no convolution with a bias that {type(module).__name__} runs")
        chosen = list(config.layers)
    if not chosen:
        raise UserError(f"{type(module).__name__} runs no convolution that a fingerprint could modulate")
    layers = {path: _convolution(module, path) for path in chosen}
    return Fingerprint({path: (layer.in_channels, layer.out_channels) for path, layer in layers.items()}, config)
