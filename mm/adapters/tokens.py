"""New words of a patch: the token strings of its embedding rows, added to the tokenizers of the model it goes onto.

Design choices
- A patch keeps its tokens in `settings["tokens"]`: the string, the tokenizer's component, the embedding's path and the
  row it had. Two patches that were made apart may have the same row, so rows are placed anew on each model.
- Where a tokenizer has no free row, a text encoder of transformers gets one more.
- A word leaves the tokenizer with the last patch that holds its row, and the row with it. Ids are places in a list, so
  that a row below one in use stays, under a name that no text has, until the rows above it are free too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mm.adapters.entry import Entry
from mm.adapters.layer_state import placed_on
from mm.core.errors import UserError, shown
from mm.layers.surgery import roots_of, submodule

_ADDED = "_mm_words"  # on a tokenizer: the words that patches have added, with the rows that there were before
_FREE = "<|mm free row {}|>"


@dataclass(frozen=True, kw_only=True)
class TokenTable:
    """A tokenizer and the embedding that its ids index: component's name, and the embedding's path."""

    tokenizer: str
    embedding: str


def token_tables(pipe: Any) -> tuple[TokenTable, ...]:
    """The tables of a pipeline: tokenizer and text_encoder, tokenizer_2 and text_encoder_2, and so on."""
    found = []
    for name, tokenizer in getattr(pipe, "components", {}).items():
        match = re.fullmatch(r"(?:text_)?tokenizer(_\d)?", name)
        if match is None or tokenizer is None:
            continue
        owner = next((n for n in (f"text_encoder{match[1] or ''}", "trunk") if n in roots_of(pipe)), None)
        path = None if owner is None else _embedding_path(roots_of(pipe)[owner])
        if path is not None:
            found.append(TokenTable(tokenizer=name, embedding=f"{owner}.{path}"))
    return tuple(found)


def _embedding_path(root: nn.Module) -> str | None:
    get = getattr(root, "get_input_embeddings", None)
    try:
        wanted = get() if callable(get) else getattr(root, "words", None)
    except NotImplementedError:  # transformers' answer for a model without an input embedding
        wanted = None
    return next((path for path, module in root.named_modules() if module is wanted), None) if wanted else None


def tokenizer_of(pipe: Any, table: TokenTable) -> Any:
    """The tokenizer of a table; that within a processor, where the component is one (Kandinsky 5)."""
    part = getattr(pipe, "components", {}).get(table.tokenizer)
    return getattr(part, "tokenizer", part)


def tied_embeddings(pipe: Any, table: TokenTable) -> list[nn.Embedding]:
    """The modules that read words of a table: T5 encoders have another one for that than the table's own."""
    component, _, path = table.embedding.partition(".")
    root = roots_of(pipe)[component]
    own: Any = submodule(root, path)
    return [m for m in root.modules() if isinstance(m, nn.Embedding) and (m is own or m.weight is own.weight)]


def add_token(pipe: Any, table: TokenTable, token: str) -> int:
    """Adds a word to a tokenizer, with a row of the embedding.

    Returns:
        The row.

    Raises:
        UserError: where the tokenizer has the word already, or no row is free.
    """
    tokenizer = tokenizer_of(pipe, table)
    if token in tokenizer.get_vocab():
        raise UserError(f"{shown(token)} is a word of {table.tokenizer} already; choose another name, such as '<new>'")
    component, _, path = table.embedding.partition(".")
    root = roots_of(pipe)[component]
    row = len(tokenizer)
    embedding = submodule(root, path)
    rows = getattr(embedding, "num_embeddings", 0)
    if isinstance(embedding, nn.Embedding) and row >= embedding.num_embeddings:
        resize: Any = getattr(root, "resize_token_embeddings", None)
        if resize is None:
            raise UserError(f"all {embedding.num_embeddings} rows of {table.embedding} are taken; no new word fits")
        with torch.random.fork_rng(devices=[]):  # rows are drawn for it, which are replaced here
            resize(row + 1, mean_resizing=False)
        _fill_new_rows(root, path, rows)
    tokenizer.add_tokens([token])
    tokenizer.__dict__.setdefault(_ADDED, {})[token] = rows
    return row


@torch.no_grad()
def _fill_new_rows(root: nn.Module, path: str, rows: int) -> None:
    """The mean of all rows in new ones: what a word is at a scale of 0 must not be left to chance."""
    grown = submodule(root, path)
    if isinstance(grown, nn.Embedding):
        grown.weight[rows:] = grown.weight[:rows].float().mean(0).to(grown.weight)


def release_words(target: Any) -> None:
    """Takes words whose rows no patch holds out of the tokenizers of a pipeline; a bare module has none."""
    if isinstance(target, nn.Module):
        return
    for table in token_tables(target):
        added: dict[str, int] = getattr(tokenizer_of(target, table), _ADDED, {})
        if added:
            _release(target, table, added)


def keep_words(target: Any, entries: Mapping[str, Entry]) -> None:
    """Lets the words of entries that became part of the weights stay for good."""
    for table in () if isinstance(target, nn.Module) else token_tables(target):
        tokenizer, entry = tokenizer_of(target, table), entries.get(table.embedding)
        if entry is not None and entry.kind == "rows":
            vocabulary, ids = tokenizer.get_vocab(), set(entry.tensors["ids"].tolist())
            added = getattr(tokenizer, _ADDED, {})
            for token in [token for token in added if vocabulary.get(token) in ids]:
                del added[token]


def _release(pipe: Any, table: TokenTable, added: dict[str, int]) -> None:
    tokenizer = tokenizer_of(pipe, table)
    component, _, path = table.embedding.partition(".")
    root = roots_of(pipe)[component]
    embedding = submodule(root, path)
    held = {
        int(row)
        for placed in (() if embedding is None else placed_on(embedding))
        if placed.entry.kind == "rows"
        for row in placed.entry.tensors["ids"]
    }
    vocabulary, last, rows, gone = tokenizer.get_vocab(), len(tokenizer) - 1, None, set()
    for token in reversed(list(added)):
        if vocabulary.get(token) != last or last in held:
            break
        rows, last = added.pop(token), last - 1
        gone.add(token)
    free = {t: _FREE.format(vocabulary[t]) for t in added if t in vocabulary and vocabulary[t] not in held}
    if gone or any(name not in vocabulary for name in free.values()):
        _rewrite(tokenizer, gone, free)
        for token in [token for token in added if token in free]:
            added[free[token]] = added.pop(token)
        tokenizer.__dict__[_ADDED] = dict(sorted(added.items(), key=lambda item: tokenizer.get_vocab()[item[0]]))
    if rows is not None and getattr(embedding, "num_embeddings", rows) > rows:
        root.resize_token_embeddings(rows)  # type: ignore[operator]


def _rewrite(tokenizer: Any, gone: Collection[str], renamed: Mapping[str, str]) -> None:
    """Takes added words out of a tokenizer, or gives them another name; ids stay."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = [item for item in state["added_tokens"] if item["content"] not in gone]
    state["added_tokens"] = [item | {"content": renamed.get(item["content"], item["content"])} for item in kept]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


def own_row(pipe: Any, table: TokenTable, token: str) -> int | None:
    """The row of a word; None where the tokenizer lacks it."""
    return tokenizer_of(pipe, table).get_vocab().get(token)


def placed_rows(
    entries: Mapping[str, Entry], settings: Mapping[str, Any], target: Any, *, add: bool = False
) -> dict[str, Entry]:
    """The entries of a patch with the rows that its words have on a model.

    Args:
        entries: of the patch.
        settings: of the patch, whose "tokens" name its words.
        target: a pipeline; a bare module has no tokenizer, and the rows stay what they are.
        add: words that the tokenizers lack are added.

    Raises:
        UserError: where a word is to be added and a tokenizer has it already with a row that no patch made.
    """
    tokens: Sequence[Mapping[str, Any]] = settings.get("tokens", ())
    if not tokens or isinstance(target, nn.Module):
        return dict(entries)
    rows: dict[str, dict[int, int]] = {}
    for item in tokens:
        table = TokenTable(tokenizer=item["tokenizer"], embedding=item["embedding"])
        if tokenizer_of(target, table) is None:
            raise UserError(
                f"the patch brings the word {shown(item['token'])} and this pipeline has no {table.tokenizer}"
            )
        row = own_row(target, table, item["token"])
        if row is not None and add:
            _check_free(target, table, item["token"], row)
        if row is None:
            row = add_token(target, table, item["token"]) if add else int(item["id"])
        rows.setdefault(table.embedding, {})[int(item["id"])] = row
    return {
        path: _moved(entry, rows[path]) if entry.kind == "rows" and path in rows else entry
        for path, entry in entries.items()
    }


def _check_free(pipe: Any, table: TokenTable, token: str, row: int) -> None:
    """Raises UserError where an applied patch brings the word already."""
    component, _, path = table.embedding.partition(".")
    embedding = submodule(roots_of(pipe)[component], path)
    for placed in () if embedding is None else placed_on(embedding):
        if placed.entry.kind == "rows" and row in placed.entry.tensors["ids"]:
            raise UserError(
                f"patch {placed.name!r} is applied and brings the word {shown(token)} already; undo it first"
            )


def _moved(entry: Entry, rows: Mapping[int, int]) -> Entry:
    ids = entry.tensors["ids"]
    moved = torch.tensor([rows.get(int(i), int(i)) for i in ids], dtype=ids.dtype)
    return entry if torch.equal(moved, ids) else replace(entry, tensors=entry.tensors | {"ids": moved})
