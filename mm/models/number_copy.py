"""Numbers in replies are copied from the counter's counts (a pointer-generator, See et al. 2017, arXiv 1704.04368).

Design choices
- A language model learns counts per object: one that never saw three clocks gives "three" of clocks a low probability.
  So the distribution over number words, and only that, comes from a pointer to an understanding token and the count of
  that token, through a fixed table. The total probability of number words stays the language model's.
- A gate mixes copied and own distribution, since some numbers belong to no single token (animals of two kinds).
- Among words of the same number ("a", "one") the model's own probabilities decide.

Legend: B rows, T tokens, A all tokens so far, N pictures, S understanding tokens, D width, E key width, V words,
K counts, W number words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from mm.models import layers

GATE_BIAS = 2.0  # at the start the gate is nearly open
PointerTargets = tuple[torch.Tensor, torch.Tensor]


class NumberCopy(nn.Module):
    """The pointer, the gate and the table; `words[k]` are the token ids that say k + 1."""

    def __init__(self, width: int, words: Sequence[Sequence[int]], keys: int = 32) -> None:
        super().__init__()
        self.key_out = nn.Linear(width, keys)
        self.query_out = nn.Linear(width, keys)
        self.gate_out = nn.Linear(width, 1)
        self.words = [[int(word) for word in same] for same in words]

    def init_gate(self) -> None:
        """Opens the gate for every token."""
        layers.zero(self.gate_out)
        nn.init.constant_(self.gate_out.bias, GATE_BIAS)

    def pointer_targets(
        self, states_BTD: torch.Tensor, places_BT: torch.Tensor, counts_NSK: torch.Tensor | None, max_count: int
    ) -> PointerTargets:
        """What later words can point at.

        Args:
            states_BTD: Output states of the text stream.
            places_BT: Which tokens are understanding tokens.
            counts_NSK: Weights of the counts of the understanding tokens, in reading order; None where unknown.
            max_count: K.

        Returns:
            Keys (B, T, E), and (B, T, 1 + K): a flag of understanding tokens with counts, then the counts' weights.
        """
        marks_BTK = states_BTD.new_zeros(*places_BT.shape, 1 + max_count, dtype=torch.float32)
        if counts_NSK is not None:
            shown = F.pad(counts_NSK.float(), (1, 0), value=1.0)
            marks_BTK = marks_BTK.masked_scatter(places_BT[..., None], shown)
        return self.key_out(states_BTD).float(), marks_BTK

    def forward(self, logits_BTV: torch.Tensor, states_BTD: torch.Tensor, targets: PointerTargets) -> torch.Tensor:
        """Logits (B, T, V) with the distribution over number words replaced; the T tokens are the last of the A."""
        keys_BAE, marks_BAK = targets
        is_understanding_BA, numbers_BAK = marks_BAK[..., 0] > 0, marks_BAK[..., 1:]
        if not bool(is_understanding_BA.any()):
            return logits_BTV
        length, total = states_BTD.shape[1], keys_BAE.shape[1]
        order = torch.arange(total, device=keys_BAE.device)
        open_BTA = is_understanding_BA[:, None] & (order[None] <= order[total - length :, None])
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


def number_bumps(numbers_BS: torch.Tensor, max_count: int) -> torch.Tensor:
    """Counts (B, S) as interpolation weights (B, S, K) on 1 to K: 2.5 is half two and half three, 0 all zeros."""
    steps = torch.arange(1, max_count + 1, device=numbers_BS.device)
    return (1 - (numbers_BS[..., None] - steps).abs()).clamp_min(0)
