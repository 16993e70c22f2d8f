"""One entry of a patch as it is on a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mm.adapters.entry import Entry


@dataclass(frozen=True, kw_only=True, eq=False)
class Placed:
    """One entry on a layer. `scale` is the patch's; `fused`: a low-rank entry acts in the weight. `base_matches`: None
    where the patch does not name its base. `word`: what the patch's subject is called in prompts; "" where it says
    none. `erases`: the concepts that the patch erases."""

    name: str
    entry: Entry
    path: str
    scale: float = 1.0
    order: int = 0
    method: str = "lora"
    word: str = ""
    base_matches: bool | None = None
    fused: bool = False
    erases: tuple[str, ...] = ()

    @property
    def in_weight(self) -> bool:
        """Whether it acts in the weight."""
        return not (self.is_branch or self.in_bias)

    @property
    def in_bias(self) -> bool:
        """Whether it acts in the bias."""
        return self.entry.kind == "bias"

    @property
    def is_branch(self) -> bool:
        """Whether it runs beside the weight."""
        return self.entry.kind == "lowrank" and not self.fused

    @property
    def strength(self) -> float:
        """Scale of the patch times that of the entry."""
        return self.scale * self.entry.scale

    def __deepcopy__(self, memo: dict[int, Any]) -> Placed:
        return self  # nothing in it ever changes
