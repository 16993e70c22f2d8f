"""HiDream-I1: attention of two streams under names of its own, feed-forwards with routed experts."""

from __future__ import annotations

from mm.families import previews
from mm.families.family import Family, SizeRule
from mm.families.lora_names import transformer_names
from mm.families.rules import Rules, gated, keep, keep_text, modulation, time
from mm.families.text_encoders import CLIP_PROJECTION, LLAMA, T5
from mm.layers.sites import Rule

RULES: Rules = (
    Rule(r"(.*\.attn1)\.to_(q|k|v)", "attn_{2}", "both", group="{1}.qkv", parent="{1}"),
    Rule(r"(.*\.attn1)\.to_(k|v)_t", "cross_{2}", "text", group="{1}.qkv_t", parent="{1}"),
    Rule(r"(.*\.attn1)\.to_q_t", "attn_q", "text", group="{1}.qkv_t", parent="{1}"),
    Rule(r"(.*\.attn1)\.to_out_t", "attn_out", "text", parent="{1}"),
    Rule(r"(.*\.attn1)\.to_out", "attn_out", "both", parent="{1}"),
    *gated(r".*\.ff_i(?:\.shared_experts|\.experts\.\d+)?", "w1|w3", "w2"),
    *gated(r".*\.ff_t", "w1|w3", "w2", "text"),
    *modulation(r"(?:double|single)_stream_blocks\.\d+\.block\.adaLN_modulation\.\d+"),
    *keep(r"x_embedder\..*", r"final_layer\..*"),
    *keep_text(r"caption_projection\..*", r"p_embedder\..*"),
    *time(r"t_embedder\..*"),
)
_TEXT = (r"caption_projection\.\d+\.linear", r"double_stream_blocks\.\d+\.block\.attn1\.to_(?:k|v)_t")

HIDREAM = Family(
    name="hidream",
    pipelines={"text_to_image": "HiDreamImagePipeline"},
    denoisers={"HiDreamImageTransformer2DModel": RULES},
    text_encoders=CLIP_PROJECTION | T5 | LLAMA,
    steps=50,
    guidance=5.0,
    size=SizeRule(default=1024, multiple=16, maximum=2048),
    preview=previews.FLUX,
    text_sites=_TEXT,
    edit_sites=_TEXT,
    lora=transformer_names(3, "HiDreamImageLoraLoaderMixin"),
)
FAMILIES = (HIDREAM,)
