"""Older image models of diffusers: DiT, aMUSEd, Stable Cascade, DreamLite."""

from __future__ import annotations

from mm.families import previews
from mm.families.family import Family, SizeRule
from mm.families.lora_names import transformer_names, unet_names
from mm.families.rules import Rules, attention, cross, feed_forward, keep, keep_text, modulation, plain, time
from mm.families.stable_diffusion import UNET
from mm.families.text_encoders import CLIP_PROJECTION, QWEN3_VL

RULES_DIT: Rules = (
    *attention(r"transformer_blocks\.\d+\.attn1"),
    *feed_forward(r"transformer_blocks\.\d+\.ff", after="gelu"),
    *modulation(r"transformer_blocks\.\d+\.norm1\.linear"),
    *keep(r"proj_out_[12]"),
    *time(r"transformer_blocks\.\d+\.norm1\.emb\..*"),
)
RULES_AMUSED: Rules = (
    *attention(r"(?:down_block|up_block)\.attention_blocks\.\d+\.attn1"),
    *cross(r"(?:down_block|up_block)\.attention_blocks\.\d+\.attn2"),
    *attention(r"transformer_layers\.\d+\.attn1"),
    *cross(r"transformer_layers\.\d+\.attn2"),
    *feed_forward(r"transformer_layers\.\d+\.ff"),
    *plain(r".*\.res_blocks\.\d+", "channelwise_linear_1", "channelwise_linear_2"),
    *modulation(r"transformer_layers\.\d+\.norm[123]\.linear", r".*\.cond_embeds_mapper"),
    *keep("project_to_hidden", "project_from_hidden"),
    *keep_text("encoder_proj", r".*\.kv_mapper", r"cond_embed\..*"),
)
# Keys and values of Stable Cascade read the picture and the text together.
RULES_CASCADE: Rules = (
    *cross(r"(?:down|up)_blocks\.\d+\.\d+\.attention", reads="both"),
    *plain(r"(?:down|up)_blocks\.\d+\.\d+\.channelwise", "0", "4"),
    *modulation(r"(?:down|up)_blocks\.\d+\.\d+\.mapper(?:_\w+)?"),
    *keep(r"clip_img_mapper", r"up_repeat_mappers\..*", r"down_repeat_mappers\..*"),
    *keep_text(r"clip_txt\w*_mapper", r"(?:down|up)_blocks\.\d+\.\d+\.kv_mapper\.\d+"),
)
_KEYS_AND_VALUES = (r".*\.attn2\.to_(?:k|v)",)

DIT = Family(
    name="dit",
    pipelines={"text_to_image": "DiTPipeline"},
    denoisers={"DiTTransformer2DModel": RULES_DIT},
    steps=50,
    guidance=4.0,
    size=SizeRule(default=256, multiple=256, maximum=512),
    preview=previews.SD15,
    lora=transformer_names(0),
)
AMUSED = Family(
    name="amused",
    pipelines={
        "text_to_image": "AmusedPipeline",
        "image_to_image": "AmusedImg2ImgPipeline",
        "inpaint": "AmusedInpaintPipeline",
    },
    denoisers={"UVit2DModel": RULES_AMUSED},
    text_encoders=CLIP_PROJECTION,
    steps=12,
    guidance=10.0,
    size=SizeRule(default=512, multiple=16, maximum=512),
    no_preview=previews.NO_LATENTS,
    text_sites=("encoder_proj", *_KEYS_AND_VALUES),
    edit_sites=("encoder_proj", *_KEYS_AND_VALUES),
    lora=transformer_names(1, "AmusedLoraLoaderMixin"),
)
CASCADE = Family(
    name="stable-cascade",
    pipelines={"text_to_image": "StableCascadeCombinedPipeline", "prior": "StableCascadePriorPipeline"},
    more_pipelines=("StableCascadeDecoderPipeline",),
    denoisers={"StableCascadeUNet": RULES_CASCADE},
    text_encoders=CLIP_PROJECTION,
    steps=20,
    guidance=4.0,
    size=SizeRule(default=1024, multiple=128, maximum=1536),
    no_preview=previews.NONE_KNOWN,
    text_sites=(r"clip_txt\w*_mapper", r".*\.kv_mapper\.\d+"),
    edit_sites=(r"clip_txt_mapper", r".*\.kv_mapper\.\d+"),
    lora=unet_names(1),
)
DREAMLITE = Family(
    name="dreamlite",
    pipelines={"text_to_image": "DreamLitePipeline"},
    more_pipelines=("DreamLiteMobilePipeline",),
    denoisers={"DreamLiteUNetModel": UNET},
    text_encoders=QWEN3_VL,
    steps=30,
    guidance=3.5,
    size=SizeRule(default=1024, multiple=16, maximum=1024),
    no_preview=previews.NONE_KNOWN,
    text_sites=_KEYS_AND_VALUES,
    edit_sites=_KEYS_AND_VALUES,
    lora=unet_names(0),
)
FAMILIES = (DIT, AMUSED, CASCADE, DREAMLITE)
