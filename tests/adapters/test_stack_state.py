"""The stack belongs to the model: copies, pickles, saved folders and quantizing keep it true."""

from __future__ import annotations

import copy

import pytest
import torch
from adapter_cases import (
    COMPILED,
    FC1,
    OFFLOADED,
    WIDTH,
    dense,
    five,
    run,
    text_encoder,
)
from peft import LoraConfig, get_peft_model
from tiny_public import T5
from torch import nn
from transformers import T5Config, T5EncoderModel

import mm
from mm.adapters.patch import Entry, Patch
from mm.adapters.stack import stack_of
from mm.core.errors import UserError
from mm.layers.base_hash import base_hash

pytestmark = pytest.mark.filterwarnings("ignore:patch .* does not say")


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
