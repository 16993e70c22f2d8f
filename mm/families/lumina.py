"""Lumina-Next and Lumina-Image 2.0."""

from __future__ import annotations

from dataclasses import replace

from mm.families import previews
from mm.families.family import Family, SizeRule
from mm.families.lora_names import transformer_names
from mm.families.rules import Rules, attention, cross, gated, keep, keep_text, modulation, time
from mm.families.text_encoders import GEMMA

RULES_2: Rules = (
    *attention(r"layers\.\d+\.attn", "both"),
    *attention(r"noise_refiner\.\d+\.attn"),
    *attention(r"context_refiner\.\d+\.attn", "text"),
    *gated(r"layers\.\d+\.feed_forward", "linear_1|linear_3", "linear_2", "both"),
    *gated(r"noise_refiner\.\d+\.feed_forward", "linear_1|linear_3", "linear_2"),
    *gated(r"context_refiner\.\d+\.feed_forward", "linear_1|linear_3", "linear_2", "text"),
    *modulation(r"(?:layers|noise_refiner)\.\d+\.norm1\.linear"),
    *keep("x_embedder", r"norm_out\..*"),
    *keep_text(r"time_caption_embed\.caption_embedder\..*"),
    *time(r"time_caption_embed\.timestep_embedder\..*"),
)
RULES_NEXT: Rules = (
    *attention(r"layers\.\d+\.attn1"),
    *cross(r"layers\.\d+\.attn2"),
    *gated(r"layers\.\d+\.feed_forward", "linear_1|linear_3", "linear_2"),
    *modulation(r"layers\.\d+\.norm1\.linear"),
    *keep(r"patch_embedder\..*", r"norm_out\..*"),
    *keep_text(r"time_caption_embed\.caption_embedder\..*"),
    *time(r"time_caption_embed\.timestep_embedder\..*"),
)
_TEXT = (r"time_caption_embed\.caption_embedder\.1", r"context_refiner\.\d+\.attn\.to_(?:k|v)")

LUMINA_2 = Family(
    name="lumina-2",
    pipelines={"text_to_image": "Lumina2Pipeline"},
    denoisers={"Lumina2Transformer2DModel": RULES_2},
    text_encoders=GEMMA,
    steps=30,
    guidance=4.0,
    size=SizeRule(default=1024, multiple=16, maximum=2048),
    preview=previews.FLUX,
    text_sites=_TEXT,
    edit_sites=_TEXT,
    objective="mm.customization.objectives.lumina:Lumina2",
    lora=transformer_names(1, "Lumina2LoraLoaderMixin"),
)
LUMINA_NEXT = replace(
    LUMINA_2,
    objective=None,
    name="lumina-next",
    pipelines={"text_to_image": "LuminaPipeline"},
    denoisers={"LuminaNextDiT2DModel": RULES_NEXT},
    preview=previews.SDXL,
    text_sites=(r"layers\.\d+\.attn2\.to_(?:k|v)",),
    edit_sites=(r"layers\.\d+\.attn2\.to_(?:k|v)",),
    lora=transformer_names(1),
)
FAMILIES = (LUMINA_2, LUMINA_NEXT)
