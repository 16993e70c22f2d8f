"""Krea 2, Ideogram 4, ERNIE-Image, PRX, Nucleus-Image and JoyImage, with layer names of their own."""

from __future__ import annotations

from dataclasses import replace

from mm.families import previews
from mm.families.family import Family, SizeRule
from mm.families.lora_names import transformer_names
from mm.families.rules import TIME, Rules, attention, feed_forward, gated, joint, keep, keep_text, modulation, time
from mm.families.text_encoders import MISTRAL, QWEN3_VL, decoders
from mm.layers.sites import Rule

RULES_KREA: Rules = (
    *attention(r"text_fusion\.\w+\.\d+\.attn", "text"),
    *gated(r"text_fusion\.\w+\.\d+\.ff", "gate|up", "down", "text"),
    *attention(r"transformer_blocks\.\d+\.attn", "both"),
    *gated(r"transformer_blocks\.\d+\.ff", "gate|up", "down", "both"),
    *modulation("time_mod_proj"),
    *keep("img_in", r"final_layer\..*"),
    *keep_text(r"txt_in\..*", r"text_fusion\.projector"),
    *TIME,
)
RULES_IDEOGRAM: Rules = (
    *attention(r"layers\.\d+\.attention", "both"),
    *gated(r"layers\.\d+\.feed_forward", "w1|w3", "w2", "both"),
    *modulation(r"layers\.\d+\.adaln_modulation"),
    *keep("input_proj", r"final_layer\..*"),
    *keep_text("llm_cond_proj"),
    *time(r"t_embedding\..*", "adaln_proj"),
)
RULES_ERNIE: Rules = (
    *attention(r"layers\.\d+\.self_attention", "both"),
    *gated(r"layers\.\d+\.mlp", "gate_proj|up_proj", "linear_fc2", "both"),
    *modulation(r"adaLN_modulation\.\d+"),
    *keep(r"x_embedder\..*", r"final_norm\.linear", "final_linear"),
    *keep_text("text_proj"),
    *TIME,
)
RULES_PRX: Rules = (
    Rule(r"(blocks\.\d+\.attention)\.img_qkv_proj", "attn_qkv", parent="{1}"),
    Rule(r"(blocks\.\d+\.attention)\.txt_kv_proj", "cross_kv", "text", parent="{1}"),
    Rule(r"(blocks\.\d+\.attention)\.to_out\.0", "attn_out", parent="{1}"),
    *gated(r"blocks\.\d+", "gate_proj|up_proj", "down_proj"),
    *modulation(r"blocks\.\d+\.modulation\.lin"),
    *keep("img_in", r"final_layer\..*"),
    *keep_text("txt_in"),
    *time(r"time_in\..*", r"\w*resolution\w*\..*"),
)
RULES_NUCLEUS: Rules = (
    *keep(r".*\.img_mlp\.gate"),  # the router of the experts
    *joint(r"transformer_blocks\.\d+\.attn"),
    *feed_forward(r"transformer_blocks\.\d+\.img_mlp(?:\.shared_expert|\.experts\.\d+)?"),
    *modulation(r"transformer_blocks\.\d+\.img_mod\.\d+"),
    *keep("img_in", "proj_out", r"norm_out\.linear"),
    *keep_text(r"transformer_blocks\.\d+\.encoder_proj"),
    *TIME,
)
RULES_JOY: Rules = (
    Rule(r"(double_blocks\.\d+\.attn)\.img_attn_qkv", "attn_qkv"),
    Rule(r"(double_blocks\.\d+\.attn)\.txt_attn_qkv", "cross_kv", "text"),
    Rule(r"(double_blocks\.\d+\.attn)\.img_attn_proj", "attn_out"),
    Rule(r"(double_blocks\.\d+\.attn)\.txt_attn_proj", "attn_out", "text"),
    *feed_forward(r"double_blocks\.\d+\.img_mlp", after="gelu"),
    *feed_forward(r"double_blocks\.\d+\.txt_mlp", "text", "gelu"),
    *keep("proj_out"),
    *keep_text(r"condition_embedder\.text_embedder\..*"),
    *time(r"condition_embedder\.time_\w+(?:\..*)?"),
)

KREA_2 = Family(
    name="krea-2",
    pipelines={"text_to_image": "Krea2Pipeline"},
    denoisers={"Krea2Transformer2DModel": RULES_KREA},
    text_encoders=QWEN3_VL,
    steps=28,
    guidance=4.5,
    size=SizeRule(default=1024, multiple=16, maximum=2048),
    no_preview=previews.NONE_KNOWN,
    text_sites=(r"txt_in\.linear_1", r"text_fusion\.\w+\.\d+\.attn\.to_(?:k|v)"),
    edit_sites=(r"txt_in\.linear_1",),
    lora=transformer_names(0, "Krea2LoraLoaderMixin"),
)
IDEOGRAM_4 = replace(
    KREA_2,
    name="ideogram-4",
    pipelines={"text_to_image": "Ideogram4Pipeline"},
    denoisers={"Ideogram4Transformer2DModel": RULES_IDEOGRAM},
    text_encoders={},
    steps=48,
    guidance=None,
    size=SizeRule(default=2048, multiple=16, maximum=2048),
    text_sites=("llm_cond_proj",),
    edit_sites=("llm_cond_proj",),
    lora=transformer_names(0, "Ideogram4LoraLoaderMixin"),
)
ERNIE_IMAGE = replace(
    KREA_2,
    name="ernie-image",
    pipelines={"text_to_image": "ErnieImagePipeline"},
    denoisers={"ErnieImageTransformer2DModel": RULES_ERNIE},
    text_encoders=MISTRAL,
    steps=50,
    guidance=4.0,
    text_sites=("text_proj",),
    edit_sites=("text_proj",),
    lora=transformer_names(0, "ErnieImageLoraLoaderMixin"),
)
PRX = replace(
    KREA_2,
    name="prx",
    pipelines={"text_to_image": "PRXPipeline"},
    more_pipelines=("PRXPixelPipeline",),
    denoisers={"PRXTransformer2DModel": RULES_PRX},
    text_encoders=decoders("T5GemmaEncoder"),
    guidance=4.0,
    text_sites=("txt_in", r"blocks\.\d+\.attention\.txt_kv_proj"),
    edit_sites=("txt_in", r"blocks\.\d+\.attention\.txt_kv_proj"),
    lora=transformer_names(0),
)
NUCLEUS = replace(
    KREA_2,
    name="nucleus-image",
    pipelines={"text_to_image": "NucleusMoEImagePipeline"},
    denoisers={"NucleusMoEImageTransformer2DModel": RULES_NUCLEUS},
    steps=50,
    guidance=4.0,
    text_sites=(r"transformer_blocks\.\d+\.encoder_proj", r".*\.attn\.add_(?:k|v)_proj"),
    edit_sites=(r".*\.attn\.add_(?:k|v)_proj",),
    lora=transformer_names(0),
)
JOY_IMAGE = replace(
    KREA_2,
    name="joy-image-edit",
    pipelines={"edit": "JoyImageEditPipeline"},
    more_pipelines=("JoyImageEditPlusPipeline",),
    denoisers={"JoyImageEditTransformer3DModel": RULES_JOY, "JoyImageEditPlusTransformer3DModel": RULES_JOY},
    steps=40,
    guidance=4.0,
    text_sites=(r"condition_embedder\.text_embedder\.linear_1", r".*\.attn\.txt_attn_qkv"),
    edit_sites=(r"condition_embedder\.text_embedder\.linear_1",),
    lora=transformer_names(0),
)
FAMILIES = (KREA_2, IDEOGRAM_4, ERNIE_IMAGE, PRX, NUCLEUS, JOY_IMAGE)
