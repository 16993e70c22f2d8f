"""Connectors: looks stand in reading order, and a counter that learned kinship on some things counts others."""

from __future__ import annotations

import pytest
import torch

from mm.models.connectors import Alike, Connector
from mm.models.number_copy import number_bumps
from mm.training.grounding import kin_loss, kin_truth
from mm.world.scene import Scene, Sprite

KINDS, LOOKS = 24, 16


def test_a_look_is_made_of_its_own_four_tokens():
    torch.manual_seed(0)
    connector = Connector(in_channels=3, width=8, hidden=8, side=4)
    tokens = torch.randn(1, 16, 3)
    moved = tokens.clone()
    moved[0, 2 * 4 + 3] += 1  # row 2, column 3: the last of 2 x 2 looks
    changed = (connector(tokens) - connector(moved)).abs().sum(-1)[0] > 0
    assert changed.tolist() == [False, False, False, True]
    grid = tokens.transpose(1, 2).view(1, 3, 4, 4)
    torch.testing.assert_close(connector(grid), connector(tokens))


def sure_counter() -> Alike:
    """A counter of two kinds that is never in doubt: channels 0 and 1 are the kinds, channel 2 is a centre."""
    counter = Alike(in_channels=4, hidden=4, keys=2)
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


def test_kin_are_pairs_of_centres_of_one_kind():
    states = torch.tensor([[[1.0, 0, 1, 0], [0, 1, 1, 0], [1, 0, 1, 0], [1, 0, 0, 0]]])  # a, b, a, and an a's edge
    with torch.no_grad():
        kin = sure_counter()(states)
    torch.testing.assert_close(kin[0], torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]))


def test_looks_bring_the_numbers_that_are_counted_or_told():
    torch.manual_seed(0)
    connector = Connector(in_channels=1, width=5, hidden=4, side=4, alike=2)
    connector.counter = sure_counter()
    look = torch.zeros(1, 4, 4, 1)
    look[0, :, 0] = look[0, :, 2] = 1  # four looks of kind 0, all of them centres
    tokens = look.view(2, 2, 2, 2, 1).transpose(1, 2).reshape(1, 16, 1)  # as a grid of tokens
    plain = Connector(in_channels=1, width=5, hidden=4, side=4)
    plain.load_state_dict(connector.state_dict(), strict=False)
    with torch.no_grad():
        counted = connector(tokens)
        told = connector(tokens, torch.tensor([[1.0, 2.5, 6, 0]]))
        assert torch.equal(counted[..., :5], plain(tokens))
    assert torch.equal(counted[0, :, 5:], number_bumps(torch.full((4,), 4.0)[None], 6)[0])
    assert torch.equal(told[..., 5:], number_bumps(torch.tensor([[1.0, 2.5, 6, 0]]), 6))


def test_kin_is_a_group_of_a_scene():
    two, other = ({"object": "owl", "size": 28}, {"object": "fox", "size": 28})
    sprites = [Sprite(x=16, y=16, **two), Sprite(x=112, y=16, **two), Sprite(x=48, y=112, **other)]
    kin = kin_truth(Scene(sprites=tuple(sprites)), LOOKS)
    assert kin.nonzero().tolist() == [[0, 0], [0, 3], [3, 0], [3, 3], [13, 13]]
    red = Sprite(object="owl", colour="red", x=16, y=16, size=28)
    assert kin_truth(Scene(sprites=(red, *sprites[1:])), LOOKS).sum() == 3  # of another colour: another group


def _pictures(n: int, numbers: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """States of looks (n, S, KINDS + 1) that hold a kind or nothing, and their kin."""
    states, kin = torch.zeros(n, LOOKS, KINDS + 1), torch.zeros(n, LOOKS, LOOKS)
    for i in range(n):
        kind = int(torch.randint(KINDS, (), generator=generator))
        count = int(numbers[kind, torch.randint(numbers.shape[1], (), generator=generator)])
        here = torch.randperm(LOOKS, generator=generator)[:count]
        states[i, here, kind] = states[i, here, KINDS] = 1
        kin[i][here[:, None], here[None]] = 1
    return states, kin


def test_what_was_never_seen_three_times_is_counted_as_well():
    """Each kind comes in two of three numbers; those of the third are counted right."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    third = torch.arange(KINDS) % 3 + 1
    seen = torch.stack([third % 3 + 1, (third + 1) % 3 + 1], 1)
    counter = Alike(KINDS + 1, 2 * KINDS, KINDS)
    learner = torch.optim.AdamW(counter.parameters(), 1e-2)
    for _ in range(500):
        states, kin = _pictures(32, seen, generator)
        loss = kin_loss(counter(states), kin)
        learner.zero_grad()
        loss.backward()
        learner.step()
    states, kin = _pictures(200, third[:, None], generator)
    with torch.no_grad():
        told = counter(states).sum(-1).amax(-1).round()
    assert (told == kin.sum(-1).amax(-1)).float().mean() > 0.95


def test_odd_sides_and_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="side 3 must be even"):
        Connector(in_channels=4, side=3)
    with pytest.raises(ValueError, match=r"tokens of shape \(1, 63, 4\); this connector reads 64 of 4"):
        Connector(in_channels=4)(torch.zeros(1, 63, 4))
    silent = Connector(in_channels=4, alike=2)
    silent.counter = None
    with pytest.raises(ValueError, match="counter was taken out: give it the numbers"):
        silent(torch.zeros(1, 64, 4))
