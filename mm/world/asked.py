"""How many things of each kind a prompt asks for.

Design choices
- Only what the reading of the prompt says for certain (`mm.world.demand`): a prompt that is not read in full gives
  None, and such a picture is not checked.
"""

from __future__ import annotations

from mm.world import lexicon
from mm.world.demand import demand_of
from mm.world.words import split


def asked_numbers(prompt: str) -> tuple[int, ...] | None:
    """The number of things in each group that `prompt` asks for, in the order of the words.

    Things of one kind in one colour are one group. None where the prompt is not read in full.
    """
    demand = demand_of(split(lexicon.read(prompt).text))
    return None if demand is None else tuple(group.count for group in demand.groups)
