"""The stack: any patch comes off in any order and leaves no trace, in eager, compiled and offloaded models."""

from __future__ import annotations

import copy
import dataclasses
from itertools import permutations

import pytest
import torch
from adapter_cases import COMPILED, FC1, OFFLOADED, WIDTH, WORDS, Q, five, outputs_of_subsets, run, text_encoder
from peft import LoraConfig, get_peft_model
from tiny_public import T5
from torch import nn
from transformers import T5Config, T5EncoderModel

import mm
from mm.adapters import layer_state
from mm.adapters.patch import Entry, Patch
from mm.adapters.stack import stack_of
from mm.core.errors import UserError
from mm.layers.base_hash import base_hash
from mm.layers.linear import BranchedLinear

pytestmark = pytest.mark.filterwarnings("ignore:patch .* does not say")
ORDERS = list(permutations(range(5)))


def four_bits() -> tuple[nn.Module, list]:
    model = text_encoder()
    mm.quantize(model, mm.SVDQuantConfig(rank=4, data_free=True, keep=("k_proj", "v_proj")), progress=False)
    assert all(isinstance(model.get_submodule(path), BranchedLinear) for path in (Q, FC1))
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


@pytest.mark.parametrize(("way", "bits"), [*((way, 16) for way in COMPILED), (COMPILED[0], 4)])
def test_compiled_models_too(bits, way):
    model, patches = (text_encoder(), five()) if bits == 16 else four_bits()
    want = outputs_of_subsets(model, patches)
    check(way(model), patches, want, ORDERS[77:78])


def dense(name: str = "dense", seed: int = 0, path: str = Q) -> Patch:
    delta = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed))
    return Patch(name=name, method="dense", entries={path: Entry(kind="dense", tensors={"delta": delta})})


def state_of(model: nn.Module) -> list:
    """All that a call must not change: classes, tensors by name, branches, attributes."""
    tensors = {n: t.clone() for n, t in model.state_dict().items() if not t.is_meta}
    return [
        [type(m).__name__ for m in model.modules()],
        [sorted(m.__dict__) for m in model.modules()],
        [[b.name for b in getattr(m, "branches", ())] for m in model.modules()],
        tensors,
    ]


def unchanged(model: nn.Module, before: list) -> bool:
    now = state_of(model)
    return now[:3] == before[:3] and all(torch.equal(t, now[3][n]) for n, t in before[3].items())


def test_verify_only_looks_and_knows_every_kind():
    model = text_encoder()
    before = state_of(model)
    for patch in five():
        with pytest.raises(UserError, match=f"layers lack patch '{patch.name}'"):
            patch.verify(model)
        assert unchanged(model, before)
    for patch in five():
        patch.apply(model)
    after = state_of(model)
    for patch in five():
        total = sum(len(e.tensors) for e in patch.entries.values())
        assert patch.verify(model) == f"{total} of {total} tensors applied"
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


def test_the_state_belongs_to_the_model(tmp_path):
    one, two, patch = text_encoder(), text_encoder(1), five()[1]
    befores = [run(one), run(two)]
    patch.apply(one)
    patch.apply(two, 0.5)
    patch.save(tmp_path / "p.safetensors")
    again = Patch.load(tmp_path / "p.safetensors")
    assert again.verify(one) == "2 of 2 tensors applied"
    twin = copy.deepcopy(one)
    again.undo(one)
    patch.undo(two)
    assert torch.equal(run(one), befores[0])
    assert torch.equal(run(two), befores[1])
    assert stack_of(twin).names() == ("no-wolf",)
    patch.undo(twin)
    assert torch.equal(run(twin), befores[0])


def test_a_pickled_model_keeps_its_stack(tmp_path):
    model, patches = text_encoder(), five()
    for patch in patches:
        patch.apply(model)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(run(again), run(model))
    for patch in patches:
        patch.undo(again)
    assert torch.equal(run(again), run(text_encoder()))


def test_a_lora_stays_live_while_the_model_is_quantized():
    model, twin, patch = text_encoder(), text_encoder(), five()[0]
    settings = mm.SVDQuantConfig(rank=4, data_free=True)
    patch.apply(model)
    for each in (model, twin):
        mm.quantize(each, settings, progress=False)
    assert patch.verify(model) == "4 of 4 tensors applied"
    patch.scale(model, 0.5)
    patch.apply(twin, 0.5)
    assert torch.equal(run(model), run(twin))
    patch.undo(model)
    patch.undo(twin)
    assert torch.equal(run(model), run(twin))


def test_types_and_copies_keep_the_stack():
    model, plain, patches = text_encoder(), text_encoder().bfloat16(), five()
    for patch in patches:
        patch.apply(model)
    patches[0].scale(model, 0.3)
    model.to(torch.bfloat16)
    assert float(model.get_submodule(FC1)._scales[0]) == pytest.approx(0.3, abs=1e-7)  # not rounded to bfloat16
    for patch in patches:
        assert "tensors applied" in patch.verify(model)
    for patch in patches[::-1]:
        patch.undo(model)
    assert torch.equal(run(model), run(plain))


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


# ---- what the model's own tensors are --------------------------------------------------------------------------------


def test_the_base_is_known_whatever_is_on_it():
    model = text_encoder()
    base = base_hash(model)
    for patch in five():
        patch.apply(model)
    assert base_hash(model) == base
    for way in (*COMPILED, *OFFLOADED):
        fresh = way(text_encoder())
        assert base_hash(fresh) == base, way.__name__
    wrapped = get_peft_model(text_encoder(), LoraConfig(target_modules=["q_proj"]))
    assert base_hash(wrapped) == base


def test_a_model_is_saved_without_its_patches_and_says_so(tmp_path):
    model, patches = text_encoder(), five()
    plain = run(model)
    for patch in patches:
        patch.apply(model)
    full = run(model)
    with pytest.warns(UserWarning, match=r"saved without .*'style'.*'no-wolf'") as caught:
        model.save_pretrained(tmp_path)
    assert sum("saved without" in str(w.message) for w in caught) == 1
    assert torch.equal(run(model), full)
    assert torch.equal(run(type(model).from_pretrained(tmp_path).eval()), plain)


def test_weights_under_a_patch_are_not_replaced():
    model, other = text_encoder(), text_encoder(1)
    dense().apply(model)
    with pytest.raises(UserError, match="has a weight that patches changed; undo or bake them"):
        model.load_state_dict(other.state_dict())
    with pytest.raises(UserError, match="undo or bake them, then quantize"):
        mm.quantize(model, mm.SVDQuantConfig(rank=4, data_free=True), progress=False)
    assert all(getattr(m, "bits", 16) == 16 for m in model.modules())
    dense().undo(model)
    model.load_state_dict(other.state_dict())
    assert torch.equal(run(model), run(other))


def test_a_table_with_two_names_is_one_table():
    config = T5Config(**T5, tie_word_embeddings=True)
    model = T5EncoderModel(config).eval()
    assert model.shared.weight is model.encoder.embed_tokens.weight
    before = model.shared.weight.detach().clone()

    def rows(name: str, path: str, value: float) -> Patch:
        tensors = {"ids": torch.tensor([2, 5]), "rows": torch.full((2, 16), value)}
        return Patch(name=name, entries={path: Entry(kind="rows", tensors=tensors)})

    one, two = rows("one", "shared", 1.0), rows("two", "encoder.embed_tokens", 2.0)
    one.apply(model)
    two.apply(model)
    one.undo(model)
    assert model.shared.weight[[2, 5]].eq(2).all()
    two.undo(model)
    assert torch.equal(model.shared.weight, before)
    tied = nn.ModuleDict({"words": nn.Embedding(WIDTH, WIDTH), "head": nn.Linear(WIDTH, WIDTH, bias=False)})
    tied["head"].weight = tied["words"].weight
    with pytest.raises(UserError, match="also that of words, which would change too"):
        dense(path="head").apply(tied)


# ---- what a patch does not go onto -----------------------------------------------------------------------------------


class Params4bit(nn.Parameter):
    """Stands for bitsandbytes' packed weights: uint8, flattened."""


class Linear4bit(nn.Linear):
    """Stands for bitsandbytes' layer."""

    def __init__(self) -> None:
        super().__init__(16, 16)
        self.weight = Params4bit(torch.zeros(128, 1, dtype=torch.uint8), requires_grad=False)


class Packed(torch.Tensor):
    """Stands for torchao's tensor subclasses inside a plain nn.Linear."""


def torchao_like() -> nn.Linear:
    layer = nn.Linear(16, 16)
    layer.weight = nn.Parameter(torch.randn(16, 16).as_subclass(Packed))
    return layer


class GGUFParameter(nn.Parameter):
    """Stands for diffusers' GGUF weights: bytes of quantized blocks."""


class GGUFLinear(nn.Linear):
    """Stands for diffusers' GGUF layer."""

    def __init__(self) -> None:
        super().__init__(16, 16)
        self.weight = GGUFParameter(torch.zeros(16, 18, dtype=torch.uint8), requires_grad=False)


def eight_bit_float() -> nn.Linear:
    layer = nn.Linear(16, 16)
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    return layer


def replaced() -> nn.Linear:
    layer = nn.Linear(16, 16)
    layer.forward = lambda x: x
    return layer


FOREIGN = {
    "bitsandbytes": (Linear4bit, "Linear4bit.* whose weight is a Params4bit"),
    "torchao": (torchao_like, "Linear whose weight is a Packed"),
    "gguf": (GGUFLinear, "GGUFLinear.* whose weight is a GGUFParameter"),
    "float8": (eight_bit_float, "Linear whose weight is float8_e4m3fn"),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)), "ParametrizedLinear"),
    "attention's own": (lambda: nn.MultiheadAttention(16, 2).out_proj, "NonDynamicallyQuantizableLinear"),
    "replaced": (replaced, "its forward was replaced by another program"),
    "not loaded": (lambda: nn.Linear(16, 16, device="meta"), "the weight of a Linear is on the meta device"),
    "convolution": (lambda: nn.Conv1d(16, 16, 1), "a Conv1d, not a linear layer"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_layers_of_other_libraries_are_named_before_anything_is_changed(kind):
    make, message = FOREIGN[kind]
    model = nn.ModuleDict({"plain": nn.Linear(16, 16), "odd": make()})
    before = state_of(model)
    halves = {"down": torch.ones(2, 16), "up": torch.ones(16, 2)}
    entry = Entry(kind="lowrank", tensors=halves)
    with pytest.raises(UserError, match=rf"1 of 2 layers .* not: odd \(.*{message}"):
        Patch(entries={"plain": entry, "odd": entry}).apply(model)
    assert unchanged(model, before)


@pytest.mark.parametrize(
    ("ids", "rows", "message"),
    [
        ([-1], torch.ones(1, WIDTH), "ids -1 to -1"),
        ([2, 2], torch.ones(2, WIDTH), "the same id twice"),
        ([], torch.ones(0, WIDTH), "need shapes"),
        ([1], torch.ones(1, 9), "rows of width 9"),
        ([1], torch.full((1, WIDTH), torch.nan), "NaN or infinity"),
    ],
)
def test_rows_that_fit_nowhere_are_named(ids, rows, message):
    model = text_encoder()
    entry = Entry(kind="rows", tensors={"ids": torch.tensor(ids, dtype=torch.long), "rows": rows})
    with pytest.raises(UserError, match=message):
        Patch(entries={WORDS: entry}).apply(model)


def test_patches_reach_layers_that_peft_wraps():
    model = text_encoder()
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    before = run(wrapped)
    for patch in five():
        patch.apply(wrapped)
    assert not torch.allclose(run(wrapped), before, atol=1e-3)
    for patch in five():
        patch.undo(wrapped)
    assert torch.equal(run(wrapped), before)
