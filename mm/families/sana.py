"""SANA and SANA-Sprint, and the video models of the name."""

from __future__ import annotations

from dataclasses import replace

from mm.families import previews
from mm.families.family import Family, SizeRule
from mm.families.lora_names import transformer_names
from mm.families.rules import Rules, attention, cross, keep, keep_text, modulation, plain, time
from mm.families.text_encoders import GEMMA
from mm.layers.sites import Rule

RULES: Rules = (
    *attention(r".*\.attn1"),
    *cross(r".*\.attn2", "keep"),
    *modulation(r"time_embed\.linear"),
    *keep("proj_out"),
    *keep_text(r"caption_projection\..*"),
    *time(r"time_embed\..*"),
)
# SANA-WM: the feed-forward is convolutional; the second, camera branch of attention reads what the first reads.
RULES_WM: Rules = (
    Rule(r"(blocks\.\d+\.attn)\.(qkv|[qkv]_proj_cam|output_gate)", "attn_{2}", group="{1}.in", parent="{1}"),
    *keep(r"blocks\.\d+\.attn\.(?:beta|gate)_proj", r"blocks\.\d+\.plucker_proj", r"final_layer\..*"),
    Rule(r"(blocks\.\d+\.attn)\.(?:proj|out_proj_cam)", "attn_out", parent="{1}"),
    Rule(r"(blocks\.\d+\.cross_attn)\.q_linear", "attn_q", parent="{1}"),
    Rule(r"(blocks\.\d+\.cross_attn)\.kv_linear", "cross_kv", "text", "keep"),
    Rule(r"(blocks\.\d+\.cross_attn)\.proj", "attn_out", parent="{1}"),
    *modulation(r"t_block\.\d+"),
    *keep_text(r"y_embedder\..*"),
    *time(r"t_embedder\..*"),
    *plain(r"blocks\.\d+\.mlp", "fc1", "fc2"),
)
_TEXT = (r"caption_projection\.linear_1", r".*\.attn2\.to_(?:k|v)")

SANA = Family(
    name="sana",
    pipelines={"text_to_image": "SanaPipeline", "control": "SanaControlNetPipeline"},
    more_pipelines=("SanaPAGPipeline",),
    denoisers={"SanaTransformer2DModel": RULES},
    text_encoders=GEMMA,
    steps=20,
    guidance=4.5,
    size=SizeRule(default=1024, multiple=32, maximum=4096),
    no_preview=previews.NONE_KNOWN,
    text_sites=_TEXT,
    edit_sites=_TEXT,
    objective="mm.customization.objectives.transformers:Sana",
    lora=transformer_names(0, "SanaLoraLoaderMixin"),
)
SPRINT = replace(
    SANA,
    objective="mm.customization.objectives.sana_sprint:SanaSprint",
    name="sana-sprint",
    pipelines={"text_to_image": "SanaSprintPipeline", "image_to_image": "SanaSprintImg2ImgPipeline"},
    more_pipelines=(),
    config={"guidance_embeds": True},
    steps=2,
)
VIDEO = replace(
    SANA,
    objective=None,
    name="sana-video",
    pipelines={"text_to_video": "SanaVideoPipeline", "image_to_video": "SanaImageToVideoPipeline"},
    more_pipelines=(),
    denoisers={"SanaVideoTransformer3DModel": RULES},
    steps=50,
    guidance=6.0,
    no_preview=previews.VIDEO,
)
WM = replace(
    VIDEO,
    name="sana-wm",
    pipelines={"image_to_video": "SanaWMPipeline"},
    denoisers={"SanaWMTransformer3DModel": RULES_WM},
    text_sites=(r"y_embedder\.y_proj\.fc1", r".*\.cross_attn\.kv_linear"),
    edit_sites=(r"y_embedder\.y_proj\.fc1", r".*\.cross_attn\.kv_linear"),
)
FAMILIES = (SPRINT, SANA, VIDEO, WM)
