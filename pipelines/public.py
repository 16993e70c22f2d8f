"""What families of public unified models share: prompts through the processor, and reading through `generate`.

Design choices
- Reading is transformers' `generate`, greedy, with rows padded on the left: the likeliest token, so that an answer is
  repeatable, alone or in company.
- Words that the tokenizer takes for control tokens (`<begin_of_image>`) are refused in prompts and questions: they
  would shift pictures or stop them midway.

This module does not know a family's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from mm.errors import UserError
from mm.pipelines.token_sampling import Sampling, sample_codes


class PublicModel:
    """A model and its processor. Families add how to draw."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    def check_words(self, texts: Sequence[str]) -> None:
        """Raises UserError for texts that hold control tokens."""
        for text in texts:
            control = [token for token in self.processor.tokenizer.all_special_tokens if token in text]
            if control:
                raise UserError(f"{text[:60]!r} holds the model's control token {control[0]!r}; leave it out")

    def chat(self, content: list[dict[str, str]]) -> str:
        """One user's turn in the processor's chat template, up to where the reply begins."""
        if not self.processor.chat_template:
            raise UserError("this model's folder holds no chat template; copy its chat_template.jinja, too")
        turns = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(turns, add_generation_prompt=True)

    def answer(self, pictures: Sequence[Image.Image], questions: Sequence[str], max_words: int) -> list[str]:
        """One answer a pair."""
        self.check_words(questions)
        texts = [self.chat([{"type": "image"}, {"type": "text", "text": question}]) for question in questions]
        inputs = self.processor(
            text=texts, images=list(pictures), padding=True, padding_side="left", return_tensors="pt"
        ).to(self.model.device, self.model.dtype)
        said = self.model.generate(**inputs, max_new_tokens=max_words, do_sample=False)
        new = said[:, inputs.input_ids.shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    def sample(
        self,
        prompt_RTD: torch.Tensor,
        mask_RT: torch.Tensor,
        generators: Sequence[torch.Generator],
        sampling: Sampling,
        count: int,
    ) -> torch.Tensor:
        """Codes (B, `count`), with a bar."""
        with tqdm(total=count, leave=False) as bar:
            return sample_codes(self, prompt_RTD, mask_RT, generators, sampling, count, bar)  # type: ignore[arg-type]
