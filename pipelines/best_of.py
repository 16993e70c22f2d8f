"""`best_of`: a picture whose numbers are wrong is drawn again, by the model's own counter.

Design choices
- A prompt says how many things of each kind there are (`mm.world.asked`); the counter of the model's connector says how
  many a drawn picture shows, straight from its latents. Where the two differ, the picture is drawn again, from a seed
  that is derived from its own, up to `best_of` times in all. A picture that is right costs one drawing and a reading.
- Tries of several pictures are drawn together. Each depends on its picture's seed alone, so that a seed gives the same
  picture at any batch size.
- Where no try is right, the one that is the least wrong is kept, the earliest of several.
- The counter is a part of the model, trained on renders alone. The judge, which measures, is never asked.
- The reading parts are loaded when they are first needed: plain drawing pays nothing for them.

Legend: B pictures, C latent channels, H = W latents a side, S places that the counter reads.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from mm.core.checks import whole
from mm.core.errors import UserError
from mm.core.paths import resolve_model
from mm.models.connectors import Connector, merged
from mm.models.understanding_encoder import LatentStem, UnderstandingEncoder
from mm.world.asked import asked_numbers

MOST_TRIES = 64


@dataclass
class CheckedOutput(ImagePipelineOutput):
    """Pictures with, for each, how often it was drawn, and whether its numbers are those that were asked for.

    `right` is None for a prompt that does not say how many of what there are.
    """

    tries: list[int]
    right: list[bool | None]


class CountReader:
    """The model's counter on drawn latents.

    Args:
        encoder: The understanding encoder.
        stem: Makes the encoder's patches of latents.
        connector: Holds the counter.
    """

    def __init__(self, encoder: UnderstandingEncoder, stem: LatentStem, connector: Connector) -> None:
        if connector.counter is None:
            raise UserError("this model's understanding_connector has no counter, which best_of needs")
        self.encoder, self.stem, self.connector = encoder.eval(), stem.eval(), connector.eval()

    @classmethod
    def from_pretrained(cls, name: str | Path) -> CountReader:
        """Of an embedded model, a folder, or a hub name. Raises UserError where it cannot read pictures."""
        where = resolve_model(name)
        parts: dict[str, Any] = {
            "understanding_encoder": UnderstandingEncoder,
            "latent_stem": LatentStem,
            "understanding_connector": Connector,
        }
        missing = [part for part in parts if isinstance(where, Path) and not (where / part / "config.json").is_file()]
        if missing:
            raise UserError(f"{where} holds no {missing[0]}: this model cannot read what it drew; leave best_of out")
        loaded = [kind.from_pretrained(where, subfolder=part, use_safetensors=True) for part, kind in parts.items()]
        return cls(*loaded)

    def to(self, device: Any) -> CountReader:
        """Moves the parts."""
        for part in (self.encoder, self.stem, self.connector):
            part.to(device)
        return self

    @torch.no_grad()
    def numbers(self, latents_BCHW: torch.Tensor) -> list[list[int]]:
        """For each picture, how many things are like it, for every thing that it shows; in ascending order.

        Two cats and a dog are [1, 2, 2].
        """
        counter = self.connector.counter
        assert counter is not None
        patches = self.stem(latents_BCHW.to(self.stem.dtype))
        tokens = self.encoder.encode_patches(patches.to(self.encoder.dtype))[1]
        kin_BSS = counter(merged(tokens.to(self.connector.dtype), self.connector.config.side)).float()
        here_BS = kin_BSS.diagonal(dim1=1, dim2=2) > 0.5
        counts_BS = kin_BSS.sum(-1).round().int()
        return [sorted(counts[here].tolist()) for counts, here in zip(counts_BS, here_BS, strict=True)]


def wrongness(seen: Sequence[int], asked: Sequence[int]) -> int:
    """How far the numbers that `CountReader.numbers` reads are from a prompt's (one for each group); 0 is right."""
    wanted = sorted(count for count in asked for _ in range(count))
    apart = sum(abs(a - b) for a, b in zip(sorted(seen), wanted, strict=False))
    return apart + 10 * abs(len(seen) - len(wanted))


def reader_of(name: str | None) -> CountReader:
    """The counter of the model that a pipeline was loaded from. Raises UserError where it was not loaded from one."""
    if not name:
        raise UserError("best_of needs the parts that read; set pipe.count_reader = CountReader.from_pretrained(NAME)")
    return CountReader.from_pretrained(name)


def seed_of_try(seed: int, k: int) -> int:
    """The seed of try `k` of a picture; the first has the picture's own."""
    if k == 0:
        return seed
    return int.from_bytes(hashlib.blake2s(f"{seed} try {k}".encode(), digest_size=8).digest(), "big") >> 1


def check_best_of(best_of: int, latents: torch.Tensor | None) -> None:
    """Raises UserError for a number of tries that cannot be."""
    whole("best_of", best_of, 1, MOST_TRIES)
    if best_of > 1 and latents is not None:
        raise UserError(
            "latents fix the starting noise, so every try of best_of would be the same; leave one of them out"
        )


def draw_best(
    draw: Callable[[Sequence[str], Sequence[torch.Generator]], torch.Tensor],
    reader: CountReader,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    best_of: int,
) -> tuple[torch.Tensor, list[int], list[bool | None]]:
    """The best of up to `best_of` tries of each picture.

    Args:
        draw: Draws latents (B, C, H, W) of prompts, each with its generator.
        reader: Counts.
        prompts: One a picture.
        generators: One a picture; their seeds count.
        best_of: The most tries of a picture.

    Returns:
        Latents (B, C, H, W), how often each picture was drawn, and whether it is right (None: not checked).
    """
    asked = [asked_numbers(prompt) for prompt in prompts]
    seeds = [generator.initial_seed() for generator in generators]
    best = draw(prompts, generators)
    least = _wrongness(reader, best, asked)
    tries = [1] * len(prompts)
    for k in range(1, best_of):
        rows = [i for i, wrong in enumerate(least) if wrong]
        if not rows:
            break
        again = [torch.Generator().manual_seed(seed_of_try(seeds[i], k)) for i in rows]
        with warnings.catch_warnings():  # of unknown words, which the first try has warned of
            warnings.simplefilter("ignore")
            drawn = draw([prompts[i] for i in rows], again)
        for i, latents, wrong in zip(rows, drawn, _wrongness(reader, drawn, [asked[i] for i in rows]), strict=True):
            tries[i] = k + 1
            if wrong < least[i]:
                best[i], least[i] = latents, wrong
    right = [None if numbers is None else wrong == 0 for numbers, wrong in zip(asked, least, strict=True)]
    return best, tries, right


def _wrongness(reader: CountReader, latents_BCHW: torch.Tensor, asked: Sequence[tuple[int, ...] | None]) -> list[int]:
    seen = reader.numbers(latents_BCHW)
    return [0 if wanted is None else wrongness(numbers, wanted) for numbers, wanted in zip(seen, asked, strict=True)]
