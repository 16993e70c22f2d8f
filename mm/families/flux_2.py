"""FLUX.2 and FLUX.2-klein, and the transformer of FLUX.3."""

from __future__ import annotations

from dataclasses import replace

from mm.families import previews
from mm.families.family import Family, SizeRule
from mm.families.lora_names import transformer_names
from mm.families.rules import TIME, Rules, attention, joint, keep, keep_text, modulation, plain
from mm.families.stable_diffusion_3 import TEXT
from mm.families.text_encoders import MISTRAL, QWEN3
from mm.layers.sites import Rule

# One projection holds q, k, v and both halves of the gated feed-forward; `to_out` reads attention and feed-forward.
_SINGLE: Rules = (
    Rule(r"(single_transformer_blocks\.\d+\.attn)\.to_qkv_mlp_proj", "attn_qkv", "both", parent="{1}"),
    Rule(r"(single_transformer_blocks\.\d+\.attn)\.to_out", "attn_out", "both", parent="{1}"),
)
FLUX2_RULES: Rules = (
    *_SINGLE,
    *joint(r"transformer_blocks\.\d+\.attn"),
    *plain(r"transformer_blocks\.\d+\.ff", "linear_in", "linear_out"),
    *plain(r"transformer_blocks\.\d+\.ff_context", "linear_in", "linear_out", "text"),
    *modulation(r"(?:double|single)_stream_modulation(?:_img|_txt)?\.linear"),
    *keep("x_embedder", "proj_out", r"norm_out\.linear"),
    *keep_text("context_embedder"),
    *TIME,
)
_FLUX3_RULES: Rules = (
    *attention(r"single_transformer_blocks\.\d+\.attn", "both"),
    *plain(r"single_transformer_blocks\.\d+\.ff", "linear_in", "linear_out", "both"),
    *attention(r"txt_mode_blocks\.\d+\.attn", "text"),
    *plain(r"txt_mode_blocks\.\d+\.ff", "linear_in", "linear_out", "text"),
    *attention(r"mode_blocks\.\w+\.\d+\.attn"),
    *plain(r"mode_blocks\.\w+\.\d+\.ff", "linear_in", "linear_out"),
    *modulation(r"(?:early|single)_stream_modulations\.\w+\.linear"),
    *keep(r"x_embedders\..*", "proj_out", r"norm_out\.linear"),
    *keep_text("context_embedder"),
    *TIME,
)

FLUX2 = Family(
    name="flux-2",
    pipelines={"text_to_image": "Flux2Pipeline"},
    denoisers={"Flux2Transformer2DModel": FLUX2_RULES},
    text_encoders=MISTRAL,
    steps=50,
    guidance=4.0,
    size=SizeRule(default=1024, multiple=16, maximum=2048),
    no_preview=previews.NONE_KNOWN,
    text_sites=TEXT,
    edit_sites=TEXT,
    objective="mm.customization.objectives.flux_2:Flux2",
    lora=transformer_names(0, "Flux2LoraLoaderMixin"),
)
KLEIN = replace(
    FLUX2,
    name="flux-2-klein",
    pipelines={"text_to_image": "Flux2KleinPipeline", "inpaint": "Flux2KleinInpaintPipeline"},
    more_pipelines=("Flux2KleinKVPipeline",),
    text_encoders=QWEN3,
    config={"guidance_embeds": False},
)
FLUX3 = replace(
    FLUX2,
    objective=None,
    name="flux-3",
    pipelines={},
    denoisers={"Flux3Transformer2DModel": _FLUX3_RULES},
    text_sites=("context_embedder", r"txt_mode_blocks\.\d+\.attn\.to_(?:k|v)"),
    edit_sites=("context_embedder", r"txt_mode_blocks\.\d+\.attn\.to_(?:k|v)"),
    lora=transformer_names(0, "Flux3LoraLoaderMixin"),
)
FAMILIES = (KLEIN, FLUX2, FLUX3)
