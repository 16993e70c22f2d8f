"""Questions in any wording as queries, with a warning for each that is not understood."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mm.core.errors import UserError
from mm.pipelines.prompt_encoding import added_names
from mm.world.asking.parse import parse_question
from mm.world.asking.query import Query, Unread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CALLER = 6  # frames from here to who called the pipeline


def read_questions(questions: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[Query | Unread]:
    """The query of each question; warns of those that are not understood.

    Raises:
        UserError: Where there is no question, or one is empty or no text.
    """
    if not questions:
        raise UserError('there is no question in the list; ask one, for example ["how many cats are there?"]')
    return [read_question(question, tokenizer) for question in questions]


def read_question(question: str, tokenizer: PreTrainedTokenizerFast) -> Query | Unread:
    """The query of a question; warns where it is not understood. Raises UserError where it is empty or no text."""
    if not isinstance(question, str):
        raise UserError(f"a question is a text, got {type(question).__name__} {question!r}")
    if not question.strip():
        raise UserError("the question is empty (the prompt is empty); ask for example 'how many cats are there?'")
    read = parse_question(question, added_names(tokenizer))
    if isinstance(read, Unread):
        why = "" if read.word is None else f": the model does not know the word {read.word!r}"
        warnings.warn(f"the question {question.strip()[:80]!r} is not understood{why}", stacklevel=_CALLER)
    return read
