"""DETEX: the subject's row is learned beside rows for each picture's background and pose, which inference leaves out.

Source: Cai et al. 2023, arXiv 2312.11826. A small mapper turns each picture's latents into its background and pose
rows, which are tied to the words for them; what belongs to one picture then need not enter the subject's row.

Legend: B prompts, N pictures, C channels, H x W latents, D width of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mm.adapters.entry import Entry
from mm.customization.batches import encode
from mm.customization.captions import renamed
from mm.customization.methods.protocol import Job, Learner
from mm.customization.pieces import layer_seed
from mm.customization.rows import Rows

ATTRIBUTES = ("background", "pose")
_WIDTH = 64


@dataclass(kw_only=True)
class _Learner(Learner):
    features: Tensor  # (N, F) of the pictures
    mappers: dict[str, nn.Parameter]
    placeholders: dict[str, str]  # attribute: its word
    chosen: Sequence[int] = field(default_factory=tuple)

    @property
    def table(self) -> Rows:
        """The only piece."""
        found = self.pieces[0]
        assert isinstance(found, Rows)
        return found

    def parameters(self) -> dict[str, nn.Parameter]:
        return super().parameters() | self.mappers

    def captions(self, chosen: Sequence[int]) -> list[str]:
        words = self.placeholders
        own = [f"{words['pose']} {self.job.name}", words["background"]]
        return [
            f"{renamed(self.job.examples[i].caption, self.job.name, own[0])} {own[1]}"
            for i in chosen
        ]  # fmt: skip

    def before_step(self, chosen: Sequence[int]) -> None:
        """Rows of this batch's pictures: the attribute's own row plus what the mapper makes of the picture."""
        features_BF = self.features[torch.tensor(list(chosen))]
        for table in self.job.objective.tables:
            for attribute, word in self.placeholders.items():
                key = f"mapper|{table.embedding}|{attribute}"
                hidden = torch.tanh(features_BF @ self.mappers[f"{key}|in"])
                own = self.table.values[table.embedding, word]
                self.table.per_sample[f"{table.embedding} {word}"] = own + hidden @ self.mappers[f"{key}|out"]

    def entries(self) -> dict[str, Entry]:
        return self.table.entries((self.job.name,))

    def tokens(self) -> list[dict[str, Any]]:
        return self.table.tokens((self.job.name,))


class Detex:
    """Rows alone, as Textual Inversion, with the pictures' own attributes set apart."""

    name = "detex"
    defaults: Mapping[str, Any] = {"row_rate": 0.15, "preserve": 0.0, "caption_dropout": 0.0, "learning_rate": 1e-3}

    def begin(self, job: Job) -> Learner:
        """The rows and the mappers."""
        core = job.name.strip("<>")
        words = {attribute: f"<{core}_{attribute}>" for attribute in ATTRIBUTES}
        starts = {word: attribute for attribute, word in words.items()}
        rows = Rows(job.objective, {job.name: job.noun, **starts}, seed=job.seed)
        latents, _ = encode(job.objective, job.examples)
        pooled = torch.nn.functional.adaptive_avg_pool2d(latents, 2).flatten(1)
        features = (pooled - pooled.mean(0)) / pooled.std().clamp_min(1e-6)
        mappers: dict[str, nn.Parameter] = {}
        device = job.objective.device
        for table in job.objective.tables:
            width = rows.embedding(table).embedding_dim
            for attribute in ATTRIBUTES:
                key = f"mapper|{table.embedding}|{attribute}"
                start = torch.randn(features.shape[1], _WIDTH, generator=layer_seed(key, job.seed))
                mappers[f"{key}|in"] = nn.Parameter((start * features.shape[1] ** -0.5).to(device))
                mappers[f"{key}|out"] = nn.Parameter(torch.zeros(_WIDTH, width, device=device))
        return _Learner(
            job=job, pieces=[rows], features=features.to(device), mappers=mappers, placeholders=words
        )  # fmt: skip
