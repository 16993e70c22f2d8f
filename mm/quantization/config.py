"""What SVDQuant is asked to do.

Design choices
- Defaults are those that hold on CPUs and on Hopper, where products are 8-bit anyway: 4-bit weights in groups of 64,
  8-bit inputs a token. 4-bit inputs are there for comparison and for files of others.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal

from mm.core.checks import given, number, texts
from mm.core.errors import UserError
from mm.core.files import write_text


class QuantizationMethod(StrEnum):
    """The name under which diffusers and transformers know it."""

    SVDQUANT = "svdquant"


@dataclass(frozen=True, kw_only=True)
class SVDQuantConfig:
    """Settings of `mm.quantize` (SVDQuant, Li et al. 2024, arXiv 2411.05007).

    rank: of the 16-bit branch that absorbs outliers. bits: of weights; "auto" = 4, 8 or 16 a group of layers, by
    measured error under `size_budget` (share of the layers' 16-bit size). activation_bits: 8, 4 or 16 (as they are).
    A branch takes at most a 24th of a layer's smaller side, whatever `rank` says.
    smooth: the search for factors a channel. gptq: error feedback when rounding (Frantar et al. 2022, arXiv
    2210.17323). iterations: at most so many turns of branch and rounding. data_free: no calibration, for a first try.
    rows, calls: calibration rows kept a group (`calibration.rows_of`: fewer of wide inputs), and calls kept a parent
    module. steps: of each calibration picture. size: its pixels a side (default: the model's own).
    memory: bytes that kept inputs may take in one pass. keep: regular expressions of paths that stay at 16 bits.
    layers, base: written by saving: what was done to which layer, and the hash of the 16-bit tensors.
    """

    rank: int = 32
    bits: int | Literal["auto"] = 4
    activation_bits: int = 8
    smooth: bool = True
    gptq: bool = True
    iterations: int = 100
    data_free: bool = False
    size_budget: float | None = None
    rows: int = 4096
    calls: int = 8
    steps: int = 8
    size: int | None = None
    memory: int = 2 << 30
    seed: int = 0
    keep: tuple[str, ...] = ()
    layers: tuple[dict[str, Any], ...] = ()
    base: str = ""

    METHOD: ClassVar[str] = QuantizationMethod.SVDQUANT.value

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", texts("keep", self.keep))
        object.__setattr__(self, "layers", tuple(self.layers))
        for name in ("rank", "iterations", "rows", "calls", "steps", "memory", "seed", "size"):
            value = getattr(self, name)
            if (isinstance(value, bool) or not isinstance(value, int)) and not (name == "size" and value is None):
                raise UserError(f"{name} is {given(value)}; give a whole number")
        if self.size_budget is not None:
            number("size_budget", self.size_budget, -math.inf, math.inf)
        if self.rank < 0 or self.iterations < 1 or self.rows < 1 or self.calls < 1 or self.steps < 1:
            raise UserError(
                f"rank {self.rank} must not be negative; iterations {self.iterations}, rows {self.rows}, calls "
                f"{self.calls} and steps {self.steps} must be at least 1"
            )
        if self.size is not None and self.size < 8:
            raise UserError(f"size {self.size}: pictures need at least 8 pixels a side")
        if self.bits not in (4, 8, "auto"):
            raise UserError(f"bits {self.bits!r}: weights take 4, 8 or 'auto'")
        if self.activation_bits not in (4, 8, 16):
            raise UserError(f"activation_bits {self.activation_bits}: inputs take 4, 8 or 16")
        if self.bits == "auto" and self.size_budget is None:
            raise UserError("bits='auto' needs a budget; give size_budget (--size-budget), for example 0.4")
        if self.bits != "auto" and self.size_budget is not None:
            raise UserError(f"size_budget {self.size_budget} acts with bits='auto' alone, and bits is {self.bits!r}")
        if self.size_budget is not None and not 0.28 <= self.size_budget <= 1:
            raise UserError(f"size_budget {self.size_budget} must lie between 0.28 (all at 4 bits) and 1 (all at 16)")
        if self.bits == "auto" and self.data_free:
            raise UserError("bits='auto' measures errors, which needs calibration; leave data_free out")
        for pattern in self.keep:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"keep holds {pattern!r}, which is no regular expression ({error})") from error

    @property
    def quant_method(self) -> QuantizationMethod:
        """The name by which diffusers and transformers distinguish methods."""
        return QuantizationMethod.SVDQUANT

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready settings."""
        lists = {"keep": list(self.keep), "layers": list(self.layers)}
        return {"quant_method": self.METHOD} | dataclasses.asdict(self) | lists

    def to_diff_dict(self) -> dict[str, Any]:
        """The settings that differ from the defaults."""
        plain = type(self)().to_dict()
        return {k: x for k, x in self.to_dict().items() if k == "quant_method" or x != plain[k]}

    def to_json_string(self, use_diff: bool = True) -> str:
        """JSON of `to_diff_dict`, or of all settings."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Writes all settings to a file, whole or not at all. One that is there is replaced."""
        write_text(Path(json_file_path), self.to_json_string(use_diff=False))

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Changes settings in place, checked as in the constructor; returns the arguments that are no settings."""
        names = {f.name for f in dataclasses.fields(self)}
        known = {k: x for k, x in kwargs.items() if k in names}
        changed = dataclasses.replace(self, **known)
        for name in known:
            object.__setattr__(self, name, getattr(changed, name))
        return {k: x for k, x in kwargs.items() if k not in names}

    @classmethod
    def from_dict(cls, settings: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The reverse of `to_dict`; raises UserError for names that are no setting."""
        settings = {k: x for k, x in settings.items() if k != "quant_method"}
        names = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(settings) - names):
            raise UserError(f"SVDQuantConfig has no setting {', '.join(unknown)}; it has {', '.join(sorted(names))}")
        made = cls(**settings)
        return (made, kwargs) if return_unused_kwargs else made
