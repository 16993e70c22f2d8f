"""FLUX.1: dev, schnell, Kontext, Fill and Control, one transformer class."""

from __future__ import annotations

from dataclasses import replace

from mm.families import previews
from mm.families.family import Family, LoraNames, SizeRule
from mm.families.lora_names import transformer_names
from mm.families.rules import FLUX_LIKE
from mm.families.stable_diffusion_3 import TEXT
from mm.families.text_encoders import CLIP, T5

_LORA = transformer_names(2, "FluxLoraLoaderMixin")

FLUX = Family(
    name="flux",
    pipelines={
        "text_to_image": "FluxPipeline",
        "image_to_image": "FluxImg2ImgPipeline",
        "inpaint": "FluxInpaintPipeline",
        "control": "FluxControlNetPipeline",
    },
    more_pipelines=("FluxControlNetImg2ImgPipeline", "FluxControlNetInpaintPipeline"),
    denoisers={"FluxTransformer2DModel": FLUX_LIKE},
    text_encoders=CLIP | T5,
    steps=28,
    guidance=3.5,
    size=SizeRule(default=1024, multiple=16, maximum=2048),
    preview=previews.FLUX,
    text_sites=(*TEXT, r"time_text_embed\.text_embedder\.linear_1"),
    edit_sites=TEXT,
    objective="mm.customization.objectives.transformers:Flux",
    # sd-scripts calls the T5 encoder lora_te3, other trainers lora_te2
    lora=LoraNames(
        components=_LORA.components, kohya={**_LORA.kohya, "lora_te3_": "text_encoder_2"}, converter=_LORA.converter
    ),
)
SCHNELL = replace(FLUX, name="flux-schnell", config={"guidance_embeds": False}, steps=4, guidance=None)
KONTEXT = replace(
    FLUX,
    objective="mm.customization.objectives.transformers:Kontext",
    name="flux-kontext",
    pipelines={
        "text_to_image": "FluxKontextPipeline",
        "edit": "FluxKontextPipeline",
        "inpaint": "FluxKontextInpaintPipeline",
    },
    more_pipelines=(),
    guidance=2.5,
)
FILL = replace(
    FLUX,
    objective="mm.customization.objectives.flux_fill:FluxFill",
    name="flux-fill",
    pipelines={"inpaint": "FluxFillPipeline"},
    more_pipelines=(),
    config={"in_channels": 384},
    steps=50,
    guidance=30.0,
)
CONTROL = replace(
    FLUX,
    objective=None,
    name="flux-control",
    pipelines={
        "control": "FluxControlPipeline",
        "image_to_image": "FluxControlImg2ImgPipeline",
        "inpaint": "FluxControlInpaintPipeline",
    },
    more_pipelines=(),
    config={"in_channels": 128},
)
FAMILIES = (KONTEXT, SCHNELL, FILL, CONTROL, FLUX)
