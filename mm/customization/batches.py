"""The pictures of a run as latents, and what each step is made of.

Design choices
- Step k depends on (seed, k) alone, so that a run that was stopped goes on as if it had not been.
- Every picture comes once a round, as often as its repeats say, in an order drawn for the round.

Legend: N pictures, B batch, C channels, H x W latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mm.customization.data import Example, to_tensor
from mm.customization.objectives.protocol import Objective, at_latents

_VISIBLE = 0.6  # share of the highest noise below which a picture shows what it holds


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One step: numbers of the examples, those without caption, levels and noise; the same for preserved prompts."""

    chosen: tuple[int, ...]
    bare: tuple[bool, ...]
    level_B: Tensor
    noise: Tensor
    preserved: tuple[int, ...]
    preserved_from: tuple[int, ...]
    preserved_level_B: Tensor
    preserved_noise: Tensor


class Batches:
    """Latents and masks of the examples, and the draw of each step.

    Args:
        objective: encodes.
        examples: the pictures.
        batch_size: B.
        seed: of order and noise.
        prompts: number of preserved prompts.
        preserve_batch: of them a step.
        dropout: share of pictures without their caption, among those that the noise leaves visible.
        guarded: number of guarded prompts; their numbers follow those of the preserved ones.
        guard_batch: of them a step.
        strangers: number of prompts with other new words; their numbers follow those of the guarded ones.
        stranger_batch: of them a step.
        own: how many of the examples, from the first, are the user's, which previews score. None: all.
        held: pictures whose latents the preserved prompts are held on; none takes the examples'.
        visible: share of the highest noise below which pictures may lose their caption.
    """

    def __init__(
        self, objective: Objective, examples: Sequence[Example], *, batch_size: int, seed: int, prompts: int,
        preserve_batch: int,
        dropout: float = 0.0, guarded: int = 0, guard_batch: int = 0, strangers: int = 0,
        stranger_batch: int = 0, own: int | None = None, held: Sequence[Example] = (), visible: float = _VISIBLE,
    ) -> None:  # fmt: skip
        self.objective, self.seed, self.batch_size = objective, seed, batch_size
        self.prompts, self.preserve_batch, self.dropout = prompts, preserve_batch, dropout
        self.own = len(examples) if own is None else own
        self.more = ((prompts, guarded, guard_batch), (prompts + guarded, strangers, stranger_batch))
        self.order = [i for i, example in enumerate(examples) for _ in range(example.repeats)]
        self.visible = visible
        self.latents, self.masks = encode(objective, [*examples, *held])
        first = len(examples) if held else 0
        self.sources = range(first, len(self.latents))

    def step(self, number: int) -> Step:
        """What step `number` is made of."""
        generator = torch.Generator().manual_seed(hash_of(self.seed, number))
        chosen = tuple(self._example(number * self.batch_size + k) for k in range(self.batch_size))
        shape = self.latents.shape[1:]
        level_B = self.objective.levels(len(chosen), generator)
        noise = torch.randn(len(chosen), *shape, generator=generator)
        count = min(self.preserve_batch, self.prompts)
        texts = torch.randperm(max(1, self.prompts), generator=generator)[:count].tolist()
        sources = self._sources(count, generator)
        visible = self.objective.strength(level_B) < self.visible
        bare = visible & (torch.rand(len(chosen), generator=generator) < self.dropout)
        levels = self.objective.levels(count, generator) if count else level_B[:0]
        preserved_noise = torch.randn(count, *shape, generator=generator)
        for first, there, wanted in self.more:  # drawn last, so that a run without them is what it was
            if more := min(wanted, there):
                texts += (first + torch.randperm(there, generator=generator)[:more]).tolist()
                sources += self._sources(more, generator)
                levels = torch.cat([levels, self.objective.levels(more, generator)])
                preserved_noise = torch.cat([preserved_noise, torch.randn(more, *shape, generator=generator)])
        return Step(
            chosen=chosen,
            bare=tuple(bare.tolist()),
            level_B=level_B,
            noise=noise,
            preserved=tuple(texts),
            preserved_from=tuple(sources),
            preserved_level_B=self.objective.louder(levels),
            preserved_noise=preserved_noise,
        )  # fmt: skip

    def _sources(self, count: int, generator: torch.Generator) -> list[int]:
        """Numbers of the latents that preserved prompts are held on."""
        return [self.sources[k] for k in torch.randint(len(self.sources), (count,), generator=generator).tolist()]

    def _example(self, place: int) -> int:
        around, inside = divmod(place, len(self.order))
        generator = torch.Generator().manual_seed(hash_of(self.seed + 1, around))
        return self.order[int(torch.randperm(len(self.order), generator=generator)[inside])]


def hash_of(seed: int, number: int) -> int:
    """A seed from two numbers (splitmix64, Steele et al. 2014)."""
    z = (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) % 2**63


@torch.no_grad()
def encode(objective: Objective, examples: Sequence[Example]) -> tuple[Tensor, Tensor | None]:
    """Latents (N, C, H, W) on the CPU, and masks (N, 1, H, W) where any example has one."""
    latents = torch.cat([objective.encode_pictures(to_tensor(e.picture, objective.side)[None]).cpu() for e in examples])
    if all(example.mask is None for example in examples):
        return latents, None
    whole = torch.ones(1, objective.side, objective.side)
    masks = [whole if e.mask is None else (to_tensor(e.mask, objective.side) + 1) / 2 for e in examples]
    return latents, at_latents(torch.stack(masks), latents).clamp_min(0.0)
