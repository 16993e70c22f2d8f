"""Erasing a concept from what a model reads and says: `scope="read"`.

An erasure changes how prompts are drawn. The same model may still name the concept in a picture that somebody gives it,
and by default it does: to recognize a thing is not to draw it. With `scope="read"` the patch also gives the concept's
words the anchor's embeddings, a little smaller, in the table that the text head is tied to. The head then always
prefers the anchor's word, and a question about the concept is read as one about the anchor.

Legend: n words, D width of the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mm.adapters.entry import Entry
from mm.core.errors import UserError
from mm.erasure.concepts import Concept, Contexts
from mm.layers.surgery import roots_of

SMALLER = 0.98  # of the anchor's embedding: its own word is always ahead


def reading_rows(
    pipe: Any, concepts: Sequence[Concept], anchors: Mapping[str, str], contexts: Contexts
) -> dict[str, Entry]:
    """Rows of the word embeddings by path.

    Args:
        pipe: a pipeline whose tokenizer has one token a word.
        concepts: that are erased.
        anchors: a name for each concept.
        contexts: know the forms of a name.

    Raises:
        UserError: where the model has no such table, or a concept or anchor has no word of its own.
    """
    path, table = _table(pipe)
    tokenizer = next(t for n, t in pipe.components.items() if "tokenizer" in n and callable(t))
    forms = getattr(contexts, "forms", lambda name: (name,))
    ids, rows = [], []
    for concept in concepts:
        anchor = anchors[str(concept)]
        if not anchor:
            raise UserError(f"{concept} has no anchor, and reading needs a word in its place; give an anchor")
        old, new = ([_token(tokenizer, word) for word in forms(name)] for name in (concept.name, anchor))
        for k, token in enumerate(old):
            # forms are the singular words, then the plural ones
            place = 0 if k < len(old) // 2 or len(new) == 1 else len(new) // 2
            if token not in ids and token not in new:
                ids.append(token)
                rows.append(SMALLER * table.weight[new[place]].detach().float().cpu())
    return {path: Entry(kind="rows", tensors={"ids": torch.tensor(ids), "rows": torch.stack(rows)})}


def _table(pipe: Any) -> tuple[str, nn.Embedding]:
    """The table of word embeddings that a text head is tied to."""
    for name, root in roots_of(pipe).items():
        table = getattr(root, "words", None)
        if isinstance(table, nn.Embedding) and getattr(root, "norm_text_out", None) is not None:
            return f"{name}.words".strip("."), table
    raise UserError(f"{type(pipe).__name__} reads no pictures with a table of whole words; leave scope at 'draw'")


def _token(tokenizer: Any, word: str) -> int:
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise UserError(f"{word!r} is not one word of this model; reading can only forget whole words")
    return int(ids[0])
