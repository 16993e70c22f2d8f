"""Public unified models in transformers' layout, Janus and Emu3: drawn and read with by `mm.pipelines.unified`.

The language model carries words and pictures. What sees and what turns codes into pictures is small beside it,
and stays. Attention cannot be called again for scoring: its cache has grown meanwhile.
"""

from __future__ import annotations

from dataclasses import replace

from mm.families import previews
from mm.families.family import Family, LoraNames, SizeRule
from mm.families.rules import LANGUAGE, Rules, keep

_PIPELINES = {
    "text_to_image": "mm.pipelines.unified:UnifiedTextToImagePipeline",
    "understanding": "mm.pipelines.unified:UnifiedUnderstandingPipeline",
}
RULES: Rules = (
    *keep(r"model\.(?:vision_model|aligner|generation_aligner|generation_head|vqmodel)\..*"),
    *keep("lm_head", reads="both"),
    *(replace(r, reads="both", parent="" if r.role.startswith("attn") else r.parent) for r in LANGUAGE),
)
_KEYS_AND_VALUES = (r"model\.(?:language_model|text_model)\.layers\.\d+\.self_attn\.(?:k|v)_proj",)

JANUS = Family(
    name="janus",
    pipelines=_PIPELINES,
    denoisers={"JanusForConditionalGeneration": RULES},
    model_types=("janus",),
    steps=576,
    guidance=5.0,
    size=SizeRule(default=384, multiple=384, maximum=384),
    modes=("codes",),
    no_preview=previews.NO_LATENTS,
    text_sites=_KEYS_AND_VALUES,
    edit_sites=_KEYS_AND_VALUES,
    lora=LoraNames(components={"model": "model", "base_model": "model"}),
)
EMU3 = replace(
    JANUS,
    name="emu3",
    denoisers={"Emu3ForConditionalGeneration": RULES},
    model_types=("emu3",),
    steps=8190,
    guidance=3.0,
    top_k=2048,
    negative_prompt=(
        "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst "
        "quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
    ),
    size=SizeRule(default=720, multiple=8, maximum=1024),
)
FAMILIES = (JANUS, EMU3)
