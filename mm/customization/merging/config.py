"""How adapters are merged: the settings of `mm.merge`, checked before a file is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mm.core.checks import MAX_SEED, number, texts, whole
from mm.core.errors import UserError
from mm.core.nouns import counted

METHODS = ("sum", "ties", "dare", "do", "orthogonal", "regmean", "distill")
DRAWING = ("regmean", "distill")  # these need the model
CUTTING = ("ties", "dare", "do", *DRAWING)  # these cut layers to a rank; the others keep the sum of the ranks
THINNING = ("ties", "dare")  # these keep a share of the values
DENSITY = 0.5
MAX_WEIGHT = 1e6
MAX_RANK = 10**6
MAX_UPDATES = 10**6


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Settings of a merge. A value that the method does not use is refused.

    Attributes:
        count: of adapters, two or more.
        method: one of `METHODS`.
        weights: how strongly each acts, a finite number; None for 1 each.
        density: share of the values that `THINNING` methods keep; None for `DENSITY`.
        rank: of layers that `CUTTING` methods combine; None for the sum of the ranks.
        seed: of DARE's choice, and of what `DRAWING` methods draw.
        words: what each adapter's subject is called in prompts, for `DRAWING` methods; None for what the adapters say.
        with_model: whether there is a model, which `DRAWING` methods need.
        updates: of training for each adapter, for "distill"; None for its own.
    """

    count: int
    method: str = "sum"
    weights: Sequence[float] | None = None
    density: float | None = None
    rank: int | None = None
    seed: int = 0
    words: str | Sequence[str] | None = None
    with_model: bool = True
    updates: int | None = None

    def __post_init__(self) -> None:
        if self.count < 2:
            raise UserError(f"{counted(self.count, 'adapter')} to merge; give two or more")
        if self.method not in METHODS:
            raise UserError(f"no way of merging {self.method!r}; there are {', '.join(METHODS)}")
        whole("seed", self.seed, 0, MAX_SEED)
        self._check_weights()
        if self.density is not None:
            if not isinstance(self.density, int | float) or not 0 < self.density <= 1:
                raise UserError(f"density is {self.density}; give a number above 0, at most 1")
            self._check_used("density", self.density, THINNING)
        if self.rank is not None:
            whole("rank", self.rank, 1, MAX_RANK)
            self._check_used("rank", self.rank, CUTTING)
        if self.updates is not None:
            whole("updates", self.updates, 1, MAX_UPDATES)
            self._check_used("updates", self.updates, ("distill",))
        if self.method in DRAWING and not self.with_model:
            raise UserError(f"{self.method} draws with each adapter; give the model (pipe=..., --model)")
        if self.words is not None:
            self._check_words()

    @property
    def each(self) -> tuple[float, ...]:
        """The weight of each adapter."""
        return (1.0,) * self.count if self.weights is None else tuple(float(weight) for weight in self.weights)

    @property
    def share(self) -> float:
        """The density, where none is given the usual one."""
        return DENSITY if self.density is None else self.density

    def _check_weights(self) -> None:
        if self.weights is not None and len(self.weights) != self.count:
            raise UserError(f"{counted(len(self.weights), 'weight')} for {self.count} adapters; give one for each")
        for weight in self.weights or ():
            number("weight", weight, -MAX_WEIGHT, MAX_WEIGHT)

    def _check_words(self) -> None:
        if self.method not in DRAWING:
            raise UserError(
                f"words are given, which {self.method} does not use; leave them out, or merge with "
                f"{' or '.join(DRAWING)}"
            )
        words = texts("words", self.words)
        object.__setattr__(self, "words", words)
        if len(words) != self.count or not all(words):
            raise UserError(f"{counted(len(words), 'word')} for {self.count} adapters; give one for each")

    def _check_used(self, name: str, value: float, methods: Sequence[str]) -> None:
        """Raises UserError where a setting is given to a method that does not use it."""
        if self.method not in methods:
            raise UserError(
                f"{name} is {value}, which {self.method} does not use; leave it out, or give a method that does: "
                f"{', '.join(methods)}"
            )
