"""LoRAs by the original names of Chroma and Lumina-Image 2.0, which kohya's scripts and ComfyUI use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_families import noise
from safetensors.torch import load_file
from tiny_pipelines import draw_with, tiny_pipeline_of

import mm
from mm.core.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")
RANK, ALPHA = 4, 2.0
DOUBLE, SINGLE = "transformer_blocks.0.", "single_transformer_blocks.0."
LAYERS = {  # original name: layers of diffusers, in the order of its rows
    "chroma": {
        "double_blocks.0.img_attn.qkv": [f"{DOUBLE}attn.to_{letter}" for letter in "qkv"],
        "double_blocks.0.txt_attn.proj": [f"{DOUBLE}attn.to_add_out"],
        "double_blocks.0.txt_mlp.2": [f"{DOUBLE}ff_context.net.2"],
        "single_blocks.0.linear1": [*(f"{SINGLE}attn.to_{letter}" for letter in "qkv"), f"{SINGLE}proj_mlp"],
        "single_blocks.0.linear2": [f"{SINGLE}proj_out"],
        "distilled_guidance_layer.layers.0.in_layer": ["distilled_guidance_layer.layers.0.linear_1"],
        "final_layer.linear": ["proj_out"],
    },
    "lumina-2": {
        "layers.0.attention.qkv": [f"layers.0.attn.to_{letter}" for letter in "qkv"],
        "layers.0.attention.out": ["layers.0.attn.to_out.0"],
        "layers.0.feed_forward.w2": ["layers.0.feed_forward.linear_2"],
        "layers.0.adaLN_modulation.1": ["layers.0.norm1.linear"],
        "context_refiner.0.feed_forward.w3": ["context_refiner.0.feed_forward.linear_3"],
        "noise_refiner.0.attention.qkv": [f"noise_refiner.0.attn.to_{letter}" for letter in "qkv"],
        "cap_embedder.1": ["time_caption_embed.caption_embedder.1"],
        "final_layer.linear": ["norm_out.linear_2"],
    },
}


def _named(layout: str, name: str) -> str:
    return "lora_unet_" + name.replace(".", "_") if layout == "kohya" else f"diffusion_model.{name}"


def _file(pipe: Any, family: str, layout: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tensors of a file, and what they add to each layer's weight."""
    tensors, changes = {}, {}
    for seed, (name, paths) in enumerate(LAYERS[family].items()):
        layers = [pipe.transformer.get_submodule(path) for path in paths]
        down = noise(RANK, layers[0].in_features, seed=seed) / 4
        up = noise(sum(layer.out_features for layer in layers), RANK, seed=seed + 50)
        stem = _named(layout, name)
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        tensors[f"{stem}.alpha"] = torch.tensor(ALPHA)
        parts = (ALPHA / RANK * up @ down).split([layer.out_features for layer in layers])
        changes |= dict(zip(paths, parts, strict=True))
    return tensors, changes


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
@pytest.mark.parametrize("family", LAYERS)
def test_original_names_are_read_and_written(family: str, layout: str, tmp_path: Path) -> None:
    pipe, merged = tiny_pipeline_of(family), tiny_pipeline_of(family)
    tensors, changes = _file(pipe, family, layout)
    for path, change in changes.items():
        merged.transformer.get_submodule(path).weight.data += change
    wanted, plain = draw_with(family, merged), draw_with(family, pipe)
    assert float((wanted - plain).abs().max()) > 1e-2
    patch = mm.read_lora(tensors, pipe)
    assert len(patch.entries) == len(changes)
    patch.apply(pipe)
    torch.testing.assert_close(draw_with(family, pipe), wanted, atol=1e-5, rtol=0)
    patch.undo(pipe)
    file = tmp_path / "x.safetensors"
    mm.write_lora(patch, file, layout, target=pipe)  # type: ignore[arg-type]
    assert load_file(file).keys() == tensors.keys()
    mm.read_lora(file, pipe).apply(pipe)
    torch.testing.assert_close(draw_with(family, pipe), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", LAYERS)
def test_a_name_that_is_not_there_is_named(family: str) -> None:
    pipe = tiny_pipeline_of(family)
    tensors, _ = _file(pipe, family, "comfyui")
    tensors |= {key.replace(".0.", ".9."): value for key, value in tensors.items() if ".0." in key}
    with pytest.raises(UserError, match=r"\.9\."):
        mm.read_lora(tensors, pipe)
