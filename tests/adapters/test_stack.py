"""The stack: any patch comes off in any order and leaves no trace, in eager, compiled and offloaded models."""

from __future__ import annotations

import copy
import dataclasses
from itertools import permutations

import pytest
import torch
from adapter_cases import (
    COMPILED,
    OFFLOADED,
    WORDS,
    Q,
    dense,
    five,
    four_bits,
    outputs_of_subsets,
    run,
    state_of,
    text_encoder,
    unchanged,
)
from torch import nn

from mm.adapters import layer_state
from mm.adapters.stack import stack_of
from mm.core.errors import UserError
from mm.layers.base_hash import base_hash
from mm.layers.linear import BranchedLinear

pytestmark = pytest.mark.filterwarnings("ignore:patch .* does not say")
ORDERS = list(permutations(range(5)))


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


@pytest.mark.parametrize(("way", "bits"), [*((way, 16) for way in COMPILED), (COMPILED[0], 4)])
def test_compiled_models_too(bits, way):
    model, patches = (text_encoder(), five()) if bits == 16 else four_bits()
    want = outputs_of_subsets(model, patches)
    check(way(model), patches, want, ORDERS[77:78])


def test_verify_only_looks_and_knows_every_kind():
    model = text_encoder()
    before = state_of(model)
    for patch in five():
        with pytest.raises(UserError, match=f"layers? lack patch '{patch.name}'"):
            patch.verify(model)
        assert unchanged(model, before)
    for patch in five():
        patch.apply(model)
    after = state_of(model)
    for patch in five():
        total = sum(len(e.tensors) for e in patch.entries.values())
        assert patch.verify(model) == f"{total} of {total} tensor{'s' * (total != 1)} applied"
    assert unchanged(model, after)
    layer = model.get_submodule(Q)
    with torch.no_grad():
        layer.weight[0, 0] += 1
    with pytest.raises(UserError, match="something else changed the layer"):
        five()[1].verify(model)
    with pytest.raises(UserError, match="another patch named 'style' is applied"):
        dense("style").verify(model)


def test_a_name_stands_for_one_patch():
    model, first = text_encoder(), five()[0]
    first.apply(model)
    before = state_of(model)
    second = dataclasses.replace(five()[4], name="style")  # another layer first, the shared one second
    with pytest.raises(UserError, match="a patch 'style' is applied already; undo it, or give this one another name"):
        second.apply(model)
    assert unchanged(model, before)
    with pytest.raises(UserError, match="patch 'style'"):
        second.undo(model)
    assert unchanged(model, before)
    with pytest.raises(UserError, match="no patch 'ghost' is applied; applied: style"):
        stack_of(model).undo("ghost")
    with pytest.raises(UserError, match="has no name"):
        dataclasses.replace(first, name="").apply(model)


@pytest.mark.parametrize("call", ["apply", "undo", "scale", "bake"])
def test_what_fails_midway_leaves_all_as_it_was(call, monkeypatch):
    model, patches = text_encoder(), five()
    for patch in patches[: 4 if call == "apply" else 5]:
        patch.apply(model)
    before, want = state_of(model), run(model)
    real, calls = layer_state._set_branches, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError("no memory left")
        return real(*args)

    monkeypatch.setattr(layer_state, "_set_branches", failing)
    if call == "scale":
        monkeypatch.setattr(BranchedLinear, "set_scale", lambda *args: failing(None))
    with pytest.raises((MemoryError, TypeError)):
        {
            "apply": lambda: patches[4].apply(model),
            "undo": lambda: patches[3].undo(model),
            "scale": lambda: patches[3].scale(model, 0.5),
            "bake": lambda: patches[0].bake(model),
        }[call]()
    monkeypatch.undo()
    assert unchanged(model, before)
    assert torch.equal(run(model), want)


@pytest.mark.parametrize("bits", [16, 4])
def test_adapters_put_on_under_inference_mode_scale_and_come_off(bits):
    with torch.inference_mode():
        model, patches = (text_encoder(), five()) if bits == 16 else four_bits()
        before = run(model)
        for patch in patches:
            patch.apply(model)
    for patch in patches:
        patch.scale(model, 0.0)
    torch.testing.assert_close(run(model), before)
    with torch.inference_mode():
        patches[0].scale(model, 1.0)
    for patch in patches:
        patch.undo(model)
    assert torch.equal(run(model), before)


def test_every_kind_scales():
    model, patches = text_encoder(), five()
    before = copy.deepcopy(model.state_dict())
    for patch in patches[1:4]:
        patch.apply(model, 0.5)
    layer, table = model.get_submodule(Q), model.get_submodule(WORDS)
    delta, turn = (patches[k].entries[Q].tensors[n] for k, n in ((1, "delta"), (3, "rotation")))
    want = before[f"{Q}.weight"] + 0.5 * delta
    torch.testing.assert_close(layer.weight.detach(), want + 0.5 * (turn @ want - want))
    rows = patches[2].entries[WORDS].tensors
    torch.testing.assert_close(table.weight[rows["ids"]], (before[f"{WORDS}.weight"][rows["ids"]] + rows["rows"]) / 2)
    for patch in patches[1:4]:
        patch.scale(model, 0.0)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert [item.scale for item in stack_of(model).list()] == [0.0] * 3


def test_a_rotation_turns_what_lies_below_it_and_not_what_comes_after():
    model, patches = text_encoder(), five()
    for k in (0, 3, 4):
        patches[k].apply(model)
    style, turn, ink = (patches[k].entries[Q].tensors for k in (0, 3, 4))
    weight = text_encoder().get_submodule(Q).weight
    want = turn["rotation"] @ (weight + 0.7 * style["up"] @ style["down"]) + ink["up"] @ ink["down"]
    torch.testing.assert_close(model.get_submodule(Q).effective_weight(), want, atol=1e-5, rtol=1e-5)


def test_a_rotation_goes_onto_4_bits_truncated_with_the_loss_printed(capsys):
    model, patches = four_bits()
    plain, turn = model.get_submodule(Q).effective_weight(), five()[3].entries[Q].tensors["rotation"]
    assert "truncated 2 rotation entries to rank 4; at most 0.0% lost" in capsys.readouterr().out
    patches[3].apply(model)
    torch.testing.assert_close(model.get_submodule(Q).effective_weight(), turn @ plain, atol=1e-5, rtol=1e-4)
    full = five()[3]
    with pytest.raises(UserError, match="cannot go onto 4-bit weights"):
        full.apply(model)
    with pytest.raises(UserError, match=r"give the model too: truncated\(rank, model\)"):
        full.truncated(4)
    lossy = full.truncated(1, text_encoder()).report["truncated"]
    assert 0.05 < lossy[Q] < 0.95


def test_list_and_overlap():
    model, patches = text_encoder(), five()
    patches[0].base = base_hash(model)
    for patch in patches:
        patch.apply(model)
    items = stack_of(model).list()
    assert [item.name for item in items] == ["style", "no-wolf", "mug", "turn", "ink"]
    assert [(i.method, i.layers, i.tensors, i.kinds) for i in items[:3]] == [
        ("lora", 2, 4, ("lowrank",)), ("dense", 1, 2, ("bias", "dense")), ("rows", 1, 2, ("rows",))
    ]  # fmt: skip
    assert [item.base_matches for item in items] == [True, None, None, None, None]
    assert stack_of(model).overlap("style", "turn") == (Q,)
    assert stack_of(model).overlap("mug", "turn") == ()
    assert [p.name for p in patches if p.base] == ["style"]
    stack_of(model).clear()
    assert stack_of(model).list() == ()


def test_baking_takes_a_patch_into_the_weights_in_its_order():
    model, patches, twin = text_encoder(), five(), text_encoder()
    for patch in patches:
        patch.apply(model)
    want = run(model)
    with pytest.raises(UserError, match="'turn' acts on what 'style' gives there; bake 'style' first"):
        patches[3].bake(model)
    for patch in patches:
        patch.bake(model)
        assert patch.name not in stack_of(model).names()
        torch.testing.assert_close(run(model), want, atol=1e-4, rtol=1e-4)
        patch.bake(twin)
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]
    torch.testing.assert_close(run(twin), want, atol=1e-4, rtol=1e-4)
    quantized, others = four_bits()
    before = state_of(quantized)
    with pytest.raises(UserError, match="4-bit weights, which take no fusing"):
        others[0].bake(quantized)
    assert unchanged(quantized, before)
