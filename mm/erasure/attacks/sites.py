"""How near a prompt's outputs at the edited layers come to what the unchanged model gives for the concept.

Searches over prompts and embeddings need a score that costs no picture. What pictures read of a text are the outputs of
the layers that a patch edits: a prompt whose outputs under the patch equal the old outputs of the target's prompt draws
the target again. This is the quantity that RECE (arXiv 2407.12383) derives its embeddings from.

Legend: B prompts, T tokens, D inputs and N outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mm.adapters.patch import Patch
from mm.core.errors import UserError
from mm.erasure.features import record
from mm.erasure.sites import text_layers
from mm.layers.linear import BranchedLinear


class Sites:
    """The edited layers of a pipeline with the patch, and their weights without it."""

    def __init__(self, pipe: Any, patch: Patch) -> None:
        every = text_layers(pipe)
        self.pipe = pipe
        self.layers: dict[str, nn.Linear] = {path: every[path] for path in every if path in patch.entries}
        if not self.layers:
            self.layers = every
        self.new = {path: weight_of(layer) for path, layer in self.layers.items()}
        patch.scale(pipe, 0.0)
        try:
            self.old = {path: weight_of(layer) for path, layer in self.layers.items()}
        finally:
            patch.scale(pipe, 1.0)

    def wanted(self, prompt: str) -> dict[str, Tensor]:
        """The old outputs (T, N) for a prompt, by path."""
        features = record(self.pipe, self.layers, [prompt])
        return {path: features[path][0] @ self.old[path].T for path in self.layers}

    def distances(self, prompts: Sequence[str], prompt: str, wanted: Mapping[str, Tensor]) -> list[float]:
        """For each prompt the distance of its new outputs to the wanted ones of `prompt`; 0 for equal ones.

        Tokens of `prompt` are found again at the end of each candidate, so that words before them can be searched.
        """
        features = record(self.pipe, self.layers, list(prompts))
        length = count_tokens(self.pipe, prompt)
        shifts = [count_tokens(self.pipe, candidate) - length for candidate in prompts]
        parts = []
        for path in self.layers:
            old = wanted[path][1:length]
            x_BTD = torch.stack([x[1 + k : length + k] for x, k in zip(features[path], shifts, strict=True)])
            gaps_B = (x_BTD @ self.new[path].T - old).square().flatten(1).sum(1)
            parts.append(gaps_B / old.square().sum().clamp_min(1e-30))
        return [float(x) for x in torch.stack(parts).mean(0)]


def weight_of(layer: nn.Linear) -> Tensor:
    """A layer's weight as it acts, float32 on the CPU."""
    weight = layer.effective_weight() if isinstance(layer, BranchedLinear) else layer.weight
    return weight.detach().float().cpu()


def count_tokens(pipe: Any, prompt: str) -> int:
    """Tokens of a prompt, with those that the tokenizer adds."""
    found = next((t for n, t in pipe.components.items() if "tokenizer" in n and callable(t)), None)
    if found is None:
        raise UserError(f"{type(pipe).__name__} has no tokenizer; this attack searches among its words")
    ids = found(prompt).input_ids
    return len(ids[0] if ids and isinstance(ids[0], list) else ids)


def words_of(pipe: Any, banned: Sequence[str], most: int = 4000) -> list[str]:
    """Whole words of the pipeline's tokenizer, without those that hold a banned one."""
    found = next((t for n, t in pipe.components.items() if "tokenizer" in n and callable(t)), None)
    if found is None:
        raise UserError(f"{type(pipe).__name__} has no tokenizer; this attack searches among its words")
    marks = ("</w>", "\u2581", "\u0120")
    words = []
    for word in getattr(found, "tokenizer", found).get_vocab():
        for mark in marks:
            word = word.replace(mark, "")
        if word.isalpha() and word.isascii() and len(word) > 1 and not any(b.lower() in word.lower() for b in banned):
            words.append(word.lower())
    return sorted(set(words))[:most]
