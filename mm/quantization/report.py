"""What quantization cost: per layer, and for the whole.

This module does not know how either was measured.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from mm.core.files import write_text
from mm.layers.linear import BranchedLinear

if TYPE_CHECKING:
    from mm.quantization.search import Solution


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer. Errors are shares of the output's power on calibration inputs, inputs not rounded.

    `nearest_error`: rounding to nearest, without smoothing, branch or feedback. `branch_share`: of the output's power.
    """

    path: str
    bits: int
    rank: int
    bytes_before: int
    bytes_after: int
    nearest_error: float = 0.0
    error: float = 0.0
    branch_share: float = 0.0
    turns: int = 0

    @classmethod
    def of(cls, path: str, layer: BranchedLinear, solution: Solution) -> LayerReport:
        """Of a layer that has just been quantized; errors are its group's."""
        return cls(
            path=path,
            bits=layer.bits,
            rank=0 if layer.down is None else layer.down.shape[0],
            bytes_before=2 * layer.in_features * layer.out_features,
            bytes_after=layer_bytes(layer),
            nearest_error=solution.nearest_error,
            error=solution.error,
            branch_share=solution.branch_share,
            turns=solution.turns,
        )

    @classmethod
    def kept(cls, path: str, layer: nn.Module) -> LayerReport:
        """Of a layer that stays at 16 bits."""
        assert isinstance(layer, nn.Linear)
        size = 2 * layer.in_features * layer.out_features
        return cls(path=path, bits=16, rank=0, bytes_before=size, bytes_after=size)


def layer_bytes(layer: BranchedLinear) -> int:
    """Of integers, scales, smoothing and branch of a quantized layer, floats at 16 bits; the bias is not counted."""
    own = {name: t for name, t in layer.state_dict().items() if name != "bias"}
    return sum(t.numel() * (2 if t.is_floating_point() else 1) for t in own.values())


@dataclass(kw_only=True)
class Report:
    """All layers, the settings, seconds taken, and measurements of the whole."""

    settings: dict[str, Any]
    layers: list[LayerReport] = field(default_factory=list)
    whole: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def ratio(self) -> float:
        """How many times smaller the quantized layers are than at 16 bits, branches counted."""
        changed = [layer for layer in self.layers if layer.bits != 16]
        after = sum(layer.bytes_after for layer in changed)
        return sum(layer.bytes_before for layer in changed) / after if after else 1.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        layers = [dataclasses.asdict(layer) for layer in self.layers]
        return {
            "settings": self.settings,
            "seconds": self.seconds,
            "ratio": self.ratio,
            "whole": self.whole,
            "layers": layers,
        }

    def save(self, path: str | Path) -> None:
        """Writes JSON."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")

    @staticmethod
    def dump_layers(layers: list[LayerReport]) -> str:
        """Layers as one line."""
        return json.dumps([dataclasses.asdict(layer) for layer in layers])

    @staticmethod
    def load_layers(line: str) -> list[LayerReport]:
        """The reverse of `dump_layers`."""
        return [LayerReport(**row) for row in json.loads(line)]
