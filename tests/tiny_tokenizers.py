"""Tokenizers of transformers' real classes, made offline: every byte is a token, so any text can be read."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

BYTES = sorted(ByteLevel.alphabet())
QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 600  # rows of every tiny text encoder: enough for all tokenizers here, and for words that are added


def clip_tokenizer() -> Any:
    """CLIP's: the end token has the highest number, as CLIP's pooling expects."""
    words = [*BYTES, *(f"{byte}</w>" for byte in BYTES), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={w: k for k, w in enumerate(words)}, merges=[], model_max_length=77)


def t5_tokenizer() -> Any:
    """T5's, a unigram model over printable ASCII."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((x, -2.0) for x in letters)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def bert_tokenizer() -> Any:
    """BERT's, whose words begin with a letter and go on with pieces of one letter each."""
    letters = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    return transformers.BertTokenizer(vocab={w: k for k, w in enumerate(words)}, model_max_length=77)


def gemma_tokenizer() -> Any:
    """Gemma's, over printable ASCII."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *(chr(code) for code in range(33, 127))]
    made = transformers.GemmaTokenizer(vocab={w: k for k, w in enumerate(words)}, merges=[], model_max_length=512)
    made.padding_side = "right"
    return made


def qwen_tokenizer() -> Any:
    """Qwen's, with its chat marks and those of pictures, and a chat template."""
    made = transformers.Qwen2Tokenizer(vocab={b: k for k, b in enumerate((*BYTES, *QWEN_SPECIAL))}, merges=[])
    made.add_special_tokens({"additional_special_tokens": list(QWEN_SPECIAL[1:])})
    made.chat_template = CHAT
    made.model_max_length = 2048
    return made


def qwen_processor() -> Any:
    """Qwen2-VL's processor, pictures of at most 56 x 56 pixels."""
    pictures = transformers.Qwen2VLImageProcessor(
        patch_size=14, merge_size=2, temporal_patch_size=2, min_pixels=28 * 28, max_pixels=56 * 56
    )
    videos = transformers.Qwen2VLVideoProcessor(patch_size=14, merge_size=2, temporal_patch_size=2)
    return transformers.Qwen2VLProcessor(
        image_processor=pictures, tokenizer=qwen_tokenizer(), video_processor=videos, chat_template=CHAT
    )


def glm_tokenizer() -> Any:
    """GLM-4's, which begins texts with two marks and pads them on the left."""
    special = ("<|endoftext|>", "[gMASK]", "<sop>")
    words = {word: k for k, word in enumerate((*BYTES, *special))}
    raw = Tokenizer(BPE(vocab=words, merges=[]))
    raw.pre_tokenizer = ByteLevel(add_prefix_space=False)
    raw.decoder = ByteLevelDecoder()
    marks = [(word, words[word]) for word in special[1:]]
    raw.post_processor = TemplateProcessing(single="[gMASK] <sop> $A", pair=None, special_tokens=marks)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=special[0], eos_token=special[0], padding_side="left", model_max_length=1024,
        additional_special_tokens=list(special[1:]), model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
