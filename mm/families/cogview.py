"""CogView3-Plus, CogView4 and GLM-Image: one attention over text and picture; CogVideoX and ConsisID have it too."""

from __future__ import annotations

from dataclasses import replace

from mm.families import previews
from mm.families.family import Family, SizeRule
from mm.families.lora_names import transformer_names
from mm.families.rules import Rules, attention, feed_forward, keep, keep_text, modulation, time
from mm.families.text_encoders import GLM, T5

RULES: Rules = (
    *attention(r"transformer_blocks\.\d+\.attn1", "both"),
    *feed_forward(r"transformer_blocks\.\d+\.ff", "both", "gelu"),
    *modulation(r"transformer_blocks\.\d+\.norm[12]\.linear"),
    *keep(r"patch_embed\.proj", "proj_out", r"norm_out\.linear", r"image_projector\..*", r"prior_projector\..*"),
    *keep_text(r"patch_embed\.text_proj", r"glyph_projector\..*"),
    *time(r"time_condition_embed\..*", r"(?:time|ofs)_embedding\..*"),
)
_TEXT = (r"patch_embed\.text_proj",)

COGVIEW_4 = Family(
    name="cogview-4",
    pipelines={"text_to_image": "CogView4Pipeline", "control": "CogView4ControlPipeline"},
    denoisers={"CogView4Transformer2DModel": RULES},
    text_encoders=GLM,
    steps=50,
    guidance=5.0,
    size=SizeRule(default=1024, multiple=32, maximum=2048),
    no_preview=previews.NONE_KNOWN,
    text_sites=_TEXT,
    edit_sites=_TEXT,
    objective="mm.customization.objectives.cogview:CogView4",
    mixed=False,
    lora=transformer_names(0, "CogView4LoraLoaderMixin"),
)
COGVIEW_3 = replace(
    COGVIEW_4,
    name="cogview-3-plus",
    pipelines={"text_to_image": "CogView3PlusPipeline"},
    denoisers={"CogView3PlusTransformer2DModel": RULES},
    text_encoders=T5,
    objective=None,
    mixed=True,
    lora=transformer_names(1),
)
GLM_IMAGE = replace(
    COGVIEW_4,
    name="glm-image",
    pipelines={"text_to_image": "GlmImagePipeline"},
    denoisers={"GlmImageTransformer2DModel": RULES},
    text_encoders=T5,
    guidance=1.5,
    text_sites=(r"glyph_projector\.net\.0\.proj",),
    edit_sites=(r"glyph_projector\.net\.0\.proj",),
    objective=None,
    lora=transformer_names(1),
)
COGVIDEO = replace(
    COGVIEW_4,
    name="cogvideox",
    pipelines={
        "text_to_video": "CogVideoXPipeline",
        "image_to_video": "CogVideoXImageToVideoPipeline",
        "video_to_video": "CogVideoXVideoToVideoPipeline",
    },
    more_pipelines=("CogVideoXFunControlPipeline", "ConsisIDPipeline"),
    denoisers={"CogVideoXTransformer3DModel": RULES, "ConsisIDTransformer3DModel": RULES},
    text_encoders=T5,
    guidance=6.0,
    size=SizeRule(default=480, multiple=16, maximum=1360),
    no_preview=previews.VIDEO,
    objective=None,
    mixed=True,
    lora=transformer_names(1, "CogVideoXLoraLoaderMixin"),
)
FAMILIES = (COGVIEW_4, COGVIEW_3, GLM_IMAGE, COGVIDEO)
