"""Site rules of text encoders, which many families share, by transformers' class names."""

from __future__ import annotations

from dataclasses import replace

from mm.families.rules import LANGUAGE, Rules, keep, keep_text, plain
from mm.layers.sites import Rule

CLIP: dict[str, Rules] = {"CLIPTextModel": LANGUAGE}
CLIP_PROJECTION: dict[str, Rules] = {"CLIPTextModelWithProjection": (*keep_text("text_projection"), *LANGUAGE)}
T5: dict[str, Rules] = {"T5EncoderModel": LANGUAGE}
UMT5: dict[str, Rules] = {"UMT5EncoderModel": LANGUAGE}
BERT: dict[str, Rules] = {
    "BertModel": (
        Rule(r"(.*\.self)\.(query|key|value)", "attn_{2}", "text", group="{1}.qkv", parent="{1}"),
        Rule(r"(.*\.attention\.output)\.dense", "attn_out", "text"),
        *plain(r".*", r"intermediate\.dense", r"output\.dense", "text"),
        *keep_text(r"pooler\..*"),
    )
}
# Attention of a decoder cannot be called again for scoring: its cache has grown meanwhile.
DECODER: Rules = (
    *keep(
        r"(?:.*\.)?(?:visual|vision_tower|vision_model|vision_encoder|multi_modal_projector|aligner|embed_vision)\..*"
    ),
    *keep_text(r"(?:.*\.)?lm_head", "score"),
    *plain(r".*", "gate_up_proj", "(?!)", "text"),
    *(replace(rule, parent="" if rule.role.startswith("attn") else rule.parent) for rule in LANGUAGE),
)


def decoders(*names: str) -> dict[str, Rules]:
    """The rules of language models and vision-language models under these class names."""
    return dict.fromkeys(names, DECODER)


QWEN_VL = decoders("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel")
QWEN3 = decoders("Qwen3ForCausalLM", "Qwen3Model")
QWEN3_VL = decoders("Qwen3VLForConditionalGeneration", "Qwen3VLModel")
GEMMA = decoders("Gemma2Model", "Gemma2ForCausalLM", "GemmaModel", "GemmaForCausalLM")
MISTRAL = decoders("Mistral3ForConditionalGeneration", "Mistral3Model")
LLAMA = decoders("LlamaForCausalLM", "LlamaModel")
GLM = decoders("GlmModel", "GlmForCausalLM")
