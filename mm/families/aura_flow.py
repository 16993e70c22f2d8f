"""AuraFlow."""

from __future__ import annotations

from mm.families import previews
from mm.families.family import Family, SizeRule
from mm.families.lora_names import transformer_names
from mm.families.rules import Rules, attention, gated, joint, keep, keep_text, modulation, time
from mm.families.stable_diffusion_3 import TEXT
from mm.families.text_encoders import UMT5

RULES: Rules = (
    *attention(r"single_transformer_blocks\.\d+\.attn", "both"),
    *gated(r"single_transformer_blocks\.\d+\.ff", "linear_1|linear_2", "out_projection", "both"),
    *modulation(r"(?:joint|single)_transformer_blocks\.\d+\.norm1(?:_context)?\.linear"),
    *joint(r"joint_transformer_blocks\.\d+\.attn"),
    *gated(r"joint_transformer_blocks\.\d+\.ff", "linear_1|linear_2", "out_projection"),
    *gated(r"joint_transformer_blocks\.\d+\.ff_context", "linear_1|linear_2", "out_projection", "text"),
    *keep(r"pos_embed\..*", "proj_out", r"norm_out\.linear"),
    *keep_text("context_embedder"),
    *time(r"time_step_proj\..*"),
)

AURA_FLOW = Family(
    name="aura-flow",
    pipelines={"text_to_image": "AuraFlowPipeline"},
    denoisers={"AuraFlowTransformer2DModel": RULES},
    text_encoders=UMT5,
    steps=50,
    guidance=3.5,
    size=SizeRule(default=1024, multiple=16, maximum=1536),
    preview=previews.SDXL,
    text_sites=TEXT,
    edit_sites=TEXT,
    objective="mm.customization.objectives.aura_flow:AuraFlow",
    lora=transformer_names(0, "AuraFlowLoraLoaderMixin"),
)
FAMILIES = (AURA_FLOW,)
