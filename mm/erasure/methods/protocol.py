"""What a method of erasure gets and gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from mm.adapters.entry import Entry
from mm.core.errors import UserError
from mm.erasure.solver import Features


@dataclass(frozen=True, kw_only=True)
class Job:
    """One erasure.

    Args:
        pipe: the pipeline, unchanged while a method runs.
        layers: the text-reading layers by path.
        groups: paths of layers that read the same features.
        features: for the first path of each group.
        weights: effective weights (base plus branches) by path, (N, D), float64.
        pairs: prompts with a target, each with the same prompt that has the anchor in its place.
        retained: prompts that must not change.
        template: features that the pipeline's template puts before the prompt's own.
        base: the hash of the component that holds the layers.
        targets: number of concepts; each counts as much as one alone would.
        strength: 1 replaces the target by the anchor; less leaves a share of it.
        settings: of the method, by name.
        progress: called with a share from 0 to 1 and what is done.
    """

    pipe: Any
    layers: Mapping[str, nn.Linear]
    groups: Sequence[Sequence[str]]
    features: Mapping[str, Features]
    weights: Mapping[str, Tensor]
    pairs: Sequence[tuple[str, str]] = ()
    retained: Sequence[str] = ()
    template: int = 0
    base: str = ""
    strength: float = 1.0
    targets: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    progress: Callable[[float, str], None] = lambda share, text: None


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a method made: entries of a patch by path, and facts for its report."""

    entries: dict[str, Entry]
    report: dict[str, Any]


def lacking(pipe: Any, method: str, what: str) -> UserError:
    """The error of a pipeline that lacks what a method changes."""
    return UserError(
        f"{type(pipe).__name__} has no {what} that {method} could change; choose another method, such as uce"
    )


class Method(Protocol):
    """A method of erasure: one file in this folder."""

    name: str
    defaults: dict[str, Any]

    def make(self, job: Job) -> Made:
        """Entries that erase the job's targets."""
        ...
