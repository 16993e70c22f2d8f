"""What every reading pipeline shares: the output, and how pictures and questions are paired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffusers.utils.outputs import BaseOutput

from mm.core.errors import UserError
from mm.core.nouns import counted
from mm.world.asking.trained import DESCRIBE


@dataclass
class UnderstandingOutput(BaseOutput):
    """Answers to questions about pictures.

    Attributes:
        answers: One for each question.
        outside: Whether each picture is outside of the model's domain.
    """

    answers: list[str]
    outside: list[bool]


def paired(image: Any, question: str | Sequence[str] | None) -> tuple[list[Any], list[str]]:
    """Pictures and questions of a call, pair by pair; a single one of either is repeated, no question means `DESCRIBE`.

    Raises:
        UserError: Several of both, but not as many.
    """
    pictures = list(image) if isinstance(image, Sequence) and not isinstance(image, str) else [image]
    questions = [DESCRIBE if question is None else question] if isinstance(question, str | None) else list(question)
    questions = questions * len(pictures) if len(questions) == 1 else questions
    pictures = pictures * len(questions) if len(pictures) == 1 else pictures
    if len(questions) != len(pictures):
        raise UserError(
            f"{counted(len(pictures), 'picture')} and {counted(len(questions), 'question')}; give "
            "as many, or a single one"
        )
    return pictures, questions
