"""Base of the families of public unified models: prompts through the processor, and reading through `generate`.

Design choices
- Reading is transformers' `generate`, greedy, with rows padded on the left, so that an answer is repeatable and does
  not depend on its batch.
- Words that the tokenizer takes for control tokens (`<begin_of_image>`) are refused in prompts and questions: they
  would shift pictures or stop them midway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from mm.core.errors import UserError


class PublicModel:
    """A model and its processor. Families add how to draw."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    def check_words(self, texts: Sequence[str]) -> None:
        """Raises UserError for texts that hold control tokens."""
        tokens = self.processor.tokenizer
        added = tokens.added_tokens_decoder
        for text in texts:
            for number in tokens(text, add_special_tokens=False).input_ids:
                # An unknown word becomes a control token as well, but does not spell one.
                if number in added and added[number].special and added[number].content in text:
                    raise UserError(
                        f"{text[:60]!r} holds the model's control token {added[number].content!r}; leave it out"
                    )

    def chat(self, content: list[dict[str, str]]) -> str:
        """One turn of the user in the processor's chat template, up to where the reply begins."""
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

    def unit(self, pictures_BCHW: torch.Tensor) -> torch.Tensor:
        """Pictures with the processor's normalization undone: about 0 to 1, float32."""
        mean_std = _mean_std(self.processor.image_processor)
        mean, std = (pictures_BCHW.new_tensor(x, dtype=torch.float32)[:, None, None] for x in mean_std)
        return pictures_BCHW.float() * std + mean


def _mean_std(processor: Any) -> tuple[Sequence[float], Sequence[float]]:
    return (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
