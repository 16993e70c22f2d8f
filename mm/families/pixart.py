"""PixArt-alpha and PixArt-Sigma."""

from __future__ import annotations

from dataclasses import replace

from mm.families import previews
from mm.families.family import Family, SizeRule
from mm.families.lora_names import transformer_names
from mm.families.rules import Rules, attention, cross, feed_forward, keep, keep_text, modulation, time
from mm.families.text_encoders import T5

RULES: Rules = (
    *attention(r".*\.attn1"),
    *cross(r".*\.attn2", "keep"),
    *feed_forward(r".*\.ff", after="gelu"),
    *modulation(r"adaln_single\.linear"),
    *keep("proj_out"),
    *keep_text(r"caption_projection\..*"),
    *time(r"adaln_single\.emb\..*"),
)
_KEYS_AND_VALUES = r".*\.attn2\.to_(?:k|v)"

SIGMA = Family(
    name="pixart-sigma",
    pipelines={"text_to_image": "PixArtSigmaPipeline"},
    more_pipelines=("PixArtSigmaPAGPipeline",),
    denoisers={"PixArtTransformer2DModel": RULES},
    text_encoders=T5,
    config={"use_additional_conditions": False},
    steps=20,
    guidance=4.5,
    size=SizeRule(default=1024, multiple=8, maximum=2048),
    preview=previews.SDXL,
    text_sites=(r"caption_projection\.linear_1", _KEYS_AND_VALUES),
    edit_sites=(r"caption_projection\.linear_1", _KEYS_AND_VALUES),
    objective="mm.customization.objectives.pixart:PixArt",
    lora=transformer_names(1),
)
ALPHA = replace(
    SIGMA,
    name="pixart-alpha",
    pipelines={"text_to_image": "PixArtAlphaPipeline"},
    more_pipelines=(),
    config={"use_additional_conditions": True},
    preview=previews.SD15,
)
FAMILIES = (ALPHA, SIGMA)
