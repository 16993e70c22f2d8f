"""Numbers in replies are copied from what a counter counted, not recalled.

Design choices
- How many is learned together with of what: a model that never saw three clocks doubts three of clocks, however clearly
  they are seen. So among the words of number, and only among them, the choice is made by a pointer to a look and that
  look's number, through a fixed table (a pointer-generator, See et al. 2017, arXiv 1704.04368); how much a number is
  to be said at all stays the language model's own.
- A gate says how far to copy: what no single look shows (animals of two kinds, together) is still the model's own.
- Of words for the same number ("a", "one") the model's own odds decide.

This module does not know who counts, nor what the words are.
Legend: B rows, T tokens, A all tokens so far, D width, E keys' width, V words, K numbers, W words of number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mm.models import layers

GATE_BIAS = 2.0  # copying is the rule from the start
Offered = tuple[torch.Tensor, torch.Tensor]


class NumberCopy(nn.Module):
    """The pointer, the gate and the table; `words[k]` are the token ids that say k + 1."""

    def __init__(self, width: int, words: Sequence[Sequence[int]], keys: int = 32) -> None:
        super().__init__()
        self.key_out = nn.Linear(width, keys)
        self.query_out = nn.Linear(width, keys)
        self.gate_out = nn.Linear(width, 1)
        self.words = [[int(word) for word in same] for same in words]

    def init_gate(self) -> None:
        """Copies nearly always, whatever is said."""
        layers.zero(self.gate_out)
        nn.init.constant_(self.gate_out.bias, GATE_BIAS)

    def offer(
        self, states_BTD: torch.Tensor, places_BT: torch.Tensor, numbers_NSK: torch.Tensor | None, most: int
    ) -> Offered:
        """What later words can point at: keys (B, T, E), and (B, T, 1 + K) "is a look" and its number, one-hot."""
        marks_BTK = states_BTD.new_zeros(*places_BT.shape, 1 + most, dtype=torch.float32)
        if numbers_NSK is not None:
            shown = F.pad(numbers_NSK.float(), (1, 0), value=1.0)
            marks_BTK = marks_BTK.masked_scatter(places_BT[..., None], shown)
        return self.key_out(states_BTD).float(), marks_BTK

    def forward(self, logits_BTV: torch.Tensor, states_BTD: torch.Tensor, offered: Offered) -> torch.Tensor:
        """Logits with those of number words chosen anew; the last T of the A tokens are the ones that speak."""
        keys_BAE, marks_BAK = offered
        is_look_BA, numbers_BAK = marks_BAK[..., 0] > 0, marks_BAK[..., 1:]
        if not bool(is_look_BA.any()):
            return logits_BTV
        length, total = states_BTD.shape[1], keys_BAE.shape[1]
        order = torch.arange(total, device=keys_BAE.device)
        open_BTA = is_look_BA[:, None] & (order[None] <= order[total - length :, None])
        scores_BTA = self.query_out(states_BTD).float() @ keys_BAE.transpose(1, 2) / keys_BAE.shape[-1] ** 0.5
        weights_BTA = scores_BTA.masked_fill(~open_BTA, -1e4).softmax(-1) * open_BTA
        numbers_BTK = weights_BTA @ numbers_BAK
        gate_BT1 = self.gate_out(states_BTD).float().sigmoid()

        ids = torch.tensor([word for same in self.words for word in same], device=logits_BTV.device)
        which = torch.tensor([k for k, same in enumerate(self.words) for _ in same], device=logits_BTV.device)
        own_BTW = logits_BTV[..., ids].float()
        mass_BT1, odds_BTW = own_BTW.logsumexp(-1, keepdim=True), own_BTW.softmax(-1)
        same_WW = (which[:, None] == which).float()
        among_BTW = odds_BTW / (odds_BTW @ same_WW).clamp_min(1e-9)
        copied_BTW = gate_BT1 * numbers_BTK[..., which] * among_BTW
        left_BT1 = 1 - copied_BTW.sum(-1, keepdim=True)
        chosen_BTW = mass_BT1 + (copied_BTW + left_BT1 * odds_BTW).clamp_min(1e-6).log()
        return logits_BTV.index_copy(-1, ids, chosen_BTW.to(logits_BTV.dtype))


def number_bumps(numbers_BS: torch.Tensor, most: int) -> torch.Tensor:
    """Numbers as weights (B, S, K) on the whole ones around them: 2.5 is half two and half three; 0 is nothing."""
    steps = torch.arange(1, most + 1, device=numbers_BS.device)
    return (1 - (numbers_BS[..., None] - steps).abs()).clamp_min(0)
