"""`UnderstandingPipeline`: questions about pictures, and descriptions.

Design choices
- A question may have any wording: it is parsed into a query, which is answered by questions that the model was trained
  on (`mm.world.asking`). A question in a trained wording about something that is there goes to the model as it is.
- A question that is not understood gets a reply that says so, and a warning; no answer is empty.
- Understanding tokens are part of the trunk's text, in the same format as in training (`mm.models.dialogue`), and the
  text head answers word by word. Decoding is greedy, so that an answer is repeatable.
- Rows of a batch are padded on the left, and positions count real tokens: an answer does not depend on its batch.
- Whether a picture is outside of the model's domain is decided by the connector's statistics of training pictures
  (`domain_distance`); by the autoencoder's reconstruction where it has none. `outside` says so.

Legend: B rows, T tokens, S understanding tokens, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - diffusers expects the name in our modules
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from transformers import PreTrainedTokenizerFast

from mm.core.errors import UserError
from mm.core.paths import resolve_model
from mm.models.connectors import Connector
from mm.models.dialogue import Dialogue, detokenize
from mm.models.trunk import Trunk
from mm.models.understanding_encoder import UnderstandingEncoder
from mm.pipelines.answers import UnderstandingOutput, paired
from mm.pipelines.domain import are_outside, size_notes
from mm.pipelines.loading import SharedFolderMixin
from mm.pipelines.pictures import open_picture, to_tensor
from mm.pipelines.prompt_encoding import left_padded
from mm.pipelines.questions import read_questions
from mm.pipelines.unified import UnifiedUnderstandingPipeline, kind_at
from mm.world.asking.plans import plan, run


class UnderstandingPipeline(SharedFolderMixin, DiffusionPipeline):
    """Answers questions about pictures."""

    model_cpu_offload_seq = "understanding_encoder->understanding_connector->trunk"

    def __init__(
        self,
        text_tokenizer: PreTrainedTokenizerFast,
        trunk: Trunk,
        understanding_encoder: UnderstandingEncoder,
        understanding_connector: Connector,
    ) -> None:
        super().__init__()
        self.register_modules(
            text_tokenizer=text_tokenizer,
            trunk=trunk,
            understanding_encoder=understanding_encoder,
            understanding_connector=understanding_connector,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> UnderstandingPipeline:
        """An embedded model by name, a diffusers folder, or a hub name. Only safetensors files are read."""
        where = resolve_model(pretrained_model_name_or_path)
        if kind_at(where, kwargs) is not None:
            if cls is not UnderstandingPipeline:
                raise UserError(f"{where} is a public unified model, which {cls.__name__} cannot use")
            return UnifiedUnderstandingPipeline.from_pretrained(where, **kwargs)
        if isinstance(where, Path) and not (where / "understanding_encoder" / "config.json").is_file():
            raise UserError(f"{where} holds no understanding_encoder: this model draws, but cannot read pictures")
        return super().from_pretrained(where, **(kwargs | {"use_safetensors": True}))

    @torch.no_grad()
    def __call__(
        self, image: Any, question: str | Sequence[str] | None = None, *, max_words: int = 48
    ) -> UnderstandingOutput:
        """Answers questions about pictures.

        Args:
            image: A path or a PIL picture of any size and mode, or a list of them.
            question: One question or a list; by default a description. Lists of both go pairwise.
            max_words: The longest answer in words.

        Returns:
            The answers, and whether each picture is outside of the model's domain.

        Raises:
            UserError: A picture cannot be read, a question is empty, or lists of different lengths.

        Warns:
            UserWarning: A question is not understood; its answer then says what can be asked. A picture is cropped, or
                read at another size.
        """
        pictures, questions = paired(image, question)
        queries = read_questions(questions, self.text_tokenizer)
        side = self.understanding_encoder.config.image_size
        opened = [open_picture(picture) for picture in pictures]
        for line in dict.fromkeys(line for picture in opened for line in size_notes(picture.size, side)):
            warnings.warn(line, stacklevel=3)
        pixels = to_tensor(opened, side).to(self._execution_device)
        plain, tokens = self._tokens(pixels)
        outside = are_outside(self.understanding_connector, plain) or [False] * len(opened)
        answers = run(list(map(plan, queries)), lambda rows, asked: self._answer(tokens[rows], asked, max_words))
        return UnderstandingOutput(answers=answers, outside=outside)

    def answer(self, pictures: Sequence[Any], questions: Sequence[str]) -> list[str]:
        """One answer a pair."""
        return self(pictures, questions).answers

    def describe(self, pictures: Sequence[Any]) -> list[str]:
        """One description a picture."""
        return self(pictures).answers

    @torch.no_grad()
    def model_answers(self, pictures: Sequence[Any], questions: Sequence[str], *, max_words: int = 48) -> list[str]:
        """The model's own answer to each pair, whatever the wording; no question is parsed."""
        pixels = to_tensor(list(pictures), self.understanding_encoder.config.image_size).to(self._execution_device)
        return self._answer(self.understanding_tokens(pixels), questions, max_words)

    def understanding_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """Understanding tokens (B, S, D) of pictures (B, 3, H, W) in [-1, 1], with counts where there is a counter."""
        return self._tokens(pixels)[1]

    def _tokens(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The encoder's tokens (B, L, W), and the understanding tokens that the trunk reads."""
        tokens = self.understanding_encoder(pixels.to(self.understanding_encoder.dtype))[1]
        return tokens, self.understanding_connector(tokens.to(self.understanding_connector.dtype))

    def _answer(self, tokens: torch.Tensor, questions: Sequence[str], max_words: int) -> list[str]:
        """The model's answers; `tokens` (B, S, D) are the understanding tokens of each question's picture."""
        return _answers(self.trunk, self.text_tokenizer, tokens, questions, max_words)


def answers_about(
    trunk: Trunk, tokenizer: PreTrainedTokenizerFast, tokens_1SD: torch.Tensor, questions: Sequence[str],
    max_words: int = 48,
) -> list[str]:  # fmt: skip
    """The model's own answers to questions about one picture.

    Args:
        trunk: A trunk with a text head.
        tokenizer: The text tokenizer.
        tokens_1SD: Understanding tokens of the picture.
        questions: In trained wordings.
        max_words: The longest answer.
    """
    return _answers(trunk, tokenizer, tokens_1SD.expand(len(questions), -1, -1), questions, max_words)


@torch.no_grad()
def likelihoods(
    trunk: Trunk, tokenizer: PreTrainedTokenizerFast, tokens_1SD: torch.Tensor, questions: Sequence[str],
    answers: Sequence[str],
) -> list[float]:  # fmt: skip
    """How likely each answer is to a question about one picture: the probability of its first word.

    Args:
        trunk: A trunk with a text head.
        tokenizer: The text tokenizer.
        tokens_1SD: Understanding tokens of the picture.
        questions: In trained wordings.
        answers: One a question, in the model's words.
    """
    ids, mask = _asked(tokenizer, tokens_1SD, questions)
    logits_BTV, _ = trunk.read(ids, mask, tokens_1SD.expand(len(questions), -1, -1))
    first = torch.tensor([tokenizer(answer, add_special_tokens=False).input_ids[0] for answer in answers])
    chances_BV = logits_BTV[:, -1, : len(tokenizer)].float().softmax(-1).cpu()
    return chances_BV[torch.arange(len(first)), first].tolist()


def _answers(
    trunk: Trunk, tokenizer: PreTrainedTokenizerFast, tokens_BSD: torch.Tensor, questions: Sequence[str], max_words: int
) -> list[str]:  # fmt: skip
    """Answers to questions, each about the picture of its understanding tokens."""
    ids, mask = _asked(tokenizer, tokens_BSD, questions)
    return generate(trunk, tokenizer, ids, mask, tokens_BSD, max_words)


def _asked(
    tokenizer: PreTrainedTokenizerFast, tokens_BSD: torch.Tensor, questions: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Token ids (B, T) of questions about pictures, up to where the replies begin, and which of them are real."""
    rows = [Dialogue(tokenizer, tokens_BSD.shape[1]).user(question, None).ids for question in questions]
    return left_padded(rows, tokens_BSD.device)


def generate(
    trunk: Trunk,
    tokenizer: PreTrainedTokenizerFast,
    ids: torch.Tensor,
    mask: torch.Tensor,
    understanding: torch.Tensor | None,
    max_words: int,
) -> list[str]:
    """Decodes a reply for every row, greedily, up to `<end>` or `<image>`.

    Args:
        trunk: A trunk with a text head.
        tokenizer: The text tokenizer.
        ids: Prompts (B, T), padded on the left.
        mask: Which tokens are real (B, T).
        understanding: Understanding tokens of the pictures in the prompts.
        max_words: The longest reply.
    """
    known = tokenizer.get_vocab()
    end, image = known["<end>"], known["<image>"]
    replies: list[list[int]] = [[] for _ in ids]
    running = torch.ones(len(ids), dtype=torch.bool)
    logits, state = trunk.read(ids, mask, understanding)
    for _ in range(max_words):
        best = logits[:, -1, : len(tokenizer)].float().argmax(-1)  # rows beyond the vocabulary are no words
        running &= (best != end).cpu() & (best != image).cpu()
        if not running.any():
            break
        for row in running.nonzero().flatten().tolist():
            replies[row].append(int(best[row]))
        logits, state = trunk.read(best[:, None], running[:, None].to(ids.device), past=state)
    return [detokenize(tokenizer.convert_ids_to_tokens(row)) for row in replies]
