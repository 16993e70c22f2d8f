"""Steps that refresh shared features, against a search of all."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from mm.core.errors import UserError
from mm.fast import refresh_steps


def cost(similarity: list[list[float]], steps: tuple[int, ...]) -> float:
    """What sharing loses: each step uses the features of the last refresh."""
    return sum(1 - similarity[step][max(s for s in steps if s <= step)] for step in range(len(similarity)))


@pytest.mark.parametrize("seed", range(3))
def test_no_other_choice_costs_less(seed: int):
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.rand(7, 7, generator=generator, dtype=torch.float64).tolist()
    for count in range(1, 8):
        found = refresh_steps(similarity, count)
        assert len(found) == count and found[0] == 0 and list(found) == sorted(set(found))
        least = min(cost(similarity, (0, *rest)) for rest in combinations(range(1, 7), count - 1))
        assert cost(similarity, found) == pytest.approx(least)


def test_wrong_tables_are_refused():
    with pytest.raises(UserError, match="count is 3; give 1 to 2"):
        refresh_steps([[1, 0.5], [0.5, 1]], 3)
    with pytest.raises(UserError, match="give a square"):
        refresh_steps([[1, 0.5]], 1)
