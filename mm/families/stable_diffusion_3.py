"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from mm.families import previews
from mm.families.family import Family, SizeRule
from mm.families.lora_names import transformer_names
from mm.families.rules import MMDIT
from mm.families.text_encoders import CLIP_PROJECTION, T5

TEXT = ("context_embedder", r".*\.attn\.add_(?:k|v)_proj")

SD3 = Family(
    name="stable-diffusion-3",
    pipelines={
        "text_to_image": "StableDiffusion3Pipeline",
        "image_to_image": "StableDiffusion3Img2ImgPipeline",
        "inpaint": "StableDiffusion3InpaintPipeline",
        "control": "StableDiffusion3ControlNetPipeline",
    },
    more_pipelines=("StableDiffusion3ControlNetInpaintingPipeline", "StableDiffusion3PAGPipeline"),
    denoisers={"SD3Transformer2DModel": MMDIT},
    text_encoders=CLIP_PROJECTION | T5,
    steps=28,
    guidance=7.0,
    size=SizeRule(default=1024, multiple=16, maximum=1536),
    preview=previews.SD3,
    text_sites=(*TEXT, r"time_text_embed\.text_embedder\.linear_1"),
    edit_sites=TEXT,
    objective="mm.customization.objectives.transformers:StableDiffusion3",
    lora=transformer_names(3, "SD3LoraLoaderMixin"),
)
FAMILIES = (SD3,)
