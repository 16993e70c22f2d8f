"""Z-Image."""

from __future__ import annotations

from mm.families import previews
from mm.families.family import Family, SizeRule
from mm.families.lora_names import transformer_names
from mm.families.rules import Rules, attention, gated, keep, keep_text, modulation, time
from mm.families.text_encoders import QWEN3

RULES: Rules = (
    *attention(r"layers\.\d+\.attention", "both"),
    *attention(r"noise_refiner\.\d+\.attention"),
    *attention(r"context_refiner\.\d+\.attention", "text"),
    *gated(r"layers\.\d+\.feed_forward", "w1|w3", "w2", "both"),
    *gated(r"noise_refiner\.\d+\.feed_forward", "w1|w3", "w2"),
    *gated(r"context_refiner\.\d+\.feed_forward", "w1|w3", "w2", "text"),
    *modulation(r"(?:layers|noise_refiner)\.\d+\.adaLN_modulation\.\d+"),
    *keep(r"all_x_embedder\..*", r"all_final_layer\..*", r"siglip.*"),
    *keep_text(r"cap_embedder\..*"),
    *time(r"t_embedder\..*"),
)
_TEXT = (r"cap_embedder\.1", r"context_refiner\.\d+\.attention\.to_(?:k|v)")

Z_IMAGE = Family(
    name="z-image",
    pipelines={
        "text_to_image": "ZImagePipeline",
        "image_to_image": "ZImageImg2ImgPipeline",
        "inpaint": "ZImageInpaintPipeline",
        "control": "ZImageControlNetPipeline",
        "edit": "ZImageOmniPipeline",
    },
    more_pipelines=("ZImageControlNetInpaintPipeline",),
    denoisers={"ZImageTransformer2DModel": RULES},
    text_encoders=QWEN3,
    steps=50,
    guidance=5.0,
    size=SizeRule(default=1024, multiple=16, maximum=2048),
    preview=previews.FLUX,
    text_sites=_TEXT,
    edit_sites=_TEXT,
    objective="mm.customization.objectives.transformers:ZImage",
    lora=transformer_names(0, "ZImageLoraLoaderMixin"),
)
FAMILIES = (Z_IMAGE,)
