"""The stack: any patch comes off in any order and leaves no trace, in eager, compiled and offloaded models."""

from __future__ import annotations

import copy
from itertools import permutations

import pytest
import torch
from adapter_cases import COMPILED, OFFLOADED, five, outputs_of_subsets, run, text_encoder
from torch import nn

import mm
from mm.adapters.stack import stack_of

pytestmark = pytest.mark.filterwarnings("ignore:patch .* does not say")
ORDERS = list(permutations(range(5)))


def four_bits() -> tuple[nn.Module, list]:
    model = text_encoder()
    mm.quantize(model, mm.SVDQuantConfig(rank=4, data_free=True, keep=("k_proj", "v_proj")), progress=False)
    return model, [patch.truncated(4, model) if patch.method in ("dense", "hirm") else patch for patch in five()]


def check(model: nn.Module, patches: list, want: dict, orders: list) -> None:
    """Applies all, undoes them in each order, and compares after each step."""
    for order in orders:
        for patch in patches:
            patch.apply(model)
        left = [patch.name for patch in patches]
        assert torch.equal(run(model), want[frozenset(left)]), "all five"
        for k in order:
            patches[k].undo(model)
            left.remove(patches[k].name)
            assert stack_of(model).names() == tuple(left)
            assert torch.equal(run(model), want[frozenset(left)]), (order, left)


@pytest.mark.parametrize("bits", [16, 4])
def test_every_order_of_undoing_leaves_exactly_the_model_without(bits):
    model, patches = (text_encoder(), five()) if bits == 16 else four_bits()
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    check(model, patches, outputs_of_subsets(model, patches), ORDERS)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert list(before) == list(after)
    assert kinds == [type(m) for m in model.modules()]


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("way", OFFLOADED, ids=lambda way: way.__name__)
def test_offloaded_models_too(bits, way):
    model, patches = (text_encoder(), five()) if bits == 16 else four_bits()
    want = outputs_of_subsets(model, patches)
    check(way(model), patches, want, ORDERS[::13])


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("way", COMPILED, ids=lambda way: way.__name__)
def test_compiled_models_too(bits, way):
    model, patches = (text_encoder(), five()) if bits == 16 else four_bits()
    want = outputs_of_subsets(model, patches)
    check(way(model), patches, want, [ORDERS[0], ORDERS[77]])
