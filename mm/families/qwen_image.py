"""Qwen-Image, its editing and layered models, and Qwen-Image 2.1."""

from __future__ import annotations

from dataclasses import replace

from mm.families import previews
from mm.families.family import Family, SizeRule
from mm.families.lora_names import transformer_names
from mm.families.rules import TIME, Rules, attention, feed_forward, gated, joint, keep, keep_text, modulation
from mm.families.text_encoders import QWEN3_VL, QWEN_VL

RULES: Rules = (
    *joint(r".*\.attn"),
    *feed_forward(r".*\.img_mlp", after="gelu"),
    *feed_forward(r".*\.txt_mlp", "text", "gelu"),
    *modulation(r".*\.(?:img|txt)_mod\.1"),
    *keep("img_in", "proj_out", r"norm_out\.linear"),
    *keep_text("txt_in"),
    *TIME,
)
RULES_21: Rules = (
    *attention(r"transformer_blocks\.\d+\.attn", "both"),
    *gated(r"transformer_blocks\.\d+\.img_mlp", "proj|gate_layer", "out", "both"),
    *modulation(r"modulation\.1"),
    *keep("img_in", "proj_out", r"norm_out\.linear"),
    *keep_text(r"txt_in\..*"),
    *TIME,
)
_TEXT = ("txt_in", r".*\.attn\.add_(?:k|v)_proj")

QWEN = Family(
    name="qwen-image",
    pipelines={
        "text_to_image": "QwenImagePipeline",
        "image_to_image": "QwenImageImg2ImgPipeline",
        "inpaint": "QwenImageInpaintPipeline",
        "control": "QwenImageControlNetPipeline",
    },
    more_pipelines=("QwenImageControlNetInpaintPipeline",),
    denoisers={"QwenImageTransformer2DModel": RULES},
    text_encoders=QWEN_VL,
    steps=50,
    guidance=4.0,
    guidance_name="true_cfg_scale",
    negative_prompt=" ",
    size=SizeRule(default=1328, multiple=16, maximum=2048),
    no_preview=previews.NONE_KNOWN,
    text_sites=_TEXT,
    edit_sites=_TEXT,
    objective="mm.customization.objectives.transformers:QwenImage",
    lora=transformer_names(0, "QwenImageLoraLoaderMixin"),
)
EDIT = replace(
    QWEN,
    objective="mm.customization.objectives.transformers:QwenImageEdit",
    name="qwen-image-edit",
    pipelines={"edit": "QwenImageEditPipeline", "inpaint": "QwenImageEditInpaintPipeline"},
    more_pipelines=("QwenImageEditPlusPipeline",),
    size=SizeRule(default=1024, multiple=16, maximum=2048),
)
LAYERED = replace(
    QWEN,
    objective=None,
    name="qwen-image-layered",
    pipelines={"layers": "QwenImageLayeredPipeline"},
    more_pipelines=(),
    size=SizeRule(default=640, multiple=16, maximum=1024),
)
QWEN_21 = replace(
    QWEN,
    objective=None,
    name="qwen-image-2.1",
    pipelines={"text_to_image": "QwenImage21Pipeline"},
    more_pipelines=(),
    denoisers={"QwenImage21Transformer2DModel": RULES_21},
    text_encoders=QWEN3_VL,
    steps=40,
    guidance=1.0,
    text_sites=(r"txt_in\.in_layer",),
    edit_sites=(r"txt_in\.in_layer",),
)
FAMILIES = (EDIT, LAYERED, QWEN, QWEN_21)
