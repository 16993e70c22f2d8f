"""Checks instructions to change pictures: trained wordings, warnings, and "it" by what the picture shows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mm.pipelines.prompt_encoding import added_names, check_prompts, refused
from mm.world.asking.edit_words import Seen
from mm.world.asking.instructions import read_instruction

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CALLER = 4  # frames from here to who called the pipeline
NOT_WHOLE = "cannot be carried out as a whole"


def check_instructions(
    instructions: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    seen: Callable[[int], Seen],
    absent: Callable[[int, str], bool],
    *,
    strict: bool | None = None,
) -> list[str]:
    """Reads instructions, and warns of words that are left out.

    Args:
        instructions: In any wording.
        tokenizer: Of the model; words that were added to it are known.
        seen: What the picture of an instruction shows; asked for those with "it" only.
        absent: Whether the model sees no thing of a name in the picture of an instruction.
        strict: True refuses an instruction with anything that is not understood. Otherwise what is left of it is
            carried out, with warnings; False passes it on without reading its wording.

    Returns:
        Instructions in the model's words.

    Raises:
        UserError: Where there is none, or one is empty, no text, or refused.
    """
    if strict is False or not instructions or not all(isinstance(x, str) and x.strip() for x in instructions):
        return check_prompts(instructions, tokenizer, "edit", strict=False)
    names, out = added_names(tokenizer), []
    warned: dict[str, None] = {}
    for at, text in enumerate(instructions):
        read = read_instruction(text, names)
        if read.open:
            read = read_instruction(text, names, seen(at))
        why = "; ".join(read.problems)
        if strict and why:
            raise refused(text, read.problems)
        if read.partial:
            warned[f"{text.strip()[:200]!r} {NOT_WHOLE}: {why}. `strict` refuses such an instruction"] = None
        warned |= dict.fromkeys(read.corrections if read.partial else (*read.corrections, *read.problems))
        if read.target is not None and not read.open and absent(at, read.target):
            warned[f"the model sees no {read.target} in the picture, so the instruction may change nothing"] = None
        out.append(read.words)
    for line in warned:
        warnings.warn(line, stacklevel=_CALLER)
    return out
