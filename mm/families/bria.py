"""Bria 3.2, FIBO and FIBO 2, and others with FLUX's blocks: LongCat-Image, Ovis-Image."""

from __future__ import annotations

from dataclasses import replace

from mm.families import previews
from mm.families.family import Family, SizeRule
from mm.families.lora_names import transformer_names
from mm.families.rules import FLUX_LIKE, Rules, attention, cross, gated, keep, keep_text, time
from mm.families.stable_diffusion_3 import TEXT
from mm.families.text_encoders import QWEN3, QWEN3_VL, QWEN_VL, T5, decoders
from mm.families.z_image import RULES as Z_IMAGE

RULES: Rules = (*keep_text(r"caption_projection\..*"), *time(r"timestep_embedder\..*"), *FLUX_LIKE)
# The feed-forward of Ovis-Image and its single blocks is gated: its outputs have no lower bound.
RULES_OVIS: Rules = tuple(replace(rule, after=None) for rule in RULES)
RULES_FIBO_2: Rules = (
    *cross(r"(?:layers|perceiver\.layers)\.\d+\.cross_attention"),
    *attention(r"perceiver\.layers\.\d+\.self_attention", "text"),
    *gated(r"perceiver\.layers\.\d+\.ffn", "w1|w3", "w2", "text"),
    *keep(r"x_embedder", r"final_layer\..*"),
    *keep_text(r"perceiver\.\w+", r"cap_embedder\..*"),
    *Z_IMAGE,
)

BRIA = Family(
    name="bria",
    pipelines={"text_to_image": "BriaPipeline"},
    denoisers={"BriaTransformer2DModel": RULES},
    text_encoders=T5,
    steps=30,
    guidance=5.0,
    size=SizeRule(default=1024, multiple=16, maximum=1536),
    preview=previews.SDXL,
    text_sites=TEXT,
    edit_sites=TEXT,
    objective="mm.customization.objectives.bria:Bria",
    lora=transformer_names(1),
)
FIBO = replace(
    BRIA,
    objective=None,
    name="bria-fibo",
    pipelines={"text_to_image": "BriaFiboPipeline", "edit": "BriaFiboEditPipeline"},
    denoisers={"BriaFiboTransformer2DModel": RULES},
    text_encoders=decoders("SmolLM3ForCausalLM", "SmolLM3Model"),
    text_sites=(*TEXT, r"caption_projection\.\d+\.linear"),
    no_preview=previews.NONE_KNOWN,
    preview=None,
)
FIBO_2 = replace(
    FIBO,
    name="bria-fibo-2",
    pipelines={"text_to_image": "BriaFibo2Pipeline"},
    denoisers={"BriaFibo2Transformer2DModel": RULES_FIBO_2},
    text_encoders=QWEN3_VL,
    text_sites=(r"layers\.\d+\.cross_attention\.to_(?:k|v)",),
    edit_sites=(r"layers\.\d+\.cross_attention\.to_(?:k|v)",),
    lora=transformer_names(0, "BriaFibo2LoraLoaderMixin"),
)
LONGCAT = replace(
    BRIA,
    objective=None,
    name="longcat-image",
    pipelines={"text_to_image": "LongCatImagePipeline", "edit": "LongCatImageEditPipeline"},
    denoisers={"LongCatImageTransformer2DModel": RULES},
    text_encoders=QWEN_VL,
    steps=50,
    guidance=4.5,
    preview=previews.FLUX,
)
OVIS = replace(
    BRIA,
    objective=None,
    name="ovis-image",
    pipelines={"text_to_image": "OvisImagePipeline"},
    denoisers={"OvisImageTransformer2DModel": RULES_OVIS},
    text_encoders=QWEN3,
    steps=50,
    preview=previews.FLUX,
)
FAMILIES = (BRIA, FIBO, FIBO_2, LONGCAT, OVIS)
