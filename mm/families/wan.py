"""Wan and the models built like it: VACE, Animate, SkyReels, ChronoEdit, AnyFlow, Helios, Lucy."""

from __future__ import annotations

from mm.families import previews
from mm.families.family import Family, SizeRule
from mm.families.lora_names import transformer_names
from mm.families.rules import Rules, attention, cross, feed_forward, keep, keep_text, plain, time
from mm.families.text_encoders import UMT5
from mm.layers.sites import Rule

RULES: Rules = (
    *keep(r"condition_embedder\.image_embedder\..*", r"face_encoder\..*", r"vace_blocks\.\d+\.proj_(?:in|out)"),
    *attention(r"(?:vace_)?blocks\.\d+\.attn1"),
    Rule(r"((?:vace_)?blocks\.\d+\.attn2)\.add_(k|v)_proj", "attn_{2}", group="{1}.add_kv", parent="{1}"),
    *cross(r"(?:vace_)?blocks\.\d+\.attn2"),
    *cross(r"face_adapter\.\d+", reads="picture"),
    *feed_forward(r"(?:vace_)?blocks\.\d+\.ffn", after="gelu"),
    *keep("proj_out"),
    *keep_text(r"condition_embedder\.text_embedder\..*"),
    *time(r"condition_embedder\.(?:time|delta)_\w+(?:\..*)?", r"fps_projection\..*"),
)
RULES_ANIMATE_2: Rules = (
    *attention(r"blocks\.\d+\.self_attn"),
    Rule(r"(blocks\.\d+\.cross_attn)\.add_(k|v)_proj", "attn_{2}", group="{1}.add_kv", parent="{1}"),
    *cross(r"blocks\.\d+\.cross_attn"),
    *plain(r"blocks\.\d+\.ffn", "0", "2", after="gelu"),
    *keep(r"head\..*", r"img_emb\..*"),
    *keep_text(r"text_embedding\..*"),
    *time(r"time_embedding\..*", r"time_projection\..*"),
)
_TEXT = (r"condition_embedder\.text_embedder\.linear_1", r"(?:vace_)?blocks\.\d+\.attn2\.to_(?:k|v)")

WAN = Family(
    name="wan",
    pipelines={
        "text_to_video": "WanPipeline",
        "image_to_video": "WanImageToVideoPipeline",
        "video_to_video": "WanVideoToVideoPipeline",
    },
    more_pipelines=(
        "WanVACEPipeline", "WanAnimatePipeline", "SkyReelsV2Pipeline", "SkyReelsV2DiffusionForcingPipeline",
        "SkyReelsV2ImageToVideoPipeline", "ChronoEditPipeline", "AnyFlowPipeline", "AnyFlowFARPipeline",
        "HeliosPipeline", "HeliosPyramidPipeline", "LucyEditPipeline",
    ),
    denoisers={
        "WanTransformer3DModel": RULES,
        "WanVACETransformer3DModel": RULES,
        "WanAnimateTransformer3DModel": RULES,
        "WanAnimate2Transformer3DModel": RULES_ANIMATE_2,
        "SkyReelsV2Transformer3DModel": RULES,
        "ChronoEditTransformer3DModel": RULES,
        "AnyFlowTransformer3DModel": RULES,
        "AnyFlowFARTransformer3DModel": RULES,
        "HeliosTransformer3DModel": RULES,
    },
    text_encoders=UMT5,
    steps=50,
    guidance=5.0,
    size=SizeRule(default=480, multiple=16, maximum=1280),
    no_preview=previews.VIDEO,
    text_sites=_TEXT,
    edit_sites=_TEXT,
    objective="mm.customization.objectives.wan:Wan",
    lora=transformer_names(1, "WanLoraLoaderMixin"),
)  # fmt: skip
FAMILIES = (WAN,)
