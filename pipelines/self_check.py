"""What pipelines with `best_of` share: the reader of their own drawings, loaded when it is first needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mm.pipelines.self_reader import SelfReader, Shortfall, reader_of
from mm.pipelines.understanding import likelihoods
from mm.world.asked import Asked, Fact

Check = Callable[[Sequence[int], torch.Tensor], list[Shortfall | None]]


class SelfCheckMixin:
    """Compares drawn latents with what was asked for, for pipelines with a trunk and a text tokenizer.

    Attributes:
        self_reader: The parts that read; None until they are needed. Those of the model that the pipeline was loaded
            from are taken, unless others are set.
    """

    self_reader: SelfReader | None
    text_tokenizer: Any
    trunk: Any

    def _init_self_check(self) -> None:
        self.self_reader = None

    def _reader(self) -> SelfReader:
        """The parts that read, loaded where they are needed for the first time."""
        pipe: Any = self
        self.self_reader = self.self_reader or reader_of(pipe.name_or_path)
        return self.self_reader.to(pipe._execution_device)

    def _checker(self, asked: Sequence[Asked | None]) -> Check:
        """Compares latents of pictures of a call, by their numbers, with what was asked for each."""
        reader = self._reader()

        def believe(tokens_1SD: torch.Tensor, facts: Sequence[Fact]) -> list[float]:
            questions, answers = [fact.question for fact in facts], [fact.answer for fact in facts]
            return likelihoods(self.trunk, self.text_tokenizer, tokens_1SD, questions, answers)

        return lambda rows, latents: reader.shortfalls(latents, [asked[i] for i in rows], believe)
