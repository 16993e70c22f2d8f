"""The attention mask of the text stream.

Legend: B batch, T new tokens, A all tokens so far.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def text_mask(
    ids_BT: torch.Tensor, seen_BA: torch.Tensor, understanding_token: int, prompt_BT: torch.Tensor | None = None
) -> torch.Tensor:
    """Which tokens each new token attends to: (B, 1, T, A), True = may attend.

    Causal, except that the understanding tokens of one picture attend to each other, and so do the tokens of one
    prompt. Padding attends to itself, so that no row is empty.

    Args:
        ids_BT: The new tokens.
        seen_BA: Which of all tokens are real.
        understanding_token: Placeholder id of understanding tokens.
        prompt_BT: The number of the prompt that each token belongs to, 0 for none (`prompt_numbers`).
    """
    total = seen_BA.shape[1]
    before = total - ids_BT.shape[1]
    order = torch.arange(total, device=ids_BT.device)
    itself = order[None] == order[before:, None]
    placeholder_BT = ids_BT == understanding_token
    picture_BT = (placeholder_BT & ~F.pad(placeholder_BT[:, :-1], (1, 0))).cumsum(1) * placeholder_BT
    together = _same(picture_BT)
    if prompt_BT is not None:
        together = together | _same(prompt_BT)
    visible = (order[None] <= order[before:, None]) | F.pad(together, (before, 0))
    return ((visible & seen_BA[:, None, :]) | itself)[:, None]


def prompt_numbers(ids_BT: torch.Tensor, start_tokens: Sequence[int], reply_token: int) -> torch.Tensor:
    """(B, T): which prompt, or turn of the user, each token belongs to; 0 in replies."""
    starts = torch.zeros_like(ids_BT, dtype=torch.bool)
    for token in start_tokens:
        starts |= ids_BT == token
    place = torch.arange(1, ids_BT.shape[1] + 1, device=ids_BT.device).expand_as(ids_BT)
    started, replied = (torch.where(marks, place, 0).cummax(1).values for marks in (starts, ids_BT == reply_token))
    return torch.where(started > replied, started, 0)


def _same(group_BT: torch.Tensor) -> torch.Tensor:
    """(B, T, T): whether two tokens are of one group; group 0 is none."""
    return (group_BT[:, :, None] == group_BT[:, None, :]) & (group_BT[:, :, None] > 0)
