"""Textual inversions: new words and their rows, as files of their own or bundled in a LoRA file.

Forms (Gal et al. 2022, arXiv 2208.01618, is the method; the keys are those of the programs that write them):
- diffusers: the word is the key, its rows the tensor, (D,) or (n, D);
- A1111's web UI: `emb_params` in safetensors, `string_to_param` with "*" in a dictionary that torch has loaded;
- several text encoders: `clip_l`, `clip_g` and `t5xxl`, one tensor each;
- in a LoRA file: `bundle_emb.WORD.string_to_param.*`, `bundle_emb.WORD.clip_l` and so on.

Design choices
- Where a file does not say the word, its own name is the word, as in A1111's web UI and ComfyUI.
- Rows go to the text encoder that a key names; else to the first one whose embedding has their width.
- A word of n rows becomes the words W, W_1, ... W_(n-1), which diffusers' pipelines put in place of W.

Legend: n rows of a word, D width of an embedding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm.adapters.entry import Entry
from mm.adapters.tokens import TokenTable, token_tables
from mm.core.errors import UserError, shown
from mm.core.nouns import counted, with_article
from mm.layers.surgery import roots_of, submodule

BUNDLE = "bundle_emb."
MAX_ROWS = 75  # that CLIP reads of a prompt
_ENCODERS = {
    "clip_l": ("text_encoder",),
    "clip_g": ("text_encoder_2",),
    "t5xxl": ("text_encoder_3", "text_encoder_2"),
}  # by key
_ONE = ("emb_params", "string_to_param", "string_to_param.*")  # keys of A1111's only tensor
_PARTS = re.compile(r"(.+)\.(string_to_param(?:\.\*)?|emb_params|clip_l|clip_g|t5xxl)")
Words = dict[str, dict[str, Tensor]]  # by word, then by key; the key "" names no text encoder


def split_words(tensors: Mapping[str, Tensor], name: str, odd: bool) -> tuple[Words, dict[str, Tensor]]:
    """The words of a file, and what is left of its tensors.

    Args:
        tensors: of a file, by key.
        name: the word where the file does not say it.
        odd: no key is one of a LoRA, so that keys can be words.
    """
    words: Words = {}
    rest = dict(tensors)
    for key in [key for key in tensors if key.startswith(BUNDLE)]:
        match = _PARTS.fullmatch(key.removeprefix(BUNDLE))
        if match is not None:
            words.setdefault(match[1], {})[match[2] if match[2] in _ENCODERS else ""] = rest.pop(key)
    if words or not odd:
        return words, rest
    if len(tensors) == 1 and next(iter(tensors)) in _ONE:
        return {name: {"": next(iter(tensors.values()))}}, {}
    if tensors.keys() <= _ENCODERS.keys():
        return {name: dict(tensors)}, {}
    if all(tensor.ndim <= 2 and "." not in key.strip(".") and len(tensor) for key, tensor in tensors.items()):
        return {key: {"": tensor} for key, tensor in tensors.items()}, {}
    return {}, rest


def unpacked(source: Mapping[str, Any]) -> dict[str, Any]:
    """The dictionary of an A1111 embedding, as torch loads it, as tensors by key; any other one as it is."""
    inner = source.get("string_to_param")
    if not isinstance(inner, Mapping):
        return dict(source)
    return {f"string_to_param.{key}": value for key, value in inner.items()}


def word_entries(words: Words, target: Any) -> tuple[dict[str, Entry], list[dict[str, Any]]]:
    """Entries of rows by the embedding's path, and the words as a patch's settings have them.

    Args:
        words: by word and key.
        target: the pipeline.

    Raises:
        UserError: where the pipeline has no text encoder for the rows, or reads one row a word only.
    """
    tables = [] if isinstance(target, nn.Module) else list(token_tables(target))
    if words and not tables:
        raise UserError(
            f"{shown(next(iter(words)))} is a textual inversion, which needs a pipeline with a tokenizer; give the "
            "pipeline"
        )
    rows: dict[str, list[Tensor]] = {}
    tokens: list[dict[str, Any]] = []
    for word, parts in words.items():
        if not word.strip() or any(mark.isspace() for mark in word):
            raise UserError(f"{shown(word)} is no word that a prompt can hold; rename the file, or the key in it")
        for key, tensor in parts.items():
            table, width = _table(word, key, tensor, tables, target)
            here = rows.setdefault(table.embedding, [])
            for number, row in enumerate(_rows(word, tensor, width, target)):
                token = word if number == 0 else f"{word}_{number}"
                tokens.append({"token": token, "tokenizer": table.tokenizer, "embedding": table.embedding,
                               "id": len(here)})  # fmt: skip
                here.append(row)
    entries = {
        path: Entry(kind="rows", tensors={"ids": torch.arange(len(found)), "rows": torch.stack(found)})
        for path, found in rows.items()
    }
    return entries, tokens


def word_of(path: Path) -> str:
    """The word that a file's name stands for."""
    return re.sub(r"\s+", "_", path.stem.strip())


def _table(word: str, key: str, tensor: Tensor, tables: list[TokenTable], target: Any) -> tuple[TokenTable, int]:
    """The tokenizer and embedding that a tensor is for, and the embedding's width."""
    widths = {table.embedding: _width(table, target) for table in tables}
    wide = tensor.shape[-1]
    owners = _ENCODERS.get(key, ())
    named = [table for owner in owners for table in tables if table.embedding.startswith(f"{owner}.")]
    found = next((table for table in (named if owners else tables) if widths[table.embedding] == wide), None)
    if found is None:
        of = f"{key} of {shown(word)}" if key else shown(word)
        there = ", ".join(f"{path.partition('.')[0]} {width}" for path, width in widths.items())
        raise UserError(
            f"{of} has rows of {wide} values, and no text encoder for it here has such ({there}); the file is for "
            "another model"
        )
    return found, wide


def _width(table: TokenTable, target: Any) -> int:
    component, _, path = table.embedding.partition(".")
    found: Any = submodule(roots_of(target)[component], path)
    return int(found.embedding_dim)


def _rows(word: str, tensor: Tensor, width: int, target: Any) -> Tensor:
    rows = tensor.reshape(-1, width)
    if len(rows) > MAX_ROWS:
        raise UserError(f"{shown(word)} has {len(rows)} rows; at most {MAX_ROWS} fit into a prompt")
    if len(rows) > 1 and not hasattr(target, "maybe_convert_prompt"):
        raise UserError(
            f"{shown(word)} has {counted(len(rows), 'row')}, and {with_article(type(target).__name__)} reads one row "
            "a word; give an inversion of one vector"
        )
    return rows
