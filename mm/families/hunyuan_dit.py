"""HunyuanDiT."""

from __future__ import annotations

from mm.families import previews
from mm.families.family import Family, SizeRule
from mm.families.lora_names import transformer_names
from mm.families.rules import Rules, attention, cross, feed_forward, keep, keep_text, modulation, time
from mm.families.text_encoders import BERT, T5
from mm.layers.sites import Rule

RULES: Rules = (
    *attention(r"blocks\.\d+\.attn1"),
    *cross(r"blocks\.\d+\.attn2"),
    *feed_forward(r"blocks\.\d+\.ff", after="gelu"),
    Rule(r"blocks\.\d+\.skip_linear", "skip"),
    *modulation(r"blocks\.\d+\.norm1\.linear"),
    *keep("proj_out", r"norm_out\.linear"),
    *keep_text(r"text_embedder\..*"),
    *time(r"time_extra_emb\..*"),
)
_TEXT = (r"text_embedder\.linear_1", r"blocks\.\d+\.attn2\.to_(?:k|v)")

HUNYUAN_DIT = Family(
    name="hunyuan-dit",
    pipelines={"text_to_image": "HunyuanDiTPipeline", "control": "HunyuanDiTControlNetPipeline"},
    more_pipelines=("HunyuanDiTPAGPipeline",),
    denoisers={"HunyuanDiT2DModel": RULES},
    text_encoders=BERT | T5,
    steps=50,
    guidance=5.0,
    size=SizeRule(default=1024, multiple=16, maximum=1280),
    preview=previews.SDXL,
    text_sites=_TEXT,
    edit_sites=_TEXT,
    objective="mm.customization.objectives.hunyuan_dit:HunyuanDiT",
    lora=transformer_names(2),
)
FAMILIES = (HUNYUAN_DIT,)
