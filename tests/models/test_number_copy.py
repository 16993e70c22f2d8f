"""Copied numbers: the pointed-at count decides among number words, and nothing else changes."""

from __future__ import annotations

import math

import pytest
import torch

from mm.models.number_copy import NumberCopy, number_bumps
from mm.models.trunk import Trunk

WORDS = [[3, 4], [5], [6]]  # a and one, two, three
PLACEHOLDER = 6


def sure(width: int = 4) -> NumberCopy:
    """Points at the token whose state is most similar to its own, and always copies."""
    copy = NumberCopy(width, WORDS, keys=width)
    with torch.no_grad():
        for linear in (copy.key_out, copy.query_out):
            linear.weight.copy_(20 * torch.eye(width))
            linear.bias.zero_()
        copy.gate_out.weight.zero_()
        copy.gate_out.bias.fill_(30)
    return copy


def test_numbers_are_weights_on_the_whole_ones_around_them():
    got = number_bumps(torch.tensor([[0.0, 1, 2.25, 3, 9]]), 3)
    want = [[0.0, 0, 0], [1, 0, 0], [0, 0.75, 0.25], [0, 0, 1], [0, 0, 0]]
    torch.testing.assert_close(got[0], torch.tensor(want))


def test_the_count_pointed_at_is_generated_and_other_words_keep_their_probability():
    torch.manual_seed(0)
    states, logits = torch.eye(4)[None], torch.randn(1, 4, 9)
    states = torch.cat(
        [states[:, :3], states[:, 1:2]], 1
    )  # three understanding tokens, then a word whose state is the second's
    places = torch.tensor([[True, True, True, False]])
    numbers = number_bumps(torch.tensor([[1.0, 3, 2]]), 3)
    copy = sure()
    with torch.no_grad():
        out = copy(logits, states, copy.pointer_targets(states, places, numbers, 3))
    before, after = logits[0, 3].softmax(-1), out[0, 3].softmax(-1)
    assert float(after[6] / after[[3, 4, 5, 6]].sum()) > 0.999
    others = [0, 1, 2, 7, 8]
    torch.testing.assert_close(after[others], before[others])
    torch.testing.assert_close(after[3:7].sum(), before[3:7].sum(), rtol=1e-4, atol=1e-5)
    one = copy(logits, states, copy.pointer_targets(states, places, number_bumps(torch.ones(1, 3), 3), 3))[
        0, 3
    ].softmax(-1)
    torch.testing.assert_close(one[3] / one[4], before[3] / before[4])  # among "a" and "one" the model decides


def test_without_counts_or_with_a_closed_gate_nothing_changes():
    torch.manual_seed(0)
    states, logits = torch.randn(2, 3, 4), torch.randn(2, 3, 9)
    places = torch.tensor([[True, False, False], [False, False, False]])
    copy = sure()
    empty = copy(logits, states, copy.pointer_targets(states, places, torch.zeros(1, 1, 3), 3))
    torch.testing.assert_close(empty.softmax(-1), logits.softmax(-1))
    assert torch.equal(copy(logits, states, copy.pointer_targets(states, places & False, None, 3)), logits)
    with torch.no_grad():
        copy.gate_out.bias.fill_(-30)
    closed = copy(logits, states, copy.pointer_targets(states, places, torch.ones(1, 1, 3) / 3, 3))
    torch.testing.assert_close(closed.softmax(-1), logits.softmax(-1))


def test_pointers_are_causal():
    states = torch.eye(4)[None]
    places = torch.tensor([[False, True, False, True]])
    copy = sure()
    logits = torch.zeros(1, 4, 9)
    numbers = number_bumps(torch.tensor([[2.0], [3.0]]), 3)
    out = copy(logits, states, copy.pointer_targets(states, places, numbers, 3)).softmax(-1)
    torch.testing.assert_close(out[0, 0], logits[0, 0].softmax(-1))
    assert float(out[0, 2, 5] / out[0, 2, 3:7].sum()) > 0.999  # the second token comes later


@pytest.fixture
def trunk() -> Trunk:
    torch.manual_seed(0)
    made = Trunk(width=32, depth=2, heads=2, reads=True, number_words=[[20, 21], [22], [23]], max_count=3)
    for parameter in made.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    return made.eval()


def test_a_text_read_in_pieces_copies_as_a_text_read_at_once(trunk):
    ids = torch.tensor([[2, 7, PLACEHOLDER, PLACEHOLDER, 30, 8, 31, 32, 33]])
    tokens = torch.cat([torch.randn(1, 2, 32), number_bumps(torch.tensor([[2.0, 3.0]]), 3)], -1)
    with torch.no_grad():
        whole, _ = trunk.read(ids, None, tokens)
        head, state = trunk.read(ids[:, :6], None, tokens)
        pieces = [head]
        for k in range(6, 9):
            logits, state = trunk.read(ids[:, k : k + 1], past=state)
            pieces.append(logits)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
        other = torch.cat([tokens[..., :32], number_bumps(torch.tensor([[1.0, 1.0]]), 3)], -1)
        changed = (trunk.read(ids, None, other)[0] - whole).abs().amax((0, 1)) > 1e-6
    assert set(changed.nonzero().flatten().tolist()) <= {20, 21, 22, 23}
    assert changed.any()


def test_left_padding_and_tokens_without_counts_change_nothing(trunk):
    ids = torch.tensor([[2, 7, PLACEHOLDER, 30, 8]])
    token = torch.cat([torch.randn(1, 1, 32), number_bumps(torch.tensor([[2.0]]), 3)], -1)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    mask = torch.tensor([[False] * 3 + [True] * 5])
    with torch.no_grad():
        alone, _ = trunk.read(ids, None, token)
        torch.testing.assert_close(trunk.read(padded, mask, token)[0][:, 3:], alone, rtol=1e-4, atol=1e-4)
        plain, _ = trunk.read(ids, None, token[..., :32])
    assert math.isfinite(float(plain.sum()))
    with pytest.raises(ValueError, match=r"tokens of width 34; this trunk reads 32, or 32 \+ 3 counts"):
        trunk.read(ids, None, token[..., :34])
    others = [k for k in range(plain.shape[-1]) if k not in (20, 21, 22, 23)]
    torch.testing.assert_close(plain[..., others], alone[..., others])
