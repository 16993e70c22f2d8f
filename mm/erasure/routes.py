"""Instructions for editing: a second way in which a unified model reads a concept's name.

Design choices
- A patch from prompts alone acts on prompts alone: where a model edits, the same words stand behind a picture and in
  another turn of a dialogue, and its layers read other features. So a family whose contexts have `edits` gets pairs of
  instructions as well, each with the picture that is changed.
- Tokens of the two instructions are matched by the token numbers that the model's own word embeddings look up. This
  needs no knowledge of how a pipeline writes an instruction.

Legend: B instructions, T tokens, D width.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor, nn

from mm.core.errors import UserError
from mm.erasure.alignment import align
from mm.erasure.concepts import Concept
from mm.erasure.embeddings import word_tables
from mm.erasure.features import record
from mm.families import family_of
from mm.families.family import resolve


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """An instruction and the picture that it changes.

    Args:
        text: the instruction.
        instead: the same instruction with the anchor in the target's place; None for one that must not change.
        picture: as the family's pipeline takes it.
    """

    text: str
    instead: str | None
    picture: Any


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Features of instructions at one layer: tokens of targets, their counterparts, and tokens that stay."""

    target_TD: Tensor
    anchor_TD: Tensor
    retained_RD: Tensor


def editor_of(pipe: Any) -> Any | None:
    """A pipeline that edits with the model of `pipe`: it takes over what `pipe` has and loads the rest.

    None where the family has no such pipeline, or it is not known which model `pipe` was loaded from.
    """
    family = family_of(pipe)
    place = None if family is None else family.pipelines.get("edit")
    name = getattr(pipe, "name_or_path", "")
    if place is None or not name:
        return None
    try:
        return sharing(pipe, resolve(place))
    except UserError:  # the model draws, but has no parts for editing
        return None


def sharing(pipe: Any, kind: Any) -> Any:
    """A pipeline of another kind from the same model: it takes over what `pipe` has, and loads the rest."""
    takes = inspect.signature(kind.__init__).parameters
    shared = {name: part for name, part in pipe.components.items() if name in takes and part is not None}
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        made = kind.from_pretrained(pipe.name_or_path, **shared)
    finally:
        if bars:
            logging.enable_progress_bar()
    for name, part in made.components.items():
        if name not in shared and isinstance(part, nn.Module):
            nn.Module.to(part, pipe.device, pipe.dtype)
    made.set_progress_bar_config(disable=True)
    return made


def edits_of(contexts: Any, targets: Sequence[Concept], anchors: Mapping[str, str], count: int) -> list[Edit]:
    """The family's instructions: `count` for each target, and as many that must stay; none where it has no `edits`."""
    own = getattr(contexts, "edits", None)
    return list(own(targets, anchors, count)) if own is not None else []


def rows_of(
    pipe: Any, layers: Mapping[str, nn.Module], groups: Sequence[Sequence[str]], edits: Sequence[Edit]
) -> dict[str, Rows]:
    """Features of edits for the first path of each group of layers; empty where the model edits nothing."""
    editor = editor_of(pipe) if edits else None
    if editor is None:
        return {}
    asked = [e for e in edits if e.instead is not None]
    kept = [e for e in edits if e.instead is None]
    texts = [*[e.text for e in asked], *[e.instead or "" for e in asked], *[e.text for e in kept]]
    pictures = [e.picture for e in (*asked, *asked, *kept)]
    ids = _Ids(editor)
    with ids, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of words and pictures that the family's contexts chose
        read = record(editor, {group[0]: layers[group[0]] for group in groups}, texts, pictures, ids)
    n = len(asked)
    match = [_matched(ids.rows[i], ids.rows[n + i], ids.padding) for i in range(n)]
    own = [_places(row, ids.padding) for row in ids.rows[2 * n :]]
    out = {}
    for path, x in read.items():
        anchor = torch.cat([x[n + i][there] for i, (_, there) in enumerate(match)]).double()
        out[path] = Rows(
            target_TD=torch.cat([x[i][here] for i, (here, _) in enumerate(match)]).double(), anchor_TD=anchor,
            retained_RD=torch.cat([*[x[2 * n + i][p] for i, p in enumerate(own)], anchor]).double(),
        )  # fmt: skip
    return out


class _Ids:
    """The token numbers that a pipeline looks up while the context is open, one row a prompt."""

    def __init__(self, pipe: Any) -> None:
        self.tables = word_tables(pipe)[:1]
        self.rows: list[list[int]] = []
        found = [t for n, t in pipe.components.items() if "tokenizer" in n and callable(t)]
        self.padding = next((t.pad_token_id for t in found if t.pad_token_id is not None), -1)
        self._handles: list[Any] = []
        self._begun = 0

    def begin(self) -> None:
        """Rows from here on are those of a new call."""
        self._begun = len(self.rows)

    def again(self) -> None:
        """The call is made again, prompt by prompt."""
        del self.rows[self._begun :]

    def __enter__(self) -> None:
        self._handles = [table.register_forward_pre_hook(self._keep) for table in self.tables]

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, table: nn.Module, args: Any) -> None:
        if args and args[0].ndim == 2:
            self.rows += args[0].tolist()


def _places(row: Sequence[int], padding: int) -> list[int]:
    """Where the tokens are that are no padding at either end."""
    real = [i for i, token in enumerate(row) if token != padding]
    return list(range(real[0], real[-1] + 1)) if real else []


def _matched(old: Sequence[int], new: Sequence[int], padding: int) -> tuple[list[int], list[int]]:
    """Places of the tokens of one row, and of their counterparts in another."""
    here, there = _places(old, padding), _places(new, padding)
    return here, [there[i] for i in align([old[i] for i in here], [new[i] for i in there])]
