"""Checks prompts, warns of unknown words, and turns prompts into tokens.

Design choices
- Prompts are read by `mm.world.lexicon`: synonyms become the model's own words, and what the model does not know is
  named in a warning, once a call. Without a warning the picture would seem to ignore the prompt.
- Prompts are padded to a multiple of 32 tokens, which is one length for all but the longest, and a mask hides the
  padding: the arithmetic of a prompt hardly depends on what else is in its batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mm.core.checks import shown
from mm.core.errors import UserError
from mm.core.nouns import counted
from mm.models.cache import PromptCache
from mm.world import lexicon
from mm.world.lexicon_tables import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CALLER = 5  # frames from here to who called the pipeline: check_inputs, __call__, and torch.no_grad's around it
_STEP = 32  # prompts are padded to a multiple of this many tokens


def check_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerFast, task: Task = "draw", *, strict: bool | None = None
) -> list[str]:
    """Reads prompts, and warns of what is not understood and of prompts that are too long.

    Args:
        prompts: In any wording.
        tokenizer: Of the model; words that were added to it are known.
        task: Whose words are known: "draw" or "edit".
        strict: True refuses a prompt with anything that is not understood. Otherwise it is drawn with warnings; None
            adds one where nothing is left to draw.

    Returns:
        The prompts in the model's words; what it cannot read of a long one is cut off, as diffusers does.

    Raises:
        UserError: Where there is no prompt, or one is empty or no text; for what is refused (`strict`).
    """
    if not prompts:
        raise UserError("there is no prompt in the list; say what to draw, for example ['two red cats on grass']")
    names = added_names(tokenizer)
    warned: dict[str, None] = {}
    out = []
    for prompt in prompts:
        if not prompt.strip():
            raise UserError("the prompt is empty; say what to draw, for example 'two red cats on grass'")
        fitting = cut(prompt, tokenizer)
        found = lexicon.read(fitting, task, names)
        if strict and found.problems:
            raise refused(prompt, found.problems)
        lines = found.notices
        if strict is None and found.nothing:  # one line, which has the problems
            said = f"{nothing_of(prompt, found)}. A picture is drawn all the same; `strict` refuses such a prompt"
            lines = [*found.corrected, said]
        if fitting != prompt:
            warned[
                f"the prompt is longer than the {tokenizer.model_max_length} tokens that the model reads; ignored: "
                f"{prompt[len(fitting) :].strip()[:80]!r}"
            ] = None
        warned |= dict.fromkeys(lines)
        out.append(cut(found.text, tokenizer))
    for line in warned:
        warnings.warn(line, stacklevel=_CALLER)
    return out


def nothing_of(prompt: str, found: lexicon.Reading) -> str:
    """What is said of a prompt that names nothing the model can draw."""
    return f"{prompt.strip()[:200]!r} names nothing that the model can draw: {_reasons(found.problems)}"


def refused(text: str, problems: Sequence[str]) -> UserError:
    """The error of a prompt or an instruction that `strict` refuses: its words are not passed on."""
    return UserError(f"{text.strip()[:200]!r} is refused (strict): {_reasons(problems)}")


def refusal_of(found: lexicon.Reading) -> str:
    """What is said in a conversation of a prompt that is refused."""
    return f"I cannot draw this: {_reasons(found.problems)}."


def _reasons(problems: Sequence[str]) -> str:
    named = [line for line in problems if line != lexicon.NOTHING_LEFT]
    return "; ".join(named) or "no word that the model knows is left"


def in_own_words(prompts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Prompts in the model's words, without a warning."""
    names = added_names(tokenizer)
    return [lexicon.read(prompt, names=names).text for prompt in prompts]


def added_names(tokenizer: PreTrainedTokenizerFast) -> frozenset[str]:
    """Names of things that were added to a tokenizer after its training, such as "<mug>"."""
    return frozenset(tokenizer.get_added_vocab()) - frozenset(tokenizer.all_special_tokens)


def cut(prompt: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """The beginning of a prompt that fits into the tokenizer's length."""
    if len(prompt) < tokenizer.model_max_length - 2:  # a token has a character at least
        return prompt
    found = tokenizer(prompt, truncation=True, return_offsets_mapping=True)
    if len(tokenizer(prompt).input_ids) <= tokenizer.model_max_length:
        return prompt
    return prompt[: max(end for _, end in found["offset_mapping"])]


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The prompts and negative prompts of a call, as texts or encoded.

    Args:
        prompts: One a picture's prompt, P in all.
        negatives: One for all prompts, or P.
        each: Pictures of each prompt.
    """

    prompts: Sequence[str] | PromptCache
    negatives: Sequence[str] | PromptCache
    each: int

    def __post_init__(self) -> None:
        if len(self.negatives) not in (1, len(self.prompts)):
            raise UserError(
                f"{counted(len(self.negatives), 'negative prompt')} for "
                f"{counted(len(self.prompts), 'prompt')}; give one, or one for each"
            )

    @property
    def pictures(self) -> int:
        """B."""
        return len(self.prompts) * self.each

    @property
    def texts(self) -> Sequence[str] | None:
        """The prompts as texts; None where they were given encoded."""
        return None if isinstance(self.prompts, PromptCache) else self.prompts

    def negatives_of(self, rows: Sequence[int]) -> dict[str, Any]:
        """The negative prompts of some pictures, as arguments of a call for these; empty where one serves all."""
        if len(self.negatives) == 1:
            return {}
        at = [row // self.each for row in rows]
        if isinstance(self.negatives, PromptCache):
            return {"negative_prompt_embeds": self.negatives.select(torch.tensor(at))}
        return {"negative_prompt": [self.negatives[i] for i in at]}

    def caches(self, part: slice, encode: Callable[[Sequence[str]], PromptCache]) -> tuple[PromptCache, PromptCache]:
        """The caches of some pictures' prompts and negative prompts: of all, or of one alone."""
        chosen = (self.prompts, self.negatives)
        if part == slice(0, self.pictures):
            prompts, negatives = (x if isinstance(x, PromptCache) else encode(x) for x in chosen)
            return prompts.repeat(self.each), negatives.repeat(self.pictures // len(negatives))
        at = part.start // self.each
        prompts, negatives = (
            x.select(rows) if isinstance(x, PromptCache) else encode(x[rows])
            for x in chosen
            for rows in [slice(at, at + 1) if len(x) > 1 else slice(0, 1)]
        )
        return prompts, negatives


def conditions(
    tokenizer: PreTrainedTokenizerFast,
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str] | None,
    each: int,
    prompt_embeds: PromptCache | None = None,
    negative_prompt_embeds: PromptCache | None = None,
    *,
    checked: bool = True,
    strict: bool | None = None,
) -> Conditions:
    """What a call is conditioned on; `checked`: whether prompts are read and warned of, `strict`: see `check_prompts`.

    Raises:
        UserError: Where a text and its cache are both given, or neither, and for wrong prompts.
    """
    if (prompt is None) == (prompt_embeds is None):
        raise UserError("give prompt or prompt_embeds, one of the two")
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise UserError("give negative_prompt or negative_prompt_embeds, not both")
    prompts: Sequence[str] | PromptCache
    if prompt_embeds is not None:
        prompts = prompt_embeds
    else:
        texts = texts_of(prompt)
        prompts = check_prompts(texts, tokenizer, strict=strict) if checked else in_own_words(texts, tokenizer)
    negatives = negatives_of(negative_prompt, tokenizer) if negative_prompt_embeds is None else negative_prompt_embeds
    return Conditions(prompts=prompts, negatives=negatives, each=each)


def texts_of(prompt: object, name: str = "prompt") -> list[str]:
    """Prompts, called `name` in errors, as a list. Raises UserError for what is neither a text nor a list of texts."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise UserError(f"a {name} is a text or a list of texts, got {type(prompt).__name__} {shown(prompt)}")
    if wrong := [text for text in prompt if not isinstance(text, str)]:
        raise UserError(f"a {name} is a text, got {type(wrong[0]).__name__} {shown(wrong[0])}")
    return list(prompt)


def negatives_of(negative_prompt: str | Sequence[str] | None, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Negative prompts as a list; the empty prompt where there is none. Raises UserError for what is no text."""
    texts = [""] if negative_prompt is None else texts_of(negative_prompt, "negative prompt")
    return [cut(text, tokenizer) for text in texts]


def tokenize(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerFast, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token numbers and mask (B, T), T a multiple of 32."""
    fitting = [cut(prompt, tokenizer) for prompt in prompts]  # truncation and padding to a multiple exclude each other
    words = tokenizer(fitting, padding=True, pad_to_multiple_of=_STEP, return_tensors="pt")
    return words.input_ids.to(device), words.attention_mask.bool().to(device)


def left_padded(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token rows as ids and mask (B, T), padded on the left."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = torch.tensor(row), True
    return ids.to(device), mask.to(device)
