"""The text tokenizer: word level over a closed vocabulary, as a real `PreTrainedTokenizerFast`.

Design choices
- One token a word: prompts are a dozen tokens long, and an unknown word is seen as such instead of being spelled out.
- 64 spare rows take new words later (`<mug>`), without resizing any embedding.
- The table has 1,024 rows in the model; the rows beyond the vocabulary are never used.

"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

from mm.world.words import WORDS, split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>", "<image>", "<codes>", "<look>", "<user>", "<mm>", "<end>")
SPARE = tuple(f"<spare_{i}>" for i in range(64))
MAX_PROMPT = 64  # tokens, with <bos> and <eos>


def build_text_tokenizer() -> PreTrainedTokenizerFast:
    """A fresh tokenizer: `<bos> words <eos>`, lower-cased, padded with `<pad>` on the right."""
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    rows = (*SPECIAL, *SPARE, *WORDS)
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(rows)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    pattern = Regex(r"<[a-z0-9_]+>|[a-z0-9]+(?:['-][a-z0-9]+)*|[^\sa-z0-9]")
    backend.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", rows.index("<bos>")), ("<eos>", rows.index("<eos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=MAX_PROMPT,
        padding_side="right",
    )


def unknown_words(text: str, known: set[str] | None = None) -> list[str]:
    """The words of `text` that the vocabulary lacks, in order, each once. Words added later (`<mug>`) are known."""
    table = set(WORDS) if known is None else known
    rest = re.sub(r"<[a-z0-9_-]+>", lambda m: " " if m[0] in table else m[0], text.lower())
    return list(dict.fromkeys(word for word in split(rest) if word not in table))


def nearest_words(word: str, n: int = 3) -> list[str]:
    """Known words with a similar spelling."""
    return difflib.get_close_matches(word.lower(), WORDS, n=n, cutoff=0.6)
