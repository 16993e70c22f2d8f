"""OmniGen: a language model that reads words, pictures and the picture it draws in one sequence."""

from __future__ import annotations

from mm.families import previews
from mm.families.family import Family, SizeRule
from mm.families.lora_names import transformer_names
from mm.families.rules import Rules, attention, keep, plain, time

RULES: Rules = (
    *attention(r"layers\.\d+\.self_attn", "both"),
    *plain(r"layers\.\d+\.mlp", "gate_up_proj", "down_proj", "both"),
    *keep(r"patch_embedding\..*", "proj_out", r"norm_out\.linear"),
    *time(r"time_token\..*", r"t_embedder\..*"),
)
_TEXT = (r"layers\.\d+\.self_attn\.to_(?:k|v)",)

OMNIGEN = Family(
    name="omnigen",
    pipelines={"text_to_image": "OmniGenPipeline"},
    denoisers={"OmniGenTransformer2DModel": RULES},
    steps=50,
    guidance=2.5,
    size=SizeRule(default=1024, multiple=16, maximum=2048),
    preview=previews.SDXL,
    mixed=False,  # prompts of other lengths in a call change pictures
    text_sites=_TEXT,
    edit_sites=_TEXT,
    lora=transformer_names(0),
)
FAMILIES = (OMNIGEN,)
