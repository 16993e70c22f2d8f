"""LoRA files for text encoders: every spelling of their names, and which encoder is meant."""

from __future__ import annotations

import pytest
import torch
from lora_cases import pair
from lora_families import fresh, noise, pipeline_of
from tiny_public import T5, TEXT
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

import mm
from mm.core.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")


def text_encoder(**fields):
    torch.manual_seed(0)
    return CLIPTextModel(CLIPTextConfig(**(TEXT | fields), max_position_embeddings=8)).eval()


@pytest.mark.parametrize("prefix", ["text_encoder.text_model.", "text_encoder.", "lora_te1_text_model_", "lora_te_",
                                    "text_encoders.clip_l.transformer.text_model."])  # fmt: skip
@pytest.mark.parametrize("level", [False, True])
def test_clip_with_and_without_the_level_text_model(prefix, level):
    from torch import nn

    clip = text_encoder()
    if level:  # as transformers 4 built it
        outer = type("CLIPTextModel", (nn.Module,), {})()
        outer.text_model = clip
        clip = outer
    unet = fresh("SD 1.5")
    pipe = pipeline_of("SD 1.5", unet)
    pipe.register_modules(text_encoder=clip)
    layer = "encoder.layers.0.self_attn.q_proj" if "_te" not in prefix else "encoder_layers_0_self_attn_q_proj"
    unet_layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    patch = mm.read_lora(pair(prefix + layer, 16, 16) | pair(f"unet.{unet_layer}", 8, 8), pipe)
    assert len(patch.entries) == 2
    assert any(path.startswith("text_encoder.") for path in patch.entries)
    patch.apply(pipe)
    with pytest.raises(UserError, match="1 of 2 LoRA layers are in this model; not: " + prefix[:8]):
        mm.read_lora(pair(prefix + layer, 16, 16) | pair(f"unet.{unet_layer}", 8, 8), unet)


def test_early_names_of_diffusers_in_text_encoders():
    clip = text_encoder()
    tensors = {"text_model.encoder.layers.0.self_attn.to_out_lora.down.weight": noise(2, 16),
               "text_model.encoder.layers.0.self_attn.to_out_lora.up.weight": noise(16, 2),
               "text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight": noise(2, 16),
               "text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight": noise(32, 2)}  # fmt: skip
    assert list(mm.read_lora(tensors, clip).entries) == ["encoder.layers.0.self_attn.out_proj",
                                                         "encoder.layers.0.mlp.fc1"]  # fmt: skip


@pytest.mark.parametrize("family", ["FLUX", "SD3"])
def test_t5_is_the_third_text_encoder_or_the_second(family):
    pipe = pipeline_of(family, fresh(family))
    part = "text_encoder_2" if family == "FLUX" else "text_encoder_3"
    pipe.register_modules(**{part: T5EncoderModel(T5Config(**T5))})
    flat = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    assert list(mm.read_lora(pair(flat, 16, 16), pipe).entries) == [f"{part}.encoder.block.0.layer.0.SelfAttention.q"]


def test_a_name_that_two_encoders_have_is_not_guessed():
    pipe = pipeline_of("SDXL", fresh("SDXL"))
    pipe.register_modules(text_encoder=text_encoder(), text_encoder_2=text_encoder())
    with pytest.raises(UserError, match="may be a layer of text_encoder or text_encoder_2"):
        mm.read_lora(pair("encoder.layers.0.self_attn.q_proj", 16, 16), pipe)
