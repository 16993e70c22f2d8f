"""Folders of tiny random Janus and Emu3, as transformers saves them: its own classes, tokenizers and processors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3ImageProcessor,
    Emu3Processor,
    Emu3TextConfig,
    Emu3VQVAEConfig,
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessor,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

PROMPTS = ["a red cat", "two blue stars on the house , a dog on grass"]
SIZE = {"height": 16, "width": 24}  # two rows of three tokens
WORDS = (
    "a an the red blue cat dog house on grass describe picture what colour is it User Assistant : . two stars".split()
)
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
CHAT = (
    "{% for m in messages %}User : {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}Assistant :{% endif %}"
)


def tokenizer_of(extra: dict[str, str], more: list[str], bos: bool) -> PreTrainedTokenizerFast:
    vocabulary = {word: n for n, word in enumerate([*SPECIAL.values(), *extra.values(), *more, *WORDS])}
    raw = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    if bos:
        raw.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=raw, extra_special_tokens=extra, padding_side="left", **SPECIAL)


def liven(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights large enough that tokens differ from one another."""
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "vision_model" not in name:
            weight.data.normal_(std=weight.shape[1] ** -0.5 * (0.6 if "head" in name else 1.5))
    return model.eval()


def save_janus(folder: Path) -> Path:
    """A folder as transformers saves it: 32 x 32 pictures of 16 tokens, 64 codes."""
    tokens = tokenizer_of({"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}, [], bos=True)
    sight = JanusImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = JanusProcessor(sight, tokens, chat_template=CHAT, num_image_tokens=16)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokens), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, **ids,
        ).to_dict(),
        vision_config=JanusVisionConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8, projection_dim=32,
            num_image_tokens=16,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8, num_embeddings=64, latent_channels=32, base_channels=32, channel_multiplier=[1, 1, 1, 1],
            num_res_blocks=1, projection_dim=32, image_token_embed_dim=32,
        ),
        image_token_id=tokens.image_token_id,
    )  # fmt: skip
    model = liven(JanusForConditionalGeneration(config))
    # The token for unconditional rows is named here; a tokenizer may pad with another.
    model.generation_config = GenerationConfig(**(ids | {"pad_token_id": 0}), guidance_scale=5.0)
    model.generation_config.generation_kwargs = {"boi_token_id": tokens.boi_token_id}
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


VISUAL = [f"<|visual token {n:06d}|>" for n in range(32)]
EMU3_TOKENS = {
    "image_token": "<image>", "boi_token": "<|image start|>", "eoi_token": "<|image end|>",
    "image_wrapper_token": "<|image token|>", "eof_token": "<|extra_201|>",
}  # fmt: skip


def save_emu3(folder: Path) -> Path:
    """A folder as transformers saves it: 8 pixels a token, 32 codes."""
    tokens = tokenizer_of(EMU3_TOKENS, ["<|extra_200|>", *VISUAL], bos=False)
    sight = Emu3ImageProcessor(min_pixels=16 * 16, max_pixels=64 * 64, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    config = Emu3Config(
        text_config=Emu3TextConfig(
            vocab_size=len(tokens), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, **ids,
        ).to_dict(),
        vq_config=Emu3VQVAEConfig(
            codebook_size=32, embed_dim=4, base_channels=32, channel_multiplier=[1, 1, 1, 1], num_res_blocks=1,
            hidden_size=32, attn_resolutions=[3], temporal_downsample_factor=2,
        ).to_dict(),
        vocabulary_map=tokens.get_vocab(),
    )  # fmt: skip
    model = liven(Emu3ForConditionalGeneration(config))
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    Emu3Processor(sight, tokens, chat_template=CHAT).save_pretrained(folder)
    return folder


def reading_inputs(pipe, pictures, questions):
    turns = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q}]}] for q in questions]
    texts = pipe.processor.apply_chat_template(turns, add_generation_prompt=True)
    return pipe.processor(text=texts, images=pictures, padding=True, return_tensors="pt")


def noise(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
