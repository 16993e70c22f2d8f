"""How a conversation is written as tokens: one format for training and for every pipeline that reads.

Design choices
- `<bos>`, then turns: `<user>` [understanding tokens of a given picture] words `<mm>` reply `<end>`. A reply is words,
  or `<image>` followed by the understanding tokens of the drawn picture. What the model has to generate itself is
  marked as learned: replies, `<image>` and `<end>`; never understanding tokens or the user's words.
- A prompt for drawing ends with `<image>` (or `<codes>`), so that it contains everything before it.
- `<look>` is the placeholder of an understanding token. Pictures are kept as opaque values in reading order; the caller
  encodes them.

Legend: B dialogues, T tokens, V words, N learned tokens, K kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100  # cross_entropy's ignore_index
PLACEHOLDER = "<look>"  # the token string in published tokenizers
_TIGHT = {",", ".", "?", "!", ":", ";", ")", "'"}


class Dialogue:
    """A conversation that grows turn by turn.

    Attributes:
        ids: The tokens.
        learned: Which tokens the model generates itself.
        pictures: The pictures in reading order, as the caller gave them.
        about: For each token of a user's turn, the scene that its words refer to.
        describes: For each token of a reply, the scene that its words describe.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, tokens_per_picture: int = 16) -> None:
        self.tokenizer, self.tokens_per_picture = tokenizer, tokens_per_picture
        self.ids: list[int] = []
        self.learned: list[bool] = []
        self.pictures: list[Any] = []
        self.about: list[Any] = []
        self.describes: list[Any] = []
        self.add([self.token("<bos>")])

    def __len__(self) -> int:
        return len(self.ids)

    def token(self, name: str) -> int:
        """The id of a special token."""
        return int(self.tokenizer.convert_tokens_to_ids(name))  # pyright: ignore[reportArgumentType]

    def user(self, text: str, *pictures: Any, about: Any = None) -> Dialogue:
        """Adds a user's turn, up to where the reply begins; `about` is what its words refer to."""
        self.add([self.token("<user>")])
        for picture in pictures:
            self._add_picture(picture)
            if len(pictures) > 1:
                self.add(self._words(","))  # tokens of two pictures must not form one block
        self.add(self._words(text), about=about)
        self.add([self.token("<mm>")])
        return self

    def says(self, text: str, describes: Any = None) -> Dialogue:
        """Adds a reply in words; `describes` is what they describe."""
        self.add(self._words(text), learned=True, describes=describes)
        self.add([self.token("<end>")], learned=True)
        return self

    def starts_drawing(self, mode: str = "flow") -> Dialogue:
        """Adds the token after which a picture is drawn; then the ids are the prompt of that picture."""
        self.add([self.token("<image>" if mode == "flow" else "<codes>")], learned=True)
        return self

    def has_drawn(self, picture: Any) -> Dialogue:
        """Adds the drawn picture, which ends the reply."""
        self._add_picture(picture)
        self.add([self.token("<end>")], learned=True)
        return self

    def _add_picture(self, picture: Any) -> None:
        self.pictures.append(picture)
        self.add([self.token(PLACEHOLDER)] * self.tokens_per_picture)

    def _words(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def add(self, ids: Sequence[int], learned: bool = False, about: Any = None, describes: Any = None) -> None:
        """Adds tokens as they are."""
        self.ids += ids
        self.learned += [learned] * len(ids)
        self.about += [about] * len(ids)
        self.describes += [describes] * len(ids)

    def rewind(self, tokens: int, pictures: int) -> None:
        """Restores the state in which it had this many tokens and pictures."""
        for row in (self.ids, self.learned, self.about, self.describes):
            del row[tokens:]
        del self.pictures[pictures:]


def stack(dialogues: Sequence[Dialogue]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask of real tokens, and targets (the next token where it is learned, else `IGNORED`), each (B, T)."""
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
    """Groups of mutually exclusive words, such as numbers.

    Attributes:
        of_V: The group of each word, -1 for none.
        spread_KV: For each group, the uniform distribution over its words.
    """

    of_V: torch.Tensor
    spread_KV: torch.Tensor


def word_loss(
    logits_BTV: torch.Tensor, targets_BT: torch.Tensor, kinds: WordKinds | None = None, smoothing: float = 0.1
) -> torch.Tensor:
    """Mean cross-entropy of the learned tokens.

    With `kinds`, labels are smoothed within a group only: `smoothing` of a target's probability goes to all words of
    its group (label smoothing, Szegedy et al. 2015, arXiv 1512.00567).
    """
    if kinds is None:
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED)
    targets_N = targets_BT[targets_BT != IGNORED]
    logs_NV = logits_BTV[targets_BT != IGNORED].float().log_softmax(-1)
    loss_N = -logs_NV.gather(1, targets_N[:, None]).squeeze(1)
    kind_N = kinds.of_V[targets_N]
    spread_N = -(kinds.spread_KV[kind_N.clamp_min(0)] * logs_NV).sum(-1)
    return torch.where(kind_N < 0, loss_N, (1 - smoothing) * loss_N + smoothing * spread_N).mean()


def detokenize(words: Sequence[str]) -> str:
    """Words and punctuation marks as a line of text."""
    line = ""
    for word in words:
        line += word if not line or word in _TIGHT else f" {word}"
    return line
