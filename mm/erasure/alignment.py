"""Which token of an anchor's prompt stands where a token of the target's prompt does.

Prompts differ in the words of the concept, so their token sequences share a beginning and an end. Tokens of the shared
parts map onto each other; tokens of the concept map onto the anchor's in order, the last one onto the last, since it
carries the concept in causal text encoders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mm.core.errors import UserError

PAD = -1


def align(target: Sequence[int], anchor: Sequence[int]) -> list[int]:
    """For every token of `target` the index of its counterpart in `anchor`.

    Args:
        target: token ids of a prompt with the concept.
        anchor: token ids of the prompt with the anchor in its place.
    """
    shorter = min(len(target), len(anchor))
    head = next((i for i in range(shorter) if target[i] != anchor[i]), shorter)
    tail = next((i for i in range(shorter - head) if target[-1 - i] != anchor[-1 - i]), shorter - head)
    old, new = len(target) - head - tail, len(anchor) - head - tail
    if new <= 0:  # the anchor has no words of its own: the token before, or after, stands for it
        middle = [max(0, head - 1) if head else min(len(anchor) - 1, head)] * old
    elif old == 1:
        middle = [head + new - 1]
    else:
        middle = [head + round(i * (new - 1) / (old - 1)) for i in range(old)]
    return [*range(head), *middle, *range(len(anchor) - tail, len(anchor))]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A prompt's tokens in the text features of a model.

    Args:
        ids: of the tokens that count; padding that the model masks is left out.
        places: where they stand among the features.
    """

    ids: tuple[int, ...]
    places: tuple[int, ...]


def tokens_of(pipe: Any, prompt: str, length: int) -> Tokens | None:
    """The tokens of a prompt among `length` text features; None where the pipeline's tokenizers do not say.

    Pipelines pad to a fixed length (CLIP 77, T5 256 or 512), to a multiple, or not at all; some put the sequences of
    several text encoders one behind the other (SD3: CLIP's 77 tokens, then T5's). CLIP's padding counts: CLIP models
    have no mask for it, so it carries the prompt as well. Other padding is masked, and left out.
    """
    tokenizers = [t for name, t in getattr(pipe, "components", {}).items() if "tokenizer" in name and callable(t)]
    each = [_ids(t, prompt) for t in tokenizers]
    limits = [getattr(t, "model_max_length", 1 << 30) for t in tokenizers]
    clip = [type(t).__name__.startswith("CLIP") for t in tokenizers]
    for k, ids in enumerate(each):
        fits = length == limits[k] or length == len(ids) or len(tokenizers) == 1 or (not clip[k] and length > 77)
        if fits and len(ids) <= length and not (any(clip) and not clip[k] and length == 77):
            pad = length if clip[k] else len(ids)
            whole = [*ids, *[PAD] * (pad - len(ids))]
            return Tokens(ids=tuple(whole), places=tuple(range(len(whole))))
    return None


def _ids(tokenizer: Any, prompt: str) -> list[int]:
    ids = tokenizer(prompt).input_ids
    return list(ids[0] if ids and isinstance(ids[0], list) else ids)


def matched(pipe: Any, target: str, anchor: str, length: int) -> tuple[list[int], list[int]]:
    """Places of the target prompt's tokens among `length` features, and of their counterparts in the anchor's prompt.

    Raises:
        UserError: where the tokens are not known, and so cannot be matched.
    """
    old, new = tokens_of(pipe, target, length), tokens_of(pipe, anchor, length)
    if old is None or new is None:
        raise UserError(
            f"the {length} text features of this model cannot be matched with the tokens of its tokenizers; "
            "give an anchor with as many tokens as the target"
        )
    ends = align(_without_pad(old.ids), _without_pad(new.ids))
    pads = [len(_without_pad(new.ids)) + i for i in range(min(old.ids.count(PAD), new.ids.count(PAD)))]
    first = len(_without_pad(old.ids))
    return [*range(first), *[first + i for i in range(len(pads))]], [*ends, *pads]


def moved(places: Sequence[int], template: int, length: int) -> list[int]:
    """Places behind a template of so many features; those beyond the `length` features are the last one's."""
    return [min(place + template, length - 1) for place in places]


def shared_head(pipe: Any, target: str, anchor: str, length: int) -> int:
    """How many tokens two prompts have in common before they first differ; 0 where their tokens are not known."""
    old, new = tokens_of(pipe, target, length), tokens_of(pipe, anchor, length)
    if old is None or new is None:
        return 0
    both = zip(_without_pad(old.ids), _without_pad(new.ids), strict=False)
    return next((i for i, (a, b) in enumerate(both) if a != b), 0)


def _without_pad(ids: Sequence[int]) -> list[int]:
    return [i for i in ids if i != PAD]
