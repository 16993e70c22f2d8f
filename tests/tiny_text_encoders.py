"""Tiny random text encoders of transformers' real classes, over the vocabulary of tiny_tokenizers."""

from __future__ import annotations

from typing import Any

import transformers
from tiny_tokenizers import BYTES, QWEN_SPECIAL, VOCABULARY

WIDTH = 16
_IDS = {word: len(BYTES) + k for k, word in enumerate(QWEN_SPECIAL)}
_DECODER = {
    "hidden_size": WIDTH, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
    "vocab_size": VOCABULARY, "max_position_embeddings": 4096,
}  # fmt: skip


def clip_text(*, projection: bool = False, width: int = WIDTH, tokens: int = 77) -> Any:
    end = 2 * len(BYTES) + 1
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=VOCABULARY, projection_dim=width, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end,
        max_position_embeddings=tokens,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config).eval()


def bert_text() -> Any:
    config = transformers.BertConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=128,
    )  # fmt: skip
    return transformers.BertModel(config).eval()


def t5_text(width: int = WIDTH) -> Any:
    config = transformers.T5Config(
        d_model=width, d_kv=8, d_ff=2 * width, num_layers=1, num_heads=2, vocab_size=VOCABULARY,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return transformers.T5EncoderModel(config).eval()


def umt5_text() -> Any:
    """UMT5, whose layers have position tables of their own."""
    config = transformers.UMT5Config(
        d_model=WIDTH, d_kv=8, d_ff=2 * WIDTH, num_layers=1, num_heads=2, vocab_size=VOCABULARY,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return transformers.UMT5EncoderModel(config).eval()


def gemma_text(layers: int = 2) -> Any:
    config = transformers.Gemma2Config(**_DECODER, num_hidden_layers=layers, head_dim=8, pad_token_id=0)
    return transformers.Gemma2Model(config).eval()


def glm_text(layers: int = 2) -> Any:
    config = transformers.GlmConfig(**_DECODER, num_hidden_layers=layers, head_dim=8, pad_token_id=0)
    return transformers.GlmModel(config).eval()


def qwen3_text(layers: int = 2, *, causal: bool = False) -> Any:
    config = transformers.Qwen3Config(**_DECODER, num_hidden_layers=layers, head_dim=8)
    return (transformers.Qwen3ForCausalLM if causal else transformers.Qwen3Model)(config).eval()


def mistral_text(layers: int = 30) -> Any:
    """Mistral 3, of whose layers FLUX.2 takes the 10th, 20th and 30th."""
    words = {"model_type": "mistral", "num_hidden_layers": layers, "head_dim": 8, **_DECODER}
    sight = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Mistral3Config(
        text_config=words, vision_config=sight, image_token_index=_IDS["<|image_pad|>"], vision_feature_layer=-1
    )
    return transformers.Mistral3ForConditionalGeneration(config).eval()


def qwen_vl_text(layers: int = 1) -> Any:
    words = {
        **_DECODER, "num_hidden_layers": layers, "bos_token_id": _IDS["<|endoftext|>"],
        "eos_token_id": _IDS["<|endoftext|>"],
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
    }  # fmt: skip
    sight = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": WIDTH,
        "patch_size": 14, "spatial_merge_size": 2, "window_size": 56, "fullatt_block_indexes": [0],
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config=words,
        vision_config=sight,
        image_token_id=_IDS["<|image_pad|>"],
        video_token_id=_IDS["<|video_pad|>"],
        vision_start_token_id=_IDS["<|vision_start|>"],
        vision_end_token_id=_IDS["<|vision_end|>"],
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
