"""Calls of diffusers and transformers on quantized models: dequantize, num_parameters, and the config's own methods."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
import transformers
from tiny_pipelines import tiny_pipeline_of
from tiny_public import flux, flux_inputs
from torch import nn

import mm
from mm.adapters.patch import Entry, Patch
from mm.core.errors import UserError
from mm.layers.linear import BranchedLinear

CONFIG = mm.SVDQuantConfig(rank=4, data_free=True)
T5 = {"d_model": 64, "d_kv": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 20}


def quantized_flux() -> nn.Module:
    torch.manual_seed(0)
    model = flux().eval().requires_grad_(False)
    mm.quantize(model, CONFIG, progress=False)
    return model


@torch.no_grad()
def test_a_dequantized_model_is_plain_and_stands_for_the_same_weights(tmp_path: Path) -> None:
    model = quantized_flux()
    layers = {n: m.effective_weight() for n, m in model.named_modules() if isinstance(m, BranchedLinear)}
    before = model(**flux_inputs()).sample
    plain = model.dequantize()
    assert plain is model
    assert not any(isinstance(m, BranchedLinear) for m in model.modules())
    for path, weight in layers.items():
        torch.testing.assert_close(model.get_submodule(path).weight, weight, atol=1e-6, rtol=1e-5)
    after = model(**flux_inputs()).sample
    assert (after - before).norm() < 0.05 * before.norm()  # inputs are no longer rounded
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)
    stored = again.state_dict()
    assert all(torch.equal(tensor, stored[path]) for path, tensor in model.state_dict().items())
    mm.quantize(model, CONFIG, progress=False)  # and it can be quantized again


def test_adapters_come_off_first() -> None:
    model = quantized_flux()
    path = "transformer_blocks.0.attn.to_q"
    layer = model.get_submodule(path)
    halves = {"down": torch.randn(2, layer.in_features), "up": torch.randn(layer.out_features, 2)}
    patch = Patch(entries={path: Entry(kind="lowrank", tensors=halves)}, name="style")
    patch.apply(model)
    with pytest.raises(UserError, match=r"to_q carries adapter 'style'; take adapters off"):
        model.dequantize()
    assert isinstance(model.get_submodule(path), BranchedLinear)
    patch.undo(model)
    model.dequantize()


def test_parameters_are_counted_with_their_integers(tmp_path: Path) -> None:
    plain, model = flux(), quantized_flux()
    model.save_pretrained(tmp_path)
    loaded = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)
    for counted in (model, loaded, copy.deepcopy(model)):
        assert counted.num_parameters() == plain.num_parameters()
        assert counted.num_parameters(exclude_embeddings=True) == plain.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(only_trainable=True) == 0
    model.dequantize()
    assert model.num_parameters() == plain.num_parameters()


def test_a_text_encoder_the_same() -> None:
    model = transformers.T5EncoderModel(transformers.T5Config(**T5)).eval()
    count = model.num_parameters()
    mm.quantize(model, CONFIG, progress=False)
    assert any(isinstance(m, BranchedLinear) for m in model.modules())
    assert model.num_parameters() == count
    model.dequantize()
    assert not any(isinstance(m, BranchedLinear) for m in model.modules())
    assert model.num_parameters() == count


def test_the_config_has_the_methods_of_other_quantization_configs(tmp_path: Path) -> None:
    config = mm.SVDQuantConfig(rank=8)
    assert config.to_diff_dict() == {"quant_method": "svdquant", "rank": 8}
    assert json.loads(config.to_json_string()) == config.to_diff_dict()
    assert json.loads(config.to_json_string(use_diff=False)) == config.to_dict()
    config.to_json_file(tmp_path / "config.json")
    assert mm.SVDQuantConfig.from_dict(json.loads((tmp_path / "config.json").read_text())) == config
    assert config.update(rank=16, other=1) == {"other": 1}
    assert config.rank == 16
    with pytest.raises(ValueError, match="bits 3"):
        config.update(bits=3)
    assert config.bits == 4


def _with_lora(model: Any) -> None:
    config = peft.LoraConfig(r=2, target_modules=["to_q", "proj_out"], init_lora_weights=False)
    model.add_adapter(config, adapter_name="style")


@torch.no_grad()
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_a_model_with_adapters_saves_as_without_them_and_says_so(tmp_path: Path, shard: str) -> None:
    model: Any = quantized_flux()
    before = model(**flux_inputs()).sample
    plain = list(model.state_dict())
    _with_lora(model)
    with pytest.warns(UserWarning, match="saved without what is applied to it: 'style'"):
        model.save_pretrained(tmp_path, max_shard_size=shard)
    again = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)
    assert list(again.state_dict()) == plain
    assert torch.equal(again(**flux_inputs()).sample, before)
    assert "style" in str(list(model.state_dict()))  # the adapters are still on the model
    with pytest.warns(UserWarning, match="saved without .*'style'"):
        copy.deepcopy(model).save_pretrained(tmp_path / "copy")


def test_a_fused_adapter_is_named_where_a_model_is_saved_without_it(tmp_path: Path) -> None:
    pipe = tiny_pipeline_of("flux")
    mm.quantize(pipe, CONFIG, progress=False)
    _with_lora(pipe.transformer)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    with pytest.warns(UserWarning, match="saved without .*'merged style'"):
        pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size="50KB")
    assert list(tmp_path.glob("transformer/*.fp16-00001-of-*.safetensors"))  # the options of pipelines arrive
    assert mm.load(tmp_path).pipeline


def test_a_16_bit_model_that_was_saved_with_adapters_is_named(tmp_path: Path) -> None:
    pipe = tiny_pipeline_of("flux")
    _with_lora(pipe.transformer)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="was saved while adapters of peft were attached"):
        mm.load(tmp_path)
