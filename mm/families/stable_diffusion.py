"""Stable Diffusion 1.x and 2.x, XL and Kolors: one UNet class, distinguished by its config."""

from __future__ import annotations

from mm.families import previews
from mm.families.family import Family, LoraNames, SizeRule
from mm.families.lora_names import unet_names
from mm.families.rules import Rules, attention, cross, feed_forward, keep, keep_text, time
from mm.families.text_encoders import CLIP, CLIP_PROJECTION

UNET: Rules = (
    *attention(r".*\.attn1"),
    *cross(r".*\.attn2"),
    *feed_forward(r".*\.ff"),
    *keep(r".*\.proj_(?:in|out)"),
    *keep_text(r"add_embedding\..*", r"encoder_hid_proj.*"),
    *time(r".*\.time_emb_proj", r"time_embedding\..*", r"class_embedding\..*"),
)
KEYS_AND_VALUES = (r".*\.attn2\.to_(?:k|v)",)

SD = Family(
    name="stable-diffusion",
    pipelines={
        "text_to_image": "StableDiffusionPipeline",
        "image_to_image": "StableDiffusionImg2ImgPipeline",
        "inpaint": "StableDiffusionInpaintPipeline",
        "control": "StableDiffusionControlNetPipeline",
        "edit": "StableDiffusionInstructPix2PixPipeline",
    },
    more_pipelines=(
        "StableDiffusionControlNetImg2ImgPipeline", "StableDiffusionControlNetInpaintPipeline",
        "StableDiffusionPAGPipeline", "StableDiffusionUpscalePipeline", "StableDiffusionDepth2ImgPipeline",
        "StableDiffusionPanoramaPipeline", "LatentConsistencyModelPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
    ),
    denoisers={"UNet2DConditionModel": UNET},
    text_encoders=CLIP,
    steps=50,
    guidance=7.5,
    size=SizeRule(default=512, multiple=8, maximum=1024),
    preview=previews.SD15,
    text_sites=KEYS_AND_VALUES,
    edit_sites=KEYS_AND_VALUES,
    objective="mm.customization.objectives.unets:StableDiffusion",
    lora=unet_names(),
)  # fmt: skip
SDXL = Family(
    name="stable-diffusion-xl",
    pipelines={
        "text_to_image": "StableDiffusionXLPipeline",
        "image_to_image": "StableDiffusionXLImg2ImgPipeline",
        "inpaint": "StableDiffusionXLInpaintPipeline",
        "control": "StableDiffusionXLControlNetPipeline",
        "edit": "StableDiffusionXLInstructPix2PixPipeline",
    },
    more_pipelines=(
        "StableDiffusionXLControlNetImg2ImgPipeline", "StableDiffusionXLControlNetInpaintPipeline",
        "StableDiffusionXLControlNetUnionPipeline", "StableDiffusionXLPAGPipeline",
        "StableDiffusionXLAdapterPipeline",
    ),
    denoisers={"UNet2DConditionModel": UNET},
    text_encoders=CLIP | CLIP_PROJECTION,
    config={"addition_embed_type": "text_time"},
    steps=50,
    guidance=5.0,
    size=SizeRule(default=1024, multiple=8, maximum=1536),
    preview=previews.SDXL,
    text_sites=(*KEYS_AND_VALUES, r"add_embedding\.linear_1"),
    edit_sites=KEYS_AND_VALUES,
    objective="mm.customization.objectives.unets:StableDiffusionXL",
    lora=unet_names(2, "StableDiffusionXLLoraLoaderMixin"),
)  # fmt: skip
KOLORS = Family(
    name="kolors",
    pipelines={"text_to_image": "KolorsPipeline", "image_to_image": "KolorsImg2ImgPipeline"},
    more_pipelines=("KolorsPAGPipeline",),
    denoisers={"UNet2DConditionModel": UNET},
    config={"addition_embed_type": "text_time", "encoder_hid_dim": 4096},
    steps=50,
    guidance=5.0,
    size=SizeRule(default=1024, multiple=8, maximum=1536),
    preview=previews.SDXL,
    text_sites=(*KEYS_AND_VALUES, r"encoder_hid_proj.*", r"add_embedding\.linear_1"),
    edit_sites=KEYS_AND_VALUES,
    lora=unet_names(0),
)
IF = Family(
    name="deepfloyd-if",
    pipelines={
        "text_to_image": "IFPipeline",
        "image_to_image": "IFImg2ImgPipeline",
        "inpaint": "IFInpaintingPipeline",
        "refine": "IFSuperResolutionPipeline",
    },
    denoisers={"UNet2DConditionModel": UNET},
    config={"addition_embed_type": "text", "encoder_hid_dim": 4096},
    steps=100,
    guidance=7.0,
    size=SizeRule(default=64, multiple=8, maximum=256),
    no_preview=previews.NO_LATENTS,
    text_sites=(r"encoder_hid_proj.*",),
    edit_sites=(r"encoder_hid_proj.*",),
    lora=LoraNames(components={"unet": "unet"}),
)
FAMILIES = (SD, SDXL, KOLORS, IF)
