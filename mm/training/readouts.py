"""Auxiliary losses on the text stream: linear readouts of hidden states predict labels of the scene.

Design choices
- Grounding losses: an answer trains one word, while the renderer knows object, count, position and colour of every
  noun. So a linear readout of a middle text layer predicts count, columns, rows and colour for each noun of the user
  (`NounReadout`), as the drawing stage's alignment loss does for the cells of a picture.
- "Is the cat left of the dog?" is an exclusive or of word order and two positions, which the answer's gradient alone
  does not find. So a readout of a later layer predicts the relation of two nouns (`RelationReadout`).
- A description lists group after group. A readout of the tokens before each noun predicts that next noun
  (`NounReadout` with `names`).
- Counting needs the contents of a picture in the understanding tokens in an additive form. So a readout of these tokens
  predicts the objects and colours whose centres they hold (`TokenReadout`).
- Readouts are training state and are not published.

Legend: B rows, T tokens, N nouns or understanding tokens, D width, P pictures, S understanding tokens a picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from mm.models import layers
from mm.models.dialogue import IGNORED
from mm.training.scene_labels import CELLS, NounLabels, UnderstandingTokenLabels
from mm.world import vocabulary as v

SIZES = (v.MAX_COUNT + 1, CELLS, CELLS, len(v.COLOURS) + 1)  # count, columns, rows, colour (the last is natural)


def same_kind_loss(same_PSS: torch.Tensor, labels_PSS: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of same-kind probabilities, summed over a token's row and averaged over tokens."""
    same = same_PSS.float().clamp(1e-4, 1 - 1e-4)
    return -(labels_PSS * same.log() + (1 - labels_PSS) * (1 - same).log()).sum(-1).mean()


class RelationReadout(nn.Module):
    """Predicts the relations of two nouns of a turn."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = layers.Norm(width)
        self.readout = nn.Linear(width, len(v.RELATIONS))

    def forward(self, states_BTD: torch.Tensor, nouns: NounLabels) -> torch.Tensor:
        """The mean loss over paired nouns; zero, with a gradient path, without any."""
        if not bool(nouns.paired_N.any()):
            return states_BTD.sum() * 0
        states = states_BTD.flatten(0, 1)[nouns.places_N[nouns.paired_N]]
        logits = self.readout(self.norm(states)).float()
        return F.binary_cross_entropy_with_logits(logits, nouns.relations_NR[nouns.paired_N])


class TokenReadout(nn.Module):
    """Predicts objects and colours of understanding tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = layers.Norm(width)
        self.readout = nn.Linear(width, len(v.ALL_OBJECTS) + len(v.COLOURS) + 1)

    def forward(self, states_BTD: torch.Tensor, labels: UnderstandingTokenLabels) -> torch.Tensor:
        """The mean loss over understanding tokens; zero, with a gradient path, without any."""
        if not len(labels.places_N):
            return states_BTD.sum() * 0
        out = self.readout(self.norm(states_BTD.flatten(0, 1)[labels.places_N])).float()
        wanted = torch.cat([labels.centres_NO, labels.colours_NK], 1)
        return F.binary_cross_entropy_with_logits(out, wanted, reduction="none").sum(-1).mean()


class NounReadout(nn.Module):
    """Predicts count, columns, rows and colour of nouns; with `names` also the object, for the next noun."""

    def __init__(self, width: int, *, names: bool = False) -> None:
        super().__init__()
        self.sizes = (*SIZES, len(v.ALL_OBJECTS)) if names else SIZES
        self.norm = layers.Norm(width)  # hidden states are not normalized
        self.readout = nn.Linear(width, sum(self.sizes))

    def forward(self, states_BTD: torch.Tensor, nouns: NounLabels) -> torch.Tensor:
        """The mean loss over nouns; zero, with a gradient path, without any."""
        if not len(nouns.places_N):
            return states_BTD.sum() * 0
        out = self.readout(self.norm(states_BTD.flatten(0, 1)[nouns.places_N])).float()
        counts, columns, rows, colours, *objects = out.split(list(self.sizes), -1)
        here = (nouns.counts_N > 0).float()  # an absent object has no position
        grid = F.binary_cross_entropy_with_logits(columns, nouns.columns_NC, reduction="none")
        grid = grid + F.binary_cross_entropy_with_logits(rows, nouns.rows_NC, reduction="none")
        loss = F.cross_entropy(counts, nouns.counts_N) + (grid.sum(-1) * here).mean()
        if bool((nouns.colours_N != IGNORED).any()):
            loss = loss + F.cross_entropy(colours, nouns.colours_N, ignore_index=IGNORED)
        for logits in objects:
            loss = loss + F.cross_entropy(logits, nouns.objects_N)
        return loss


@contextmanager
def captured_outputs(layer: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Within the context, the output tokens of a text layer are collected."""
    states: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda _module, _args, out: states.append(out[0]))
    try:
        yield states
    finally:
        handle.remove()
