"""The new words of adapters that are merged: what they are called, and a row of its own for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from mm.adapters.entry import Entry
from mm.adapters.patch import Patch
from mm.core.errors import UserError, shown


def names_of(patches: Sequence[Patch]) -> list[str]:
    """What the adapters' subjects are called, as far as the adapters say it; of merged ones, all names."""
    each = [patch.settings.get("names") or [patch.settings.get("name")] for patch in patches]
    return [str(name) for names in each for name in names if name]


def words_of(patches: Sequence[Patch]) -> list[str]:
    """What each adapter's subject is called in prompts. Raises UserError for an adapter that does not say it."""
    found = [str(patch.settings.get("name") or "") for patch in patches]
    if not all(found):
        unnamed = next(patch.name for patch, word in zip(patches, found, strict=True) if not word)
        raise UserError(
            f"adapter {unnamed!r} does not say what its subject is called in prompts; give the words of all adapters "
            "(words=[...], --word)"
        )
    return found


class Words:
    """The new words of all patches, each with a row of its own."""

    def __init__(self, patches: Sequence[Patch]) -> None:
        self.tokens: list[dict[str, Any]] = []
        self._rows: dict[tuple[int, str], dict[int, int]] = {}
        taken: dict[str, set[int]] = {}
        seen: dict[tuple[str, str], str] = {}
        for k, patch in enumerate(patches):
            for item in patch.settings.get("tokens", ()):
                key = (item["tokenizer"], item["token"])
                if key in seen:
                    raise UserError(
                        f"{seen[key]!r} and {patch.name!r} both bring the word {shown(item['token'])}; customize one "
                        "of them again under another name"
                    )
                seen[key] = patch.name
                used = taken.setdefault(item["embedding"], set())
                row = int(item["id"])
                while row in used:
                    row += 1
                used.add(row)
                self._rows.setdefault((k, item["embedding"]), {})[int(item["id"])] = row
                self.tokens.append(dict(item) | {"id": row})

    def moved(self, number: int, path: str, entry: Entry) -> Entry:
        """The entry of patch `number`, with rows that no other patch has."""
        rows = self._rows.get((number, path))
        if entry.kind != "rows" or rows is None:
            return entry
        ids = torch.tensor([rows.get(int(i), int(i)) for i in entry.tensors["ids"]])
        return replace(entry, tensors=entry.tensors | {"ids": ids})
