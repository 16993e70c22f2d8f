"""What quantization cost: per layer, and for the whole."""

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

    Attributes:
        nearest_error: rounding to nearest, without smoothing, branch or feedback.
        branch_share: of the output's power.
        turns: of branch and rounding.
        note: what was done in another way than asked, and why; empty where nothing was.
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
    note: str = ""

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
            note=solution.note,
        )

    @classmethod
    def kept(cls, path: str, layer: nn.Module, note: str = "") -> LayerReport:
        """Of a layer that stays at 16 bits."""
        assert isinstance(layer, nn.Linear)
        size = 2 * layer.in_features * layer.out_features
        return cls(path=path, bits=16, rank=0, bytes_before=size, bytes_after=size, note=note)


def layer_bytes(layer: BranchedLinear) -> int:
    """Of integers, scales, smoothing and branch of a quantized layer, floats at 16 bits; the bias is not counted."""
    own = {name: t for name, t in layer.state_dict().items() if name != "bias"}
    return sum(t.numel() * (2 if t.is_floating_point() else 1) for t in own.values())


@dataclass(kw_only=True)
class Report:
    """What became of a model.

    Attributes:
        settings: those of `SVDQuantConfig`.
        layers: one row each, those left at 16 bits as well.
        whole: measurements of the whole: bytes of the parts before and after, pictures, the judge.
        seconds: taken by the quantization itself.
        untouched: weights that are no linear layers: path, kind and number of weights.
        adapters: names of those that stay attached over the quantized layers.
    """

    settings: dict[str, Any]
    layers: list[LayerReport] = field(default_factory=list)
    whole: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    untouched: list[dict[str, Any]] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """How many times smaller the quantized layers are than at 16 bits, branches counted."""
        changed = [layer for layer in self.layers if layer.bits != 16]
        after = sum(layer.bytes_after for layer in changed)
        return sum(layer.bytes_before for layer in changed) / after if after else 1.0

    @property
    def whole_ratio(self) -> float:
        """How many times smaller the quantized parts are in bytes, with all that stays at 16 bits."""
        after = self.whole.get("bytes_after", 0)
        return self.whole["bytes_before"] / after if after else 1.0

    def notes(self) -> dict[str, list[str]]:
        """Paths of the layers by what was done in another way than asked."""
        found: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.note:
                found.setdefault(layer.note, []).append(layer.path)
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        layers = [dataclasses.asdict(layer) for layer in self.layers]
        return {
            "settings": self.settings,
            "seconds": self.seconds,
            "ratio": self.ratio,
            "whole": self.whole,
            "untouched": self.untouched,
            "adapters": self.adapters,
            "layers": layers,
        }

    def save(self, path: str | Path) -> None:
        """Writes JSON, whole or not at all. A file that is there is replaced."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")

    @staticmethod
    def dump_layers(layers: list[LayerReport]) -> str:
        """Layers as one line."""
        return json.dumps([dataclasses.asdict(layer) for layer in layers])

    @staticmethod
    def load_layers(line: str) -> list[LayerReport]:
        """The reverse of `dump_layers`."""
        return [LayerReport(**row) for row in json.loads(line)]
