"""HunyuanImage 2.1 and HunyuanVideo: FLUX's blocks after a refiner of the text."""

from __future__ import annotations

from dataclasses import replace

from mm.families import previews
from mm.families.family import Family, SizeRule
from mm.families.lora_names import transformer_names
from mm.families.rules import FLUX_LIKE, Rules, attention, feed_forward, keep, keep_text, modulation, time
from mm.families.text_encoders import CLIP, LLAMA, QWEN_VL, T5

RULES: Rules = (
    *time(r"context_embedder\.time_text_embed\.timestep_embedder\..*"),
    *keep_text(r"context_embedder\.time_text_embed\..*", r"context_embedder\.proj_in", r"context_embedder_2\..*"),
    *attention(r"context_embedder\.token_refiner\.refiner_blocks\.\d+\.attn", "text"),
    *feed_forward(r"context_embedder\.token_refiner\.refiner_blocks\.\d+\.ff", "text"),
    *modulation(r"context_embedder\.token_refiner\.refiner_blocks\.\d+\.norm_out\.linear"),
    *keep(r"x_embedder\..*", r"image_embedder\..*", r"image_projection\..*", r"clean_x_embedder\..*"),
    *FLUX_LIKE,
)
_PROMPT = (r"context_embedder\.proj_in", r".*\.attn\.add_(?:k|v)_proj")
_TEXT = (*_PROMPT, r"context_embedder_2\.linear_1")  # which reads what is to be written, and zeros where nothing is

HUNYUAN_IMAGE = Family(
    name="hunyuan-image",
    pipelines={"text_to_image": "HunyuanImagePipeline", "refine": "HunyuanImageRefinerPipeline"},
    denoisers={"HunyuanImageTransformer2DModel": RULES},
    text_encoders=QWEN_VL | T5,
    steps=50,
    guidance=3.5,
    guidance_name="distilled_guidance_scale",
    size=SizeRule(default=2048, multiple=32, maximum=2560),
    no_preview=previews.NONE_KNOWN,
    text_sites=_TEXT,
    edit_sites=_PROMPT,
    objective="mm.customization.objectives.hunyuan_image:HunyuanImage",
    lora=transformer_names(0),
)
HUNYUAN_VIDEO = replace(
    HUNYUAN_IMAGE,
    name="hunyuan-video",
    pipelines={"text_to_video": "HunyuanVideoPipeline", "image_to_video": "HunyuanVideoImageToVideoPipeline"},
    more_pipelines=(
        "HunyuanVideoFramepackPipeline", "HunyuanSkyreelsImageToVideoPipeline", "HunyuanVideo15Pipeline",
        "HunyuanVideo15ImageToVideoPipeline",
    ),
    denoisers={
        "HunyuanVideoTransformer3DModel": RULES,
        "HunyuanVideoFramepackTransformer3DModel": RULES,
        "HunyuanVideo15Transformer3DModel": RULES,
    },
    text_encoders=LLAMA | CLIP | QWEN_VL | T5,
    guidance=6.0,
    guidance_name="guidance_scale",
    size=SizeRule(default=720, multiple=16, maximum=1280),
    no_preview=previews.VIDEO,
    objective=None,
    lora=transformer_names(0, "HunyuanVideoLoraLoaderMixin"),
)  # fmt: skip
FAMILIES = (HUNYUAN_IMAGE, HUNYUAN_VIDEO)
