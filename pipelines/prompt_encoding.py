"""Checks prompts, warns of unknown words, and turns prompts into tokens.

Design choices
- Unknown words are named in a warning, each once a call, with the nearest known ones: the model reads `<unk>` there,
  and without a warning the picture would seem to ignore the prompt.
- Prompts are padded to a multiple of 32 tokens, which is one length for all but the longest, and a mask hides the
  padding: the arithmetic of a prompt hardly depends on what else is in its batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mm.core.errors import UserError
from mm.models.text import nearest_words, unknown_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CALLER = 5  # frames from here to who called the pipeline: check_inputs, __call__, and torch.no_grad's around it
_STEP = 32  # prompts are padded to a multiple of this many tokens


def check_prompts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises UserError for empty and overlong prompts; warns of unknown words."""
    if not prompts:
        raise UserError("there is no prompt in the list; say what to draw, for example ['two red cats on grass']")
    known = set(tokenizer.get_vocab())
    warned: set[str] = set()
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise UserError(f"a prompt is a text, got {type(prompt).__name__} {prompt!r}")
        if not prompt.strip():
            raise UserError("the prompt is empty; say what to draw, for example 'two red cats on grass'")
        length = len(tokenizer(prompt).input_ids)
        if length > tokenizer.model_max_length:
            raise UserError(
                f"the prompt has {length} tokens and the model reads {tokenizer.model_max_length}; shorten it: "
                f"{prompt[:60]!r}..."
            )
        for word in unknown_words(prompt, known):
            if word not in warned:
                warned.add(word)
                near = ", ".join(nearest_words(word))
                hint = f"; nearest known: {near}" if near else ""
                warnings.warn(f"the model does not know the word {word!r} and ignores it{hint}", stacklevel=_CALLER)


def tokenize(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerFast, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token numbers and mask (B, T), T a multiple of 32."""
    words = tokenizer(list(prompts), padding=True, pad_to_multiple_of=_STEP, return_tensors="pt")
    return words.input_ids.to(device), words.attention_mask.bool().to(device)


def left_padded(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token rows as ids and mask (B, T), padded on the left."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = torch.tensor(row), True
    return ids.to(device), mask.to(device)
