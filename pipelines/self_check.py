"""What pipelines that check their own drawings share: the reader, loaded when it is first needed.

Design choices
- A text that names what the model was erased of is not checked: of several tries the one in which the erased thing is
  seen best would be kept, which is an attack on the erasure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mm.adapters.stack import stack_of
from mm.pipelines.self_reader import SelfReader, Shortfall, has_reader, reader_of
from mm.pipelines.understanding import likelihoods
from mm.world.asked import Asked, Fact
from mm.world.concept_words import holds

Check = Callable[[Sequence[int], torch.Tensor], list[Shortfall | None]]


class SelfCheckMixin:
    """Compares drawn latents with what was asked for, for pipelines with a trunk and a text tokenizer.

    Attributes:
        self_reader: The parts that read; None until they are needed. Those of the model that the pipeline was loaded
            from are taken, unless others are set.
    """

    text_tokenizer: Any
    trunk: Any
    _shared_reader: list[SelfReader | None]

    def _init_self_check(self) -> None:
        self._shared_reader = [None]  # a list, so that shallow copies (`mm.engine.views`) load the parts once

    @property
    def self_reader(self) -> SelfReader | None:
        return self._shared_reader[0]

    @self_reader.setter
    def self_reader(self, reader: SelfReader | None) -> None:
        self._shared_reader[0] = reader

    def _reader(self) -> SelfReader:
        """The parts that read, loaded where they are needed for the first time."""
        pipe: Any = self
        self.self_reader = self.self_reader or reader_of(pipe.name_or_path)
        return self.self_reader.to(pipe._execution_device)

    def _can_read(self) -> bool:
        """Whether this model has the parts that read."""
        pipe: Any = self
        return self.self_reader is not None or has_reader(pipe.name_or_path)

    def _asked(self, texts: Sequence[str], read: Callable[[str], Asked | None]) -> list[Asked | None]:
        """What pictures must show, one a text; None for texts that name what this model was erased of.

        Args:
            texts: In the model's words.
            read: What a text asks for; None where it is not read in full.
        """
        erased = [name.split(" of ") for name in stack_of(self).erased()]
        return [
            None if any(all(holds(text, word) for word in words) for words in erased) else read(text) for text in texts
        ]

    def _checker(self, asked: Sequence[Asked | None]) -> Check:
        """Compares latents of pictures of a call, by their numbers, with what was asked for each."""
        reader = self._reader()

        def believe(tokens_1SD: torch.Tensor, facts: Sequence[Fact]) -> list[float]:
            questions, answers = [fact.question for fact in facts], [fact.answer for fact in facts]
            return likelihoods(self.trunk, self.text_tokenizer, tokens_1SD, questions, answers)

        return lambda rows, latents: reader.shortfalls(latents, [asked[i] for i in rows], believe)
