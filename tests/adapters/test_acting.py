"""A patch that acts for a while leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from lora_cases import TO_Q, pair
from lora_families import fresh, run

import mm
from mm.adapters import stack_of
from mm.adapters.acting import acting
from mm.core.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_patch_acts_within_the_context_alone() -> None:
    model = fresh("FLUX")
    patch = mm.read_lora(pair(TO_Q), model, name="a")
    plain = run("FLUX", model)
    patch.apply(model)
    full = run("FLUX", model)
    patch.scale(model, 0.5)
    half = run("FLUX", model)
    patch.undo(model)
    assert not torch.equal(plain, full) and not torch.equal(plain, half)
    for given, wanted in (((patch, 0.5), half), ((patch,), full), ((patch, None), plain), ((None,), plain)):
        with acting(model, *given):
            assert torch.equal(run("FLUX", model), wanted)
        assert stack_of(model).names() == () and torch.equal(run("FLUX", model), plain)


def test_a_patch_that_is_on_keeps_its_place_and_scale_also_after_an_error() -> None:
    model = fresh("FLUX")
    first, second = (mm.read_lora(pair(TO_Q), model, name=name) for name in "ab")
    first.apply(model, 0.5)
    second.apply(model)
    before = run("FLUX", model)
    with pytest.raises(RuntimeError, match="stop"), acting(model, first, None):
        assert not torch.equal(run("FLUX", model), before)
        raise RuntimeError("stop")
    assert stack_of(model).names() == ("a", "b") and torch.equal(run("FLUX", model), before)
    other = mm.read_lora({f"{TO_Q}.diff_b": torch.ones(32)}, model, name="a")
    with pytest.raises(UserError, match="'a'"), acting(model, other):
        pytest.fail("another patch of the name acts")
    assert torch.equal(run("FLUX", model), before)
