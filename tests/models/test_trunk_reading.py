"""The reading trunk: words after understanding tokens, states to continue from, source pictures."""

from __future__ import annotations

import pytest
import torch
from tiny_trunk import CONFIG, awake, same, some_ids, some_latents

from mm.models import layers
from mm.models.cache import PromptCache
from mm.models.trunk import Trunk

PLACEHOLDER = 6


@pytest.fixture
def trunk() -> Trunk:
    torch.manual_seed(0)
    return awake(Trunk(**CONFIG, reads=True, understanding_token=PLACEHOLDER))


def words(*ids: int) -> torch.Tensor:
    return torch.tensor([ids])


def test_text_continued_from_a_state_equals_text_read_at_once(trunk):
    ids = words(1, PLACEHOLDER, PLACEHOLDER, PLACEHOLDER, 9, 12, 30, 2, 5)
    tokens = torch.randn(1, 3, 32)
    logits, whole = trunk.read(ids, understanding_NSD=tokens)
    first, state = trunk.read(ids[:, :6], understanding_NSD=tokens)
    second, state = trunk.read(ids[:, 6:8], past=state)
    third, state = trunk.read(ids[:, 8:], past=state)
    assert same(logits, torch.cat([first, second, third], 1))
    assert len(state) == len(whole) == 9
    for a, b in zip(state.prompt.keys + state.prompt.values, whole.prompt.keys + whole.prompt.values, strict=True):
        assert same(a, b)


def test_rows_of_other_lengths_may_be_padded_on_either_side(trunk):
    ids = some_ids(1, 5).clamp_min(7)
    alone = trunk.read(ids)[0]
    pads, hidden = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.bool)
    shown = torch.ones(1, 5, dtype=torch.bool)
    left = trunk.read(torch.cat([pads, ids], 1), torch.cat([hidden, shown], 1))[0]
    right = trunk.read(torch.cat([ids, pads], 1), torch.cat([shown, hidden], 1))[0]
    assert same(alone, left[:, 2:])
    assert same(alone, right[:, :5])
    # and goes on: the state of a left-padded row continues at the right positions
    more = words(9, 11)
    state_a, state_b = trunk.read(ids)[1], trunk.read(torch.cat([pads, ids], 1), torch.cat([hidden, shown], 1))[1]
    assert same(trunk.read(more, past=state_a)[0], trunk.read(more, past=state_b)[0])


def test_tokens_of_a_picture_attend_to_each_other_and_words_stay_causal(trunk):
    ids, tokens = words(1, PLACEHOLDER, PLACEHOLDER, 9, PLACEHOLDER, PLACEHOLDER, 8), torch.randn(2, 2, 32)
    changed = tokens.clone()
    changed[0, 1] = torch.randn(32)  # the first picture's second token
    before, after = trunk.read(ids, understanding_NSD=tokens)[0], trunk.read(ids, understanding_NSD=changed)[0]
    assert same(before[:, 0], after[:, 0])  # the word before the picture
    assert not same(before[:, 1], after[:, 1])  # its first token attends to its second
    changed = tokens.clone()
    changed[1, 1] = torch.randn(32)  # the second picture
    after = trunk.read(ids, understanding_NSD=changed)[0]
    assert same(before[:, :4], after[:, :4])  # neither the first picture nor the word between
    assert not same(before[:, 4], after[:, 4])


def test_a_drawn_picture_attends_to_understanding_tokens(trunk):
    ids, tokens = words(1, PLACEHOLDER, PLACEHOLDER, 9), torch.randn(1, 2, 32)
    latents, sigma = some_latents(1), torch.tensor([0.6])
    a = trunk(latents, sigma, trunk.encode_text(ids, understanding_NSD=tokens))
    b = trunk(latents, sigma, trunk.encode_text(ids, understanding_NSD=-tokens))
    assert not same(a, b)


def test_the_source_picture_is_the_picture_stream_at_sigma_zero(trunk):
    """Against the forward pass itself: the same tokens, without a mode token, at sigma 0, marked as a source."""
    prompt, source = trunk.encode_text(some_ids(2, 5)), some_latents(2)
    cache = trunk.encode_picture(source, prompt)
    assert cache.mask_BT.shape == (2, 5 + 16)
    x = trunk.latent_in(source.flatten(2).transpose(1, 2)) + trunk.place + trunk.source_mark
    shared = trunk._modulation(torch.zeros(2, 1))
    angles = layers.picture_angles(4, 4, 16, x.device)
    for i, layer in enumerate(trunk.picture_layers):
        mod = shared + layer.modulation
        normed = layers.modulate(layer.norm_1(x), mod[..., 0, :], mod[..., 1, :])
        k = layers.rotate(layer.attn.norm_k(layer.attn.to_k(normed).unflatten(-1, (2, -1))), angles)
        assert same(cache.keys[i][:, 5:], k)
        assert torch.equal(cache.keys[i][:, :5], prompt.keys[i])
        mask = torch.ones(2, 1, 1, 21, dtype=torch.bool)
        x = layer(x, shared, angles, prompt.keys[i], prompt.values[i], mask)


def test_guidance_can_mix_prompts_with_and_without_a_source(trunk):
    prompt, source = trunk.encode_text(some_ids(1, 5)), some_latents(1)
    with_source = trunk.encode_picture(source, prompt)
    both = PromptCache.cat([with_source, prompt])
    latents, sigma = some_latents(1), torch.tensor([0.8])
    out = trunk(latents.repeat(2, 1, 1, 1), sigma.repeat(2), both)
    assert same(out[:1], trunk(latents, sigma, with_source))
    assert same(out[1:], trunk(latents, sigma, prompt))
    assert not same(out[:1], out[1:])


def test_wrong_input_is_named(trunk):
    with pytest.raises(ValueError, match=r"2 placeholders in the text, but understanding tokens of shape \(1, 3, 32\)"):
        trunk.read(words(1, PLACEHOLDER, PLACEHOLDER), understanding_NSD=torch.randn(1, 3, 32))
    state = trunk.read(some_ids(1, 100))[1]
    with pytest.raises(ValueError, match="130 tokens is longer than the model's 128"):
        trunk.read(some_ids(1, 30), past=state)
    with pytest.raises(ValueError, match="2 pictures but 1 prompts"):
        trunk.encode_picture(some_latents(2), trunk.encode_text(some_ids(1, 5)))
    plain = Trunk(**CONFIG)
    with pytest.raises(ValueError, match="draws only"):
        plain.read(some_ids(1, 5))
    with pytest.raises(ValueError, match="takes no source pictures"):
        plain.encode_picture(some_latents(1), plain.encode_text(some_ids(1, 5)))
