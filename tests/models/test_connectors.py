"""Connectors: tokens are in reading order, and a counter trained on some counts of objects predicts the others."""

from __future__ import annotations

import pytest
import torch

from mm.models.connectors import Connector, SameObjectCounter
from mm.models.number_copy import number_bumps
from mm.training.readouts import same_kind_loss
from mm.training.scene_labels import same_kind_labels
from mm.world.scene import Scene, Sprite

KINDS, TOKENS = 24, 16


def test_an_understanding_token_is_made_of_its_own_four_tokens():
    torch.manual_seed(0)
    connector = Connector(in_channels=3, width=8, hidden=8, side=4)
    tokens = torch.randn(1, 16, 3)
    moved = tokens.clone()
    moved[0, 2 * 4 + 3] += 1  # row 2, column 3: the last of 2 x 2
    changed = (connector(tokens) - connector(moved)).abs().sum(-1)[0] > 0
    assert changed.tolist() == [False, False, False, True]
    latents = tokens.transpose(1, 2).view(1, 3, 4, 4)
    torch.testing.assert_close(connector(latents), connector(tokens))


def sure_counter() -> SameObjectCounter:
    """A counter with certain predictions: channels 0 and 1 are two kinds, channel 2 is a centre."""
    counter = SameObjectCounter(in_channels=4, hidden=4, keys=2)
    counter.norm = torch.nn.Identity()
    with torch.no_grad():
        counter.up.weight.copy_(100 * torch.eye(4))
        counter.up.bias.zero_()
        counter.sharpness.copy_(torch.tensor([200.0, -100.0]))  # the same direction or not
        counter.key_out.weight.copy_(torch.eye(2, 4))
        counter.key_out.bias.zero_()
        counter.centre_out.weight.copy_(torch.tensor([[0.0, 0, 200, 0]]))
        counter.centre_out.bias.fill_(-100)
    return counter


def test_pairs_of_centres_of_one_kind_are_found():
    states = torch.tensor([[[1.0, 0, 1, 0], [0, 1, 1, 0], [1, 0, 1, 0], [1, 0, 0, 0]]])  # a, b, a, and an a's edge
    with torch.no_grad():
        same = sure_counter()(states)
    torch.testing.assert_close(same[0], torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]))


def test_tokens_carry_predicted_counts_or_their_override():
    torch.manual_seed(0)
    connector = Connector(in_channels=1, width=5, hidden=4, side=4, counter_keys=2)
    connector.counter = sure_counter()
    grid = torch.zeros(1, 4, 4, 1)
    grid[0, :, 0] = grid[0, :, 2] = 1  # four tokens of kind 0, all of them centres
    tokens = grid.view(2, 2, 2, 2, 1).transpose(1, 2).reshape(1, 16, 1)  # as a grid of tokens
    plain = Connector(in_channels=1, width=5, hidden=4, side=4)
    plain.load_state_dict(connector.state_dict(), strict=False)
    with torch.no_grad():
        counted = connector(tokens)
        overridden = connector(tokens, torch.tensor([[1.0, 2.5, 6, 0]]))
        assert torch.equal(counted[..., :5], plain(tokens))
    assert torch.equal(counted[0, :, 5:], number_bumps(torch.full((4,), 4.0)[None], 6)[0])
    assert torch.equal(overridden[..., 5:], number_bumps(torch.tensor([[1.0, 2.5, 6, 0]]), 6))


def test_labels_are_the_groups_of_a_scene():
    two, other = ({"object": "owl", "size": 28}, {"object": "fox", "size": 28})
    sprites = [Sprite(x=16, y=16, **two), Sprite(x=112, y=16, **two), Sprite(x=48, y=112, **other)]
    same = same_kind_labels(Scene(sprites=tuple(sprites)), TOKENS)
    assert same.nonzero().tolist() == [[0, 0], [0, 3], [3, 0], [3, 3], [13, 13]]
    red = Sprite(object="owl", colour="red", x=16, y=16, size=28)
    assert same_kind_labels(Scene(sprites=(red, *sprites[1:])), TOKENS).sum() == 3  # of another colour: another group


def _pictures(n: int, numbers: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """States of tokens (n, S, KINDS + 1) that hold a kind or nothing, and which are of one kind."""
    states, same = torch.zeros(n, TOKENS, KINDS + 1), torch.zeros(n, TOKENS, TOKENS)
    for i in range(n):
        kind = int(torch.randint(KINDS, (), generator=generator))
        count = int(numbers[kind, torch.randint(numbers.shape[1], (), generator=generator)])
        here = torch.randperm(TOKENS, generator=generator)[:count]
        states[i, here, kind] = states[i, here, KINDS] = 1
        same[i][here[:, None], here[None]] = 1
    return states, same


def test_counts_generalize_to_counts_never_seen_of_a_kind():
    """Each kind comes in two of three numbers; those of the third are counted right."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    third = torch.arange(KINDS) % 3 + 1
    seen = torch.stack([third % 3 + 1, (third + 1) % 3 + 1], 1)
    counter = SameObjectCounter(KINDS + 1, 2 * KINDS, KINDS)
    learner = torch.optim.AdamW(counter.parameters(), 1e-2)
    for _ in range(500):
        states, same = _pictures(32, seen, generator)
        loss = same_kind_loss(counter(states), same)
        learner.zero_grad()
        loss.backward()
        learner.step()
    states, same = _pictures(200, third[:, None], generator)
    with torch.no_grad():
        counts = counter(states).sum(-1).amax(-1).round()
    assert (counts == same.sum(-1).amax(-1)).float().mean() > 0.95


def test_odd_sides_and_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="side 3 must be even"):
        Connector(in_channels=4, side=3)
    with pytest.raises(ValueError, match=r"tokens of shape \(1, 63, 4\); this connector reads 64 of 4"):
        Connector(in_channels=4)(torch.zeros(1, 63, 4))
    uncounted = Connector(in_channels=4, counter_keys=2)
    uncounted.counter = None
    with pytest.raises(ValueError, match="counter was removed; pass count_override_BS"):
        uncounted(torch.zeros(1, 64, 4))
