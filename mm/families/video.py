"""Other video models of diffusers, of which the sites matter: LTX, Mochi, Allegro, Latte, EasyAnimate, Cosmos."""

from __future__ import annotations

from dataclasses import replace

from mm.families import previews
from mm.families.family import Family, SizeRule
from mm.families.lora_names import transformer_names, unet_names
from mm.families.rules import (
    FLUX_LIKE,
    TIME,
    Rules,
    attention,
    cross,
    feed_forward,
    joint,
    keep,
    keep_text,
    modulation,
    time,
)
from mm.families.stable_diffusion import UNET
from mm.families.text_encoders import BERT, CLIP, QWEN_VL, T5, decoders
from mm.layers.sites import Rule

RULES_LTX: Rules = (
    *attention(r"transformer_blocks\.\d+\.(?:audio_)?attn1"),
    *cross(r"transformer_blocks\.\d+\.(?:audio_)?attn2"),
    *cross(r"transformer_blocks\.\d+\.(?:audio_to_video|video_to_audio)_attn", reads="picture"),
    *feed_forward(r"transformer_blocks\.\d+\.(?:audio_)?ff", after="gelu"),
    *modulation(r"(?:audio_)?time_embed\.linear", r"av_cross_attn_\w+\.linear", r"(?:audio_)?prompt_adaln\w*\.linear"),
    *keep(r"(?:audio_)?proj_(?:in|out)", r".*\.to_gate_logits"),
    *keep_text(r"(?:audio_)?caption_projection\..*"),
    *time(r".*\.emb\..*"),
)
RULES_PIXART_VIDEO: Rules = (
    *attention(r"(?:temporal_)?transformer_blocks\.\d+\.attn1"),
    *cross(r"(?:temporal_)?transformer_blocks\.\d+\.attn2", "keep"),
    *feed_forward(r"(?:temporal_)?transformer_blocks\.\d+\.ff", after="gelu"),
    *modulation(r"adaln_single\.linear"),
    *keep("proj_out"),
    *keep_text(r"caption_projection\..*"),
    *time(r"adaln_single\.emb\..*"),
)
# Mochi's feed-forward is gated.
RULES_MOCHI: Rules = (
    *joint(r"transformer_blocks\.\d+\.attn1"),
    *feed_forward(r"transformer_blocks\.\d+\.ff"),
    *feed_forward(r"transformer_blocks\.\d+\.ff_context", "text"),
    *modulation(r"transformer_blocks\.\d+\.norm1(?:_context)?\.linear(?:_1)?"),
    *keep("proj_out", r"norm_out\.linear"),
    *keep_text(r"time_embed\.(?:pooler\..*|caption_proj)"),
    *time(r"time_embed\.timestep_embedder\..*"),
)
RULES_EASYANIMATE: Rules = (
    *joint(r"transformer_blocks\.\d+\.attn1"),
    Rule(r"(transformer_blocks\.\d+\.attn2)\.to_(q|k|v)", "attn_{2}", "text", group="{1}.qkv", parent="{1}"),
    Rule(r"(transformer_blocks\.\d+\.attn2)\.to_out\.0", "attn_out", "text", parent="{1}"),
    *feed_forward(r"transformer_blocks\.\d+\.ff", after="gelu"),
    *feed_forward(r"transformer_blocks\.\d+\.txt_ff", "text", "gelu"),
    *modulation(r"transformer_blocks\.\d+\.norm[12]\.linear"),
    *keep("proj_out", r"norm_out\.linear"),
    *keep_text(r"text_proj(?:_t5)?(?:\.1)?"),
    *TIME,
)
RULES_COSMOS: Rules = (
    *attention(r"transformer_blocks\.\d+\.attn1"),
    *cross(r"transformer_blocks\.\d+\.attn2"),
    *feed_forward(r"transformer_blocks\.\d+\.ff", after="gelu"),
    *modulation(r"transformer_blocks\.\d+\.norm[123]\.linear_[12]"),
    *keep(r"patch_embed\..*", "proj_out", r"norm_out\..*"),
    *keep_text(r"crossattn_proj\..*"),
    *TIME,
)
RULES_MOTIF: Rules = (
    *cross(r"(?:single_)?transformer_blocks\.\d+\.\w*cross_attn\w*"),
    *keep(r"x_embedder\..*", r"image_embedder\..*"),
    *keep_text(r"context_embedder\..*"),
    *FLUX_LIKE,
)
RULES_UNET: Rules = (
    *keep(r"(?:transformer_in|image_latents_temporal_encoder)\..*", r".*\.motion_modules\.\d+\.proj_(?:in|out)"),
    *attention(r".*\.(?:temp_attentions|motion_modules)\..*\.attn[12]"),
    *feed_forward(r".*\.ff_in"),
    *time(r".*\.time_pos_embed\..*", r"(?:fps|context)_embedding\..*", r"add_embedding\..*"),
    *UNET,
)
_KEYS_AND_VALUES = (r".*\.attn2\.to_(?:k|v)",)

LTX = Family(
    name="ltx",
    pipelines={"text_to_video": "LTXPipeline", "image_to_video": "LTXImageToVideoPipeline"},
    more_pipelines=("LTXConditionPipeline", "LTX2Pipeline", "LTX2ImageToVideoPipeline", "LTX2ConditionPipeline"),
    denoisers={
        "LTXVideoTransformer3DModel": RULES_LTX,
        "LTX2VideoTransformer3DModel": RULES_LTX,
        "SanaWMLTX2RefinerTransformer3DModel": RULES_LTX,
    },
    text_encoders=T5,
    steps=50,
    guidance=3.0,
    size=SizeRule(default=512, multiple=32, maximum=1280),
    no_preview=previews.VIDEO,
    text_sites=(r"caption_projection\.linear_1", *_KEYS_AND_VALUES),
    edit_sites=(r"caption_projection\.linear_1", *_KEYS_AND_VALUES),
    lora=transformer_names(1, "LTXVideoLoraLoaderMixin"),
)
MOCHI = replace(
    LTX,
    name="mochi",
    pipelines={"text_to_video": "MochiPipeline"},
    more_pipelines=(),
    denoisers={"MochiTransformer3DModel": RULES_MOCHI},
    steps=64,
    guidance=4.5,
    size=SizeRule(default=480, multiple=16, maximum=848),
    text_sites=(r"time_embed\.caption_proj", r".*\.attn1\.add_(?:k|v)_proj"),
    edit_sites=(r"time_embed\.caption_proj", r".*\.attn1\.add_(?:k|v)_proj"),
    lora=transformer_names(1, "Mochi1LoraLoaderMixin"),
)
ALLEGRO = replace(
    LTX,
    name="allegro",
    pipelines={"text_to_video": "AllegroPipeline"},
    more_pipelines=(),
    denoisers={"AllegroTransformer3DModel": RULES_PIXART_VIDEO},
    steps=100,
    guidance=7.5,
    size=SizeRule(default=720, multiple=16, maximum=1280),
    lora=transformer_names(1),
)
LATTE = replace(
    ALLEGRO,
    name="latte",
    pipelines={"text_to_video": "LattePipeline"},
    denoisers={"LatteTransformer3DModel": RULES_PIXART_VIDEO},
    steps=50,
    size=SizeRule(default=512, multiple=8, maximum=512),
)
EASYANIMATE = replace(
    LTX,
    name="easyanimate",
    pipelines={"text_to_video": "EasyAnimatePipeline"},
    more_pipelines=("EasyAnimateInpaintPipeline", "EasyAnimateControlPipeline"),
    denoisers={"EasyAnimateTransformer3DModel": RULES_EASYANIMATE},
    text_encoders=BERT | T5 | QWEN_VL,
    guidance=5.0,
    size=SizeRule(default=512, multiple=16, maximum=1344),
    text_sites=(r"text_proj(?:_t5)?(?:\.1)?",),
    edit_sites=(r"text_proj(?:_t5)?(?:\.1)?",),
    lora=transformer_names(1),
)
COSMOS = replace(
    LTX,
    name="cosmos",
    pipelines={
        "text_to_image": "Cosmos2TextToImagePipeline",
        "text_to_video": "CosmosTextToWorldPipeline",
        "video_to_video": "CosmosVideoToWorldPipeline",
    },
    more_pipelines=("Cosmos2VideoToWorldPipeline", "Cosmos2_5_PredictBasePipeline", "Cosmos2_5_TransferPipeline"),
    denoisers={"CosmosTransformer3DModel": RULES_COSMOS},
    steps=35,
    guidance=7.0,
    size=SizeRule(default=768, multiple=16, maximum=1360),
    text_sites=_KEYS_AND_VALUES,
    edit_sites=_KEYS_AND_VALUES,
    lora=transformer_names(1, "CosmosLoraLoaderMixin"),
)
MOTIF = replace(
    LTX,
    name="motif-video",
    pipelines={"text_to_video": "MotifVideoPipeline", "image_to_video": "MotifVideoImage2VideoPipeline"},
    more_pipelines=(),
    denoisers={"MotifVideoTransformer3DModel": RULES_MOTIF},
    text_encoders=decoders("T5GemmaEncoder"),
    size=SizeRule(default=736, multiple=16, maximum=1280),
    text_sites=(r"context_embedder\.linear_1", r".*\.attn\.add_(?:k|v)_proj"),
    edit_sites=(r"context_embedder\.linear_1", r".*\.attn\.add_(?:k|v)_proj"),
    lora=transformer_names(0),
)
UNETS = replace(
    LTX,
    name="video-unet",
    pipelines={"text_to_video": "AnimateDiffPipeline", "image_to_video": "StableVideoDiffusionPipeline"},
    more_pipelines=(
        "AnimateDiffSDXLPipeline", "AnimateDiffControlNetPipeline", "AnimateDiffVideoToVideoPipeline",
        "AnimateDiffSparseControlNetPipeline", "TextToVideoSDPipeline", "VideoToVideoSDPipeline", "I2VGenXLPipeline",
    ),
    denoisers={
        "UNetMotionModel": RULES_UNET,
        "UNetSpatioTemporalConditionModel": RULES_UNET,
        "UNet3DConditionModel": RULES_UNET,
        "I2VGenXLUNet": RULES_UNET,
    },
    text_encoders=CLIP,
    guidance=7.5,
    size=SizeRule(default=512, multiple=8, maximum=1024),
    text_sites=(r".*\.attentions\..*\.attn2\.to_(?:k|v)",),
    edit_sites=(r".*\.attentions\..*\.attn2\.to_(?:k|v)",),
    lora=unet_names(1),
)  # fmt: skip
FAMILIES = (LTX, MOCHI, ALLEGRO, LATTE, EASYANIMATE, COSMOS, MOTIF, UNETS)
