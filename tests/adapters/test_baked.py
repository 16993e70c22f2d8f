"""A patch that is in a model's weights already is refused, in memory, in folders and after quantizing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny import tiny_pipeline
from tiny_public import unet
from transformers import CLIPTextConfig, CLIPTextModel

import mm
from mm.adapters.patch import Entry, Patch
from mm.adapters.stack import stack_of
from mm.core.errors import UserError
from mm.layers.base_hash import base_hash
from mm.layers.surgery import linears

pytestmark = pytest.mark.filterwarnings("ignore:patch .* (does not say|was made for)")


def some_patch(root: Any, count: int = 2, **fields: Any) -> Patch:
    torch.manual_seed(3)
    found = [(path, layer) for path, layer in linears(root) if layer.in_features >= 8][:count]
    entries = {
        path: Entry(
            kind="lowrank",
            tensors={"down": torch.randn(2, layer.in_features), "up": torch.randn(layer.out_features, 2)},
        )
        for path, layer in found
    }
    return Patch(entries=entries, **fields)


def text_encoder() -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return CLIPTextModel(config).eval()


@pytest.mark.parametrize("make", [unet, text_encoder], ids=["diffusers", "transformers"])
@pytest.mark.parametrize("known", [True, False], ids=["with its base", "foreign"])
def test_what_was_baked_is_not_applied_again(make: Any, known: bool, tmp_path: Path) -> None:
    model = make()
    patch = some_patch(model, base=base_hash(model) if known else "")
    patch.save(tmp_path / "p.safetensors")
    patch.bake(model)
    baked = copy.deepcopy(model.state_dict())
    again = Patch.load(tmp_path / "p.safetensors")
    again.name = "another name"
    for one in (patch, again):
        with pytest.raises(UserError, match=f"patch '{one.name}' is part of the weights of this .* force=True"):
            one.apply(model)
        with pytest.raises(UserError, match="would act twice"):
            one.bake(model)
        with pytest.raises(UserError, match=r"lack patch .*; it is baked into the weights"):
            one.undo(model)
        with pytest.raises(UserError, match="would act twice"):
            one.apply(copy.deepcopy(model))
    assert all(torch.equal(value, baked[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path / "model")
    read = type(model).from_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="would act twice"):
        again.apply(read)
    assert again.apply(read, force=True).layers == 2
    again.undo(read)
    assert all(torch.equal(value, baked[name]) for name, value in read.state_dict().items())


def test_other_patches_and_other_weights_are_free() -> None:
    model = unet()
    first = copy.deepcopy(model.state_dict())
    patch = some_patch(model, base=base_hash(model))
    other = some_patch(model, count=3, base=base_hash(model), name="other")
    patch.bake(model)
    other.apply(model)
    other.undo(model)
    patch.apply(unet())  # another model of the class
    model.load_state_dict(first)  # the base again, of which the patch carries the hash
    patch.apply(model)
    patch.undo(model)
    assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())


def test_a_quantized_model_knows_what_was_baked_into_it(tmp_path: Path) -> None:
    model = unet()
    patch = some_patch(model, base=base_hash(model))
    patch.bake(model)
    mm.quantize(model, mm.SVDQuantConfig(rank=4, data_free=True), progress=False)
    with pytest.raises(UserError, match="would act twice"):
        patch.apply(model)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="would act twice"):
        patch.apply(UNet2DConditionModel.from_pretrained(tmp_path / "model"))


def test_an_erasure_of_ours_is_remembered_by_the_saved_pipeline(tmp_path: Path) -> None:
    pipe = tiny_pipeline(codes=False)
    patch = mm.erase(pipe, ["cat"], rank=4)
    patch.bake(pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    read = mm.TextToImagePipeline.from_pretrained(tmp_path / "pipe")
    with pytest.raises(UserError, match="part of the weights of this Trunk already"):
        patch.apply(read)


def test_a_model_knows_what_it_was_erased_of(tmp_path: Path) -> None:
    """By patches that act and by baked ones, in memory and in folders; not by one at 0 or one that was taken off."""
    model = unet()
    wolf, style = some_patch(model, name="no-wolf", report={"targets": ["wolf", "red of apple"]}), some_patch(model)
    style.report, style.name = {"targets": 5}, "style"
    style.apply(model)
    assert stack_of(model).erased() == ()
    wolf.apply(model)
    assert stack_of(model).erased() == ("wolf", "red of apple") and stack_of(model).list()[1].erases[0] == "wolf"
    wolf.scale(model, 0.0)
    assert stack_of(model).erased() == ()
    wolf.undo(model)
    style.undo(model)
    wolf.bake(model)
    model.save_pretrained(tmp_path)
    read = UNet2DConditionModel.from_pretrained(tmp_path)
    for one in (model, copy.deepcopy(model), read):
        assert stack_of(one).erased() == ("wolf", "red of apple")
