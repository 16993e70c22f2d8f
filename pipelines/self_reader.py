"""The model's own reading of what it has drawn, for `best_of` and `fast`: the counter, and answers to questions.

Design choices
- Numbers come from the counter of the connector, everything else from the trunk's answers to questions that it was
  trained on (`mm.world.asked`). Both read latents, through the latent stem: nothing is decoded.
- All of these are parts of the model, trained on renders alone. The judge, which measures, is never asked.
- The reading parts are loaded when they are first needed: plain drawing pays nothing for them.

Legend: B pictures, C latent channels, H = W latents a side, S understanding tokens, L encoder tokens, D trunk width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mm.core.errors import UserError
from mm.core.paths import resolve_model
from mm.core.safe_json import read_object
from mm.models.connectors import Connector, merged
from mm.models.understanding_encoder import LatentStem, UnderstandingEncoder
from mm.world.asked import Asked, Fact

Believe = Callable[[torch.Tensor, Sequence[Fact]], list[float]]
_PARTS: dict[str, Any] = {
    "understanding_encoder": UnderstandingEncoder,
    "latent_stem": LatentStem,
    "understanding_connector": Connector,
}
_SURE = 0.8  # a fact of which the model is less sure is missing
_FACT = 10  # how much a fact that is surely missing counts, in things too many or too few


@dataclass(frozen=True, kw_only=True)
class Shortfall:
    """What a picture lacks.

    Attributes:
        wrong: How far it is from what was asked for; 0 where nothing is missing.
        missing: What is missing, in words.
    """

    wrong: float = 0
    missing: tuple[str, ...] = ()


class SelfReader:
    """Reads drawn latents by the model's own reading parts.

    Args:
        encoder: The understanding encoder.
        stem: Makes the encoder's patches of latents.
        connector: Makes understanding tokens; holds the counter.
    """

    def __init__(self, encoder: UnderstandingEncoder, stem: LatentStem, connector: Connector) -> None:
        if connector.counter is None:
            raise UserError("this model's understanding_connector has no counter, which best_of needs")
        self.encoder, self.stem, self.connector = encoder.eval(), stem.eval(), connector.eval()

    @classmethod
    def from_pretrained(cls, name: str | Path) -> SelfReader:
        """Of an embedded model, a folder, or a hub name. Raises UserError where it cannot read pictures."""
        where = resolve_model(name)
        if missing := _missing(where):
            raise UserError(f"{where} holds no {missing[0]}: this model cannot read what it drew; leave best_of out")
        loaded = [kind.from_pretrained(where, subfolder=part, use_safetensors=True) for part, kind in _PARTS.items()]
        return cls(*loaded)

    def to(self, device: Any) -> SelfReader:
        """Moves the parts."""
        for part in (self.encoder, self.stem, self.connector):
            part.to(device)
        return self

    @torch.no_grad()
    def encoded(self, latents_BCHW: torch.Tensor) -> torch.Tensor:
        """The encoder's tokens (B, L, C) of drawn latents."""
        patches = self.stem(latents_BCHW.to(self.stem.dtype))
        return self.encoder.encode_patches(patches.to(self.encoder.dtype))[1].to(self.connector.dtype)

    @torch.no_grad()
    def numbers(self, tokens_BLC: torch.Tensor) -> list[list[int]]:
        """For each picture, how many things are like it, for every thing that it shows; in ascending order.

        Two cats and a dog are [1, 2, 2].
        """
        counter = self.connector.counter
        assert counter is not None
        kin_BSS = counter(merged(tokens_BLC, self.connector.config.side)).float()
        here_BS = kin_BSS.diagonal(dim1=1, dim2=2) > 0.5
        counts_BS = kin_BSS.sum(-1).round().int()
        return [sorted(counts[here].tolist()) for counts, here in zip(counts_BS, here_BS, strict=True)]

    @torch.no_grad()
    def shortfalls(
        self, latents_BCHW: torch.Tensor, asked: Sequence[Asked | None], believe: Believe
    ) -> list[Shortfall | None]:  # fmt: skip
        """What pictures lack of what was asked for. Each is read alone, so that the same latents lack the same.

        Args:
            latents_BCHW: Drawn.
            asked: One a picture; None is not checked.
            believe: How likely the model thinks that facts are true of one picture, by its understanding tokens
                (1, S, D).

        Returns:
            One a picture; None where nothing was checked.
        """
        found: list[Shortfall | None] = []
        for latents_1CHW, wanted in zip(latents_BCHW.split(1), asked, strict=True):
            if wanted is None:
                found.append(None)
                continue
            encoded = self.encoded(latents_1CHW)
            found.append(_compared(wanted, self.numbers(encoded)[0], self.connector(encoded), believe))
        return found


def reader_of(name: str | None) -> SelfReader:
    """The reader of the model that a pipeline was loaded from. Raises UserError where it was not loaded from one."""
    if not name:
        raise UserError("best_of needs the parts that read; set pipe.self_reader = SelfReader.from_pretrained(NAME)")
    return SelfReader.from_pretrained(name)


def has_reader(name: str | None) -> bool:
    """Whether a model in a folder has all parts that read, its counter included; others count as having none."""
    where = resolve_model(name) if name else None
    if not isinstance(where, Path) or _missing(where):
        return False
    config = read_object(where / "understanding_connector" / "config.json")
    return bool(config.get("counter_keys"))


def _missing(where: Path | str) -> list[str]:
    """The reading parts that a folder lacks; nothing is known of a hub name."""
    return [part for part in _PARTS if isinstance(where, Path) and not (where / part / "config.json").is_file()]


def wrongness(seen: Sequence[int], wanted: Sequence[int]) -> int:
    """How far numbers, as `SelfReader.numbers` reads them, are from those that are wanted; 0 is right."""
    apart = sum(abs(a - b) for a, b in zip(sorted(seen), sorted(wanted), strict=False))
    return apart + 10 * abs(len(seen) - len(wanted))


def _compared(wanted: Asked, seen: Sequence[int], tokens_1SD: torch.Tensor, believe: Believe) -> Shortfall:
    wrong = 0 if wanted.numbers is None else wrongness(seen, wanted.numbers)
    only = "only " if len(seen) > len(wanted.numbers or ()) else ""
    missing = [f"{only}{wanted.said}"] if wrong else []
    sure = believe(tokens_1SD, wanted.facts) if wanted.facts else []
    doubts = {fact.said: 1 - p for fact, p in zip(wanted.facts, sure, strict=True) if p < _SURE}
    return Shortfall(wrong=wrong + _FACT * sum(doubts.values()), missing=(*missing, *doubts))
