"""Chroma: FLUX without modulation layers; one small network, `distilled_guidance_layer`, makes all modulation."""

from __future__ import annotations

from mm.families import previews
from mm.families.family import Family, SizeRule
from mm.families.lora_names import transformer_names
from mm.families.rules import FLUX_LIKE, Rules, time
from mm.families.stable_diffusion_3 import TEXT
from mm.families.text_encoders import T5

RULES: Rules = (*time(r"distilled_guidance_layer\..*"), *FLUX_LIKE)

CHROMA = Family(
    name="chroma",
    pipelines={
        "text_to_image": "ChromaPipeline",
        "image_to_image": "ChromaImg2ImgPipeline",
        "inpaint": "ChromaInpaintPipeline",
    },
    denoisers={"ChromaTransformer2DModel": RULES},
    text_encoders=T5,
    steps=35,
    guidance=5.0,
    size=SizeRule(default=1024, multiple=16, maximum=2048),
    preview=previews.FLUX,
    text_sites=TEXT,
    edit_sites=TEXT,
    objective="mm.customization.objectives.chroma:Chroma",
    lora=transformer_names(1, "FluxLoraLoaderMixin"),
)
FAMILIES = (CHROMA,)
