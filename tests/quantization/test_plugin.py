"""SVDQuant through diffusers' and transformers' own calls, on tiny random models of the real classes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from diffusers import FluxTransformer2DModel, PipelineQuantizationConfig
from tiny import draw, tiny_pipeline
from tiny_public import TEXT, flux, flux_inputs

import mm
from mm.core.errors import UserError
from mm.layers.base_hash import base_hash
from mm.layers.linear import BranchedLinear
from mm.models.trunk import Trunk
from mm.quantization.layout import quantized

CONFIG = mm.SVDQuantConfig(rank=4, data_free=True)


@torch.no_grad()
def run(model) -> torch.Tensor:
    return model.eval()(**flux_inputs()).sample


def test_quantize_save_load_run_is_the_same_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    model = flux()
    mm.quantize(model, mm.SVDQuantConfig(rank=4, iterations=3, rows=32), calibration=[flux_inputs()], progress=False)
    want = run(model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "svdquant"
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(run(loaded), want)
    assert [p for p, _ in quantized(loaded)] == [p for p, _ in quantized(model)]
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    first, second = ((f / "diffusion_pytorch_model.safetensors").read_bytes() for f in (tmp_path, again))
    assert first == second
    assert base_hash(loaded) == base_hash(model)


def test_16_bit_weights_are_quantized_while_loading(tmp_path):
    torch.manual_seed(0)
    plain = flux()
    want, base = run(plain), base_hash(plain)
    plain.save_pretrained(tmp_path)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path, quantization_config=CONFIG)
    assert quantized(loaded)
    assert base_hash(loaded) == base
    assert (run(loaded) - want).norm() < 0.2 * want.norm()
    loaded.save_pretrained(tmp_path / "small")
    assert torch.equal(run(FluxTransformer2DModel.from_pretrained(tmp_path / "small")), run(loaded))


def test_a_pipeline_takes_a_mapping_and_keeps_its_parts(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    config = PipelineQuantizationConfig(quant_mapping={"trunk": CONFIG})
    pipe = mm.TextToImagePipeline.from_pretrained(tmp_path, quantization_config=config)
    pipe.set_progress_bar_config(disable=True)
    assert quantized(pipe.trunk)
    assert not quantized(pipe.velocity_decoder)
    pipe.save_pretrained(tmp_path / "small")
    again = mm.TextToImagePipeline.from_pretrained(tmp_path / "small")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again), draw(pipe))


def test_mm_quantize_on_a_pipeline_takes_its_drawing_parts(tmp_path):
    pipe = tiny_pipeline()
    before = draw(pipe)
    config = mm.SVDQuantConfig(rank=4, iterations=3, rows=64, steps=2)
    report = mm.quantize(pipe, config, calibration=["a cat", "two red dogs on grass"], progress=False)
    parts = {layer.path.split(".")[0] for layer in report.layers}
    assert parts == {"trunk", "velocity_decoder", "code_head"}
    assert (draw(pipe) - before).abs().mean() < 0.1
    pipe.save_pretrained(tmp_path)
    again = mm.TextToImagePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    for mode in ("flow", "codes"):
        assert torch.equal(draw(again, mode=mode), draw(pipe, mode=mode))
    with pytest.raises(UserError, match="no module unet"):
        mm.quantize(pipe, CONFIG, components=["unet"])


def test_adapters_of_others_go_on_top(tmp_path):
    from peft import LoraConfig

    torch.manual_seed(0)
    flux().save_pretrained(tmp_path)
    model = FluxTransformer2DModel.from_pretrained(tmp_path, quantization_config=CONFIG)
    before = run(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_mlp"], init_lora_weights=False))
    assert not torch.equal(run(model), before)
    model.disable_adapters()
    assert torch.equal(run(model), before)


def test_a_text_encoder_through_transformers(tmp_path):
    torch.manual_seed(0)
    plain = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)).eval()
    ids = torch.tensor([[3, 4, 5, 6]])
    want = plain(ids).last_hidden_state
    plain.save_pretrained(tmp_path)
    loaded = transformers.CLIPTextModel.from_pretrained(tmp_path, quantization_config=CONFIG).eval()
    assert quantized(loaded)
    assert (loaded(ids).last_hidden_state - want).norm() < 0.3 * want.norm()
    loaded.save_pretrained(tmp_path / "small")
    again = transformers.CLIPTextModel.from_pretrained(tmp_path / "small").eval()
    assert torch.equal(again(ids).last_hidden_state, loaded(ids).last_hidden_state)


def test_saved_paths_that_do_not_fit_are_named(tmp_path):
    model = Trunk(width=32, depth=1, heads=2)
    mm.quantize(model, CONFIG, progress=False)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["layers"][0]["paths"][0] = "nowhere"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="quantizes nowhere, which Trunk does not have"):
        Trunk.from_pretrained(tmp_path)


def test_import_mm_is_all_it_takes_in_either_order():
    for first, second in (("mm", "diffusers"), ("diffusers", "mm")):
        code = (
            f"import {first}, {second}; from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING as a;"
            "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as b;"
            "assert 'svdquant' in a and 'svdquant' in b"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    quick = "import mm, sys; assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", quick], check=True, timeout=300)


def test_layers_are_linear_layers_to_everybody():
    model = flux()
    mm.quantize(model, CONFIG, progress=False)
    assert all(isinstance(layer, torch.nn.Linear) for _, layer in quantized(model))
    layer: BranchedLinear = quantized(model)[0][1]
    assert layer.weight.shape == (layer.out_features, layer.in_features)
