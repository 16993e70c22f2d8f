"""`UnderstandingPipeline`: questions about pictures, and descriptions.

Design choices
- The understanding encoder's tokens enter the trunk's text as looks, in the very form that training used
  (`mm.models.dialogue`), and the text head answers word by word: the likeliest one, so that an answer is repeatable.
- Rows of a batch are padded on the left, and positions count real tokens: alone or in company, the answer is the same.
- How far a picture lies outside the model's world is measured by what the generation tokenizer makes of it: its own
  world comes back at 25 dB and more, anything else far worse. Beyond the threshold the answer says so.

This module does not know the command line, or how looks are trained.
Legend: B rows, T tokens, V words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - diffusers looks for the name in our modules
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.outputs import BaseOutput
from transformers import PreTrainedTokenizerFast

from mm.core.errors import UserError
from mm.core.paths import resolve_model
from mm.models.connectors import Connector
from mm.models.dialogue import Dialogue, spoken
from mm.models.trunk import Trunk
from mm.models.understanding import UnderstandingEncoder
from mm.pipelines.loading import SharedFolderMixin
from mm.pipelines.pictures import to_tensor
from mm.pipelines.prompts import check_prompts
from mm.tokenizers import Autoencoder

DESCRIBE = "describe the picture"
OUTSIDE_BELOW = 21.0  # dB of the tokenizer's reconstruction; see docs/reading.md for how it was chosen


@dataclass
class UnderstandingOutput(BaseOutput):
    """Answers, and for each picture whether it lies outside the model's world (PSNR of its reconstruction, dB)."""

    answers: list[str]
    outside: list[bool]
    psnr: list[float]


class UnderstandingPipeline(SharedFolderMixin, DiffusionPipeline):
    """Answers questions about pictures."""

    _optional_components = ["autoencoder"]  # noqa: RUF012

    def __init__(
        self,
        text_tokenizer: PreTrainedTokenizerFast,
        trunk: Trunk,
        understanding_encoder: UnderstandingEncoder,
        look_connector: Connector,
        autoencoder: Autoencoder | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            text_tokenizer=text_tokenizer,
            trunk=trunk,
            understanding_encoder=understanding_encoder,
            look_connector=look_connector,
            autoencoder=autoencoder,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> UnderstandingPipeline:
        """An embedded model by name, a diffusers folder, or a hub name. Only safetensors files are read."""
        # Late: that module imports this one.
        from mm.pipelines.unified import UnifiedUnderstandingPipeline, kind_at

        where = resolve_model(pretrained_model_name_or_path)
        if kind_at(where, kwargs) is not None:
            if cls is not UnderstandingPipeline:
                raise UserError(f"{where} is a public unified model; {cls.__name__} has no use for it")
            return UnifiedUnderstandingPipeline.from_pretrained(where, **kwargs)
        if isinstance(where, Path) and not (where / "understanding_encoder" / "config.json").is_file():
            raise UserError(f"{where} holds no understanding_encoder: this model draws, but cannot read pictures")
        return super().from_pretrained(where, **(kwargs | {"use_safetensors": True}))

    @torch.no_grad()
    def __call__(
        self, image: Any, question: str | Sequence[str] | None = None, *, max_words: int = 48
    ) -> UnderstandingOutput:
        """Answers `question` (default: a description) about `image`; lists of both go pairwise.

        Pictures are paths or PIL pictures of any size and mode. Raises UserError for what cannot be read.
        """
        pictures = list(image) if isinstance(image, (list, tuple)) else [image]
        asked = [DESCRIBE if question is None else question] if isinstance(question, str | None) else list(question)
        asked = asked * len(pictures) if len(asked) == 1 else asked
        pictures = pictures * len(asked) if len(pictures) == 1 else pictures
        if len(asked) != len(pictures):
            raise UserError(f"{len(pictures)} pictures and {len(asked)} questions; give as many, or a single one")
        check_prompts(asked, self.text_tokenizer)
        seen = to_tensor(pictures, self.understanding_encoder.config.image_size).to(self._execution_device)
        psnr = self._psnr(seen)
        answers = self._answer(seen, asked, max_words)
        return UnderstandingOutput(answers=answers, outside=[p < OUTSIDE_BELOW for p in psnr], psnr=psnr)

    def answer(self, pictures: Sequence[Any], questions: Sequence[str]) -> list[str]:
        """One answer a pair."""
        return self(list(pictures), list(questions)).answers

    def describe(self, pictures: Sequence[Any]) -> list[str]:
        """One description a picture."""
        return self(list(pictures)).answers

    def looks(self, seen: torch.Tensor) -> torch.Tensor:
        """Looks (B, S, D) of pictures in [-1, 1]."""
        tokens = self.understanding_encoder(seen.to(self.understanding_encoder.dtype))[1]
        return self.look_connector(tokens.to(self.look_connector.dtype))

    def _psnr(self, seen: torch.Tensor) -> list[float]:
        if self.autoencoder is None:
            return [float("inf")] * len(seen)
        wide = seen.to(self.autoencoder.dtype)
        back = self.autoencoder.decode(self.autoencoder.encode(wide)).float().clamp(-1, 1)
        squares = ((back - seen.float()) / 2).square().flatten(1).mean(1).clamp_min(1e-10)
        return (-10 * squares.log10()).tolist()

    def _answer(self, seen: torch.Tensor, questions: Sequence[str], most: int) -> list[str]:
        looks = self.looks(seen)
        rows = [Dialogue(self.text_tokenizer, looks.shape[1]).user(q, None).ids for q in questions]
        ids, mask = left_padded(rows, self._execution_device)
        return generate(self.trunk, self.text_tokenizer, ids, mask, looks, most)


def left_padded(rows: Sequence[Sequence[int]], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token rows as ids and mask (B, T), aligned at their ends."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = torch.tensor(row), True
    return ids.to(device), mask.to(device)


def generate(
    trunk: Trunk,
    tokenizer: PreTrainedTokenizerFast,
    ids: torch.Tensor,
    mask: torch.Tensor,
    looks: torch.Tensor | None,
    most: int,
) -> list[str]:
    """The likeliest reply of every row, word by word, up to `<end>`."""
    known = tokenizer.get_vocab()
    end, image = known["<end>"], known["<image>"]
    said: list[list[int]] = [[] for _ in ids]
    running = torch.ones(len(ids), dtype=torch.bool)
    logits, state = trunk.read(ids, mask, looks)
    for _ in range(most):
        best = logits[:, -1, : len(tokenizer)].float().argmax(-1)  # rows beyond the vocabulary are no words
        running &= (best != end).cpu() & (best != image).cpu()
        if not running.any():
            break
        for row in running.nonzero().flatten().tolist():
            said[row].append(int(best[row]))
        logits, state = trunk.read(best[:, None], running[:, None].to(ids.device), past=state)
    return [spoken(tokenizer.convert_ids_to_tokens(row)) for row in said]
