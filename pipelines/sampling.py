"""Noise that belongs to a picture, and masked drawing in codes.

Design choices
- The same seed gives the same picture: all randomness of a picture comes from a generator of its own on the
  CPU, in float32, whatever its batch. Picture k of a call with one generator has that generator's seed + k.
- Codes are drawn as in MAR (Li et al. 2024, arXiv 2406.11838): positions in a random order, more of them a step as the
  picture fills, floor(L cos(pi/2 (s+1)/S)) still masked after step s. Gumbel noise is drawn for a whole picture at
  once, so that which step a token falls into changes nothing.
- The last of the steps revise: a part of the finished picture is masked and drawn again (remasking, Wang et al. 2025,
  arXiv 2503.00307), so that early tokens are drawn again given all others. The temperature falls during revision, as in
  annealing (Kirkpatrick et al. 1983).
- Tokens that are drawn at one step do not see each other, which costs most where they touch. With `shape` they are
  spread: the order is a Halton sequence (Besnier et al. 2025, arXiv 2503.17076), moved and mirrored by the picture's
  generator, and revisions take the fields of one colour of a chessboard, then those of the other.

Legend: B pictures, C = K = 16 channels, L = 64 tokens, V = 64 levels, D features, N tokens drawn at once.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from mm.core.checks import shown
from mm.core.errors import UserError
from mm.core.nouns import counted

COOLED = 0.1  # share of the temperature that is left for the last of them
Generators = torch.Generator | Sequence[torch.Generator] | None


def picture_generators(generator: Generators, count: int) -> list[torch.Generator]:
    """One CPU generator a picture. One generator with seed s gives s, s + 1, ...; a list gives each picture its own."""
    if isinstance(generator, torch.Generator):
        return _from_seed(generator.initial_seed(), count)
    if generator is None:
        return _from_seed(int(torch.randint(2**31, (), dtype=torch.int64)), count)
    given = list(generator) if isinstance(generator, Sequence) else [generator]
    if wrong := [each for each in given if not isinstance(each, torch.Generator)]:
        raise UserError(
            f"generator is {shown(wrong[0])}; give torch.Generator().manual_seed(SEED), or a list of one a picture"
        )
    if len(generator) != count:
        raise UserError(
            f"{counted(len(generator), 'generator')} for {counted(count, 'picture')}; give one for "
            "each, or a single one"
        )
    return [torch.Generator().manual_seed(g.initial_seed()) for g in generator]


def _from_seed(first: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed((first + k) % 2**64) for k in range(count)]  # seeds are 64 bits wide


def picture_noise(generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise (B, *shape), each row from its own generator."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def gumbel_noise(generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> torch.Tensor:
    """Gumbel noise (B, *shape): argmax(logits + noise) is a sample of softmax(logits)."""
    uniform = torch.stack([torch.rand(shape, generator=g) for g in generators]).clamp(1e-9, 1 - 1e-7)
    return -torch.log(-torch.log(uniform))


def masked_steps(tokens: int, steps: int, power: float | None = None) -> list[int]:
    """How many tokens are still masked after each of `steps` steps; the last is 0, and each step draws at least one.

    With `power` a share s of the steps draws s^power of the tokens, without it 1 - cos(pi/2 s). The first tokens decide
    how many things a picture shows, and those of one step do not know of each other: a high power draws them singly.
    """
    left, before = [], tokens
    for s in range(steps):
        share = (s + 1) / steps
        masked = math.cos(math.pi / 2 * share) if power is None else 1 - share**power
        planned = 0 if s == steps - 1 else math.floor(tokens * masked)
        before = max(0, min(planned, before - 1))
        left.append(before)
    return left


class CodeStep(NamedTuple):
    """Which tokens are masked (B, L) and which are drawn now (B, N), the known share, the share of the temperature, and
    for revisions all tokens in the order (B, L) of which the drawn ones are the first."""

    masked_BL: torch.Tensor
    now_BN: torch.Tensor
    known: float
    heat: float
    order_BL: torch.Tensor | None = None


def code_steps(
    generators: Sequence[torch.Generator],
    tokens: int,
    steps: int,
    *,
    revisions: int,
    revised: float,
    shape: tuple[int, int] | None = None,
    power: float | None = None,
) -> Iterator[CodeStep]:
    """Fills a picture of `tokens` tokens in at most `steps` steps, the last of which revise it.

    Args:
        generators: One a picture.
        tokens: L.
        steps: The most steps, revisions included.
        revisions: How many of the steps revise a picture that is already full.
        revised: Share of the tokens that one of these draws again.
        shape: Rows and columns of the tokens, whose steps are spread over the picture; None: tokens in random order.
        power: How many tokens each step draws; see `masked_steps`.
    """
    order_BL = torch.stack([_filling_order(g, tokens, shape) for g in generators])
    known = 0
    for left in masked_steps(tokens, steps - revisions, power):
        if known == tokens:
            break
        masked_BL = torch.ones(order_BL.shape, dtype=torch.bool).scatter(1, order_BL[:, :known], False)
        yield CodeStep(masked_BL, order_BL[:, known : tokens - left], known / tokens, 1.0)
        known = tokens - left
    again = max(1, round(tokens * revised))
    for revision in range(revisions):
        order_BL = torch.stack([_revising_order(g, tokens, shape, revision) for g in generators])
        now_BN = order_BL[:, :again]
        masked_BL = torch.zeros(order_BL.shape, dtype=torch.bool).scatter(1, now_BN, True)
        heat = 1 - (1 - COOLED) * (revision + 1) / revisions
        yield CodeStep(masked_BL, now_BN, 1 - again / tokens, heat, order_BL)


def _filling_order(generator: torch.Generator, tokens: int, shape: tuple[int, int] | None) -> torch.Tensor:
    """The order (L,) in which a picture is filled."""
    if shape is None:
        return torch.randperm(tokens, generator=generator)
    places_L2 = torch.tensor(halton_places(shape))
    places_L2 = (places_L2 + torch.randint(0, tokens, (2,), generator=generator)) % torch.tensor(shape)
    mirrored_2 = torch.randint(0, 2, (2,), generator=generator).bool()
    places_L2 = torch.where(mirrored_2, torch.tensor(shape) - 1 - places_L2, places_L2)
    if shape[0] == shape[1] and torch.randint(0, 2, (), generator=generator):
        places_L2 = places_L2.flip(1)
    return places_L2[:, 0] * shape[1] + places_L2[:, 1]


def _revising_order(
    generator: torch.Generator, tokens: int, shape: tuple[int, int] | None, revision: int
) -> torch.Tensor:  # fmt: skip
    """The order (L,) in which one revision takes tokens: random, or first the fields of one colour of a chessboard."""
    order_L = torch.randperm(tokens, generator=generator)
    if shape is None:
        return order_L
    dark_L = (order_L // shape[1] + order_L % shape[1]) % 2 == revision % 2
    return torch.cat([order_L[dark_L], order_L[~dark_L]])


@cache
def halton_places(shape: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """All places (row, column) of a grid in the order of a Halton sequence of bases 2 and 3."""
    found: dict[tuple[int, int], None] = {}
    number = 0
    while len(found) < shape[0] * shape[1]:
        found[math.floor(_mirrored(number, 2) * shape[0]), math.floor(_mirrored(number, 3) * shape[1])] = None
        number += 1
    return tuple(found)


def _mirrored(number: int, base: int) -> float:
    """The digits of a number mirrored at the point, in [0, 1): 6 is 110 in base 2, and gives 0.011."""
    share, value = 1.0, 0.0
    while number:
        number, digit = divmod(number, base)
        share /= base
        value += digit * share
    return value


def check_sigmas(
    sigmas: Sequence[float] | None, mode: str, steps: int | None, scheduler: Any
) -> tuple[float, ...] | None:
    """Noise levels of a call, checked.

    Raises:
        UserError: Where they are not falling numbers in (0, 1], or cannot be used with the other arguments.
    """
    if sigmas is None:
        return None
    try:
        levels = tuple(float(sigma) for sigma in sigmas)
    except (TypeError, ValueError):
        raise UserError(f"sigmas are {shown(sigmas)}; give a list of falling numbers above 0 and at most 1") from None
    if mode != "flow":
        raise UserError(f"sigmas are noise levels of mode='flow'; with mode={mode!r} leave them out")
    if steps is not None and steps != len(levels):
        those = f"there {'is' if len(levels) == 1 else 'are'} {counted(len(levels), 'sigma')}"
        raise UserError(f"num_inference_steps is {steps} and {those}; give one of the two")
    falling = all(a > b for a, b in pairwise(levels))
    if not levels or not falling or not 0 < levels[-1] <= levels[0] <= 1:
        raise UserError(f"sigmas are {list(levels)[:8]}; give falling numbers above 0 and at most 1")
    if "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise UserError(f"{type(scheduler).__name__} takes no sigmas; leave them out or use another scheduler")
    return levels
