"""Words of patches: added with the first patch that holds their row, gone with the last, in any order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_pipelines import tiny_pipeline_of

from mm.adapters.entry import Entry
from mm.adapters.patch import Patch
from mm.core.errors import UserError


def _table(pipe: Any) -> str:
    found = pipe.text_encoder.get_input_embeddings()
    return next(f"text_encoder.{path}" for path, module in pipe.text_encoder.named_modules() if module is found)


def _word(pipe: Any, token: str, value: float, width: int | None = None) -> Patch:
    """A patch that brings one word, made on another model, where it had row 7."""
    wide = width or pipe.text_encoder.get_input_embeddings().embedding_dim
    rows = Entry(kind="rows", tensors={"ids": torch.tensor([7]), "rows": torch.full((1, wide), value)})
    tokens = [{"token": token, "tokenizer": "tokenizer", "embedding": _table(pipe), "id": 7}]
    return Patch(name=token, base="", entries={_table(pipe): rows}, settings={"tokens": tokens})


def _read(pipe: Any) -> tuple[Any, ...]:
    """All that a prompt's ids depend on, and the embedding's rows."""
    tokenizer = pipe.tokenizer
    ids = tuple(tuple(tokenizer(text).input_ids) for text in ("a <a> cat", "<b>", "<a><b> fox"))
    return len(tokenizer), dict(tokenizer.get_vocab()), ids, len(pipe.text_encoder.get_input_embeddings().weight)


def _row(pipe: Any, token: str) -> torch.Tensor:
    return pipe.text_encoder.get_input_embeddings().weight[pipe.tokenizer.convert_tokens_to_ids(token)].detach()


@pytest.mark.filterwarnings("ignore:patch")
def test_undo_takes_words_away_in_any_order() -> None:
    pipe = tiny_pipeline_of("stable-diffusion")
    first, second = _word(pipe, "<a>", 1.0), _word(pipe, "<b>", 2.0)
    plain, weights = _read(pipe), pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    first.apply(pipe)
    with_first = _read(pipe)
    assert with_first[0] == plain[0] + 1 and with_first[2] != plain[2]
    first.undo(pipe)
    assert _read(pipe) == plain
    first.apply(pipe)
    second.apply(pipe)
    own = pipe.tokenizer.convert_tokens_to_ids("<b>")
    second.undo(pipe)
    assert _read(pipe) == with_first
    second.apply(pipe)
    first.undo(pipe)  # the lower one: the other keeps its id, and texts with the name are read as before
    assert pipe.tokenizer.convert_tokens_to_ids("<b>") == own
    assert pipe.tokenizer("a <a> cat").input_ids == list(plain[2][0])
    assert "<a>" not in pipe.tokenizer.get_vocab()
    assert _row(pipe, "<b>").eq(2).all()
    first.apply(pipe)
    assert _row(pipe, "<a>").eq(1).all() and _row(pipe, "<b>").eq(2).all()
    assert len(set(pipe.tokenizer.get_vocab().values())) == len(pipe.tokenizer)
    second.undo(pipe)
    assert _row(pipe, "<a>").eq(1).all()
    first.undo(pipe)
    assert _read(pipe) == plain
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight, weights)


@pytest.mark.filterwarnings("ignore:patch")
def test_a_word_in_part_is_not_left_to_chance() -> None:
    """A new row is the table's mean before a word fills it, whatever the state of torch's random numbers."""
    found = []
    for seed in (1, 2):
        pipe = tiny_pipeline_of("stable-diffusion")
        weights = pipe.text_encoder.get_input_embeddings().weight
        while len(pipe.tokenizer) < len(weights):  # so that the table has to grow
            pipe.tokenizer.add_tokens([f"<{len(pipe.tokenizer)}>"])
        mean = weights.detach().float().mean(0)
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        _word(pipe, "<a>", 1.0).apply(pipe, 0.5)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(_row(pipe, "<a>"))
        assert torch.allclose(found[-1], 0.5 * mean + 0.5, atol=1e-6)
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore:patch")
def test_words_that_stay() -> None:
    """Those of a baked patch, those of the user's own, and those below a user's own."""
    pipe = tiny_pipeline_of("stable-diffusion")
    first, second = _word(pipe, "<a>", 1.0), _word(pipe, "<b>", 2.0)
    first.bake(pipe)
    second.apply(pipe)
    second.undo(pipe)
    assert "<a>" in pipe.tokenizer.get_vocab() and "<b>" not in pipe.tokenizer.get_vocab()
    second.apply(pipe)
    pipe.tokenizer.add_tokens(["<mine>"])
    own = pipe.tokenizer.convert_tokens_to_ids("<mine>")
    second.undo(pipe)
    assert pipe.tokenizer.convert_tokens_to_ids("<mine>") == own
    assert "<b>" not in pipe.tokenizer.get_vocab()


@pytest.mark.filterwarnings("ignore:patch")
def test_a_patch_that_does_not_fit_leaves_no_word() -> None:
    pipe = tiny_pipeline_of("stable-diffusion")
    plain = _read(pipe)
    with pytest.raises(UserError):
        _word(pipe, "<a>", 1.0, width=3).apply(pipe)
    assert _read(pipe) == plain
