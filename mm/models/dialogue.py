"""How a conversation is written as tokens: one form for training and for every pipeline that reads.

Design choices
- `<bos>`, then turns: `<user>` [looks of a picture the user gives] words `<mm>` reply `<end>`. A reply is words, or
  `<image>` followed by the looks of what was drawn. What the model has to say itself is marked as learned: replies,
  `<image>` and `<end>`; never looks or the user's words.
- A prompt for drawing ends with `<image>` (or `<codes>`): it has read all that came before.
- Pictures are whatever the caller makes looks of, in reading order; this module only keeps their places.

This module does not know the trunk, pictures or how a reply is chosen.
Legend: B dialogues, T tokens, V words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100  # cross_entropy's word for "no target"
_TIGHT = {",", ".", "?", "!", ":", ";", ")", "'"}


class Dialogue:
    """A conversation that grows turn by turn.

    `ids` are its tokens, `learned` which of them the model says itself, `about` what the words of the user's turns
    speak of, and `told` what is described by the words of a reply.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, looks: int = 16) -> None:
        self.tokenizer, self.looks = tokenizer, looks
        self.ids: list[int] = []
        self.learned: list[bool] = []
        self.pictures: list[Any] = []
        self.about: list[Any] = []
        self.told: list[Any] = []
        self.add([self.token("<bos>")])

    def __len__(self) -> int:
        return len(self.ids)

    def token(self, name: str) -> int:
        """The id of a special token."""
        return int(self.tokenizer.convert_tokens_to_ids(name))  # pyright: ignore[reportArgumentType]

    def user(self, text: str, *pictures: Any, about: Any = None) -> Dialogue:
        """The user's turn, up to where the reply begins; `about` is whatever its words speak of."""
        self.add([self.token("<user>")])
        for picture in pictures:
            self._look(picture)
            if len(pictures) > 1:
                self.add(self._words(","))  # looks of two pictures must not run together
        self.add(self._words(text), about=about)
        self.add([self.token("<mm>")])
        return self

    def says(self, text: str, told: Any = None) -> Dialogue:
        """A reply in words; `told` is whatever they describe."""
        self.add(self._words(text), learned=True, told=told)
        self.add([self.token("<end>")], learned=True)
        return self

    def starts_drawing(self, mode: str = "flow") -> Dialogue:
        """The token after which a picture is drawn; then the ids are the prompt of that picture."""
        self.add([self.token("<image>" if mode == "flow" else "<codes>")], learned=True)
        return self

    def has_drawn(self, picture: Any) -> Dialogue:
        """The picture that was drawn, which ends the reply."""
        self._look(picture)
        self.add([self.token("<end>")], learned=True)
        return self

    def _look(self, picture: Any) -> None:
        self.pictures.append(picture)
        self.add([self.token("<look>")] * self.looks)

    def _words(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def add(self, ids: Sequence[int], learned: bool = False, about: Any = None, told: Any = None) -> None:
        """Tokens as they are."""
        self.ids += ids
        self.learned += [learned] * len(ids)
        self.about += [about] * len(ids)
        self.told += [told] * len(ids)

    def rewind(self, tokens: int, pictures: int) -> None:
        """Back to when it was `tokens` long and had `pictures`."""
        for row in (self.ids, self.learned, self.about, self.told):
            del row[tokens:]
        del self.pictures[pictures:]


def stack(dialogues: Sequence[Dialogue]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids (B, T), which are real (B, T), and for each token the next one where it is learned, else `IGNORED`."""
    longest = max(map(len, dialogues))
    ids = torch.zeros(len(dialogues), longest, dtype=torch.int64)
    mask = torch.zeros(len(dialogues), longest, dtype=torch.bool)
    targets = torch.full((len(dialogues), longest), IGNORED)
    for row, dialogue in enumerate(dialogues):
        length = len(dialogue)
        ids[row, :length], mask[row, :length] = torch.tensor(dialogue.ids), True
        following, learned = ids[row, 1:length], torch.tensor(dialogue.learned[1:], dtype=torch.bool)
        targets[row, : length - 1][learned] = following[learned]
    return ids, mask, targets


@dataclass(frozen=True, kw_only=True, slots=True)
class WordKinds:
    """Words that exclude each other: `of_V` names each word's kind (-1: none), `spread_KV` shares 1 among a kind's."""

    of_V: torch.Tensor
    spread_KV: torch.Tensor


def word_loss(
    logits_BTV: torch.Tensor, targets_BT: torch.Tensor, kinds: WordKinds | None = None, smoothing: float = 0.1
) -> torch.Tensor:
    """Mean cross-entropy of the words that a model has to say itself.

    With `kinds`, `smoothing` of a target goes to all words of its kind (label smoothing, Szegedy et al. 2015, arXiv
    1512.00567, within a kind).
    """
    if kinds is None:
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED)
    said_N = targets_BT[targets_BT != IGNORED]
    logs_NV = logits_BTV[targets_BT != IGNORED].float().log_softmax(-1)
    loss_N = -logs_NV.gather(1, said_N[:, None]).squeeze(1)
    kind_N = kinds.of_V[said_N]
    spread_N = -(kinds.spread_KV[kind_N.clamp_min(0)] * logs_NV).sum(-1)
    return torch.where(kind_N < 0, loss_N, (1 - smoothing) * loss_N + smoothing * spread_N).mean()


def spoken(words: Sequence[str]) -> str:
    """Words and marks as a line of text."""
    line = ""
    for word in words:
        line += word if not line or word in _TIGHT else f" {word}"
    return line
