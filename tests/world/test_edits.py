"""An edit changes what it says and nothing else, in scenes and in pixels."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import pytest
import torch

from mm.models.text import unknown_words
from mm.world import vocabulary as v
from mm.world.edits import KINDS, Edit, sample_edit
from mm.world.render import render
from mm.world.scene import Sprite, groups, is_free, is_held_out


@pytest.fixture(scope="module")
def edits() -> list[Edit]:
    rng = random.Random(0)
    return [sample_edit(rng, kind) for kind in KINDS for _ in range(60)]


def changed(edit: Edit) -> tuple[set[Sprite], set[Sprite]]:
    return set(edit.source.sprites) - set(edit.target.sprites), set(edit.target.sprites) - set(edit.source.sprites)


def test_words_and_rules(edits: list[Edit]) -> None:
    for edit in edits:
        assert not unknown_words(edit.instruction), edit.instruction
        assert not is_held_out(groups(edit.target))
        assert edit.target.sprites
        for i, s in enumerate(edit.target.sprites):
            assert s.size >= v.smallest_sprite(edit.target.style)
            assert s.colour is None or s.colour in v.colours_in(edit.target.style)
            assert is_free(edit.target.sprites[:i], s.x, s.y, s.size)


def test_only_what_was_told_differs(edits: list[Edit]) -> None:
    for edit in edits:
        gone, new = changed(edit)
        same_ground = edit.source.background == edit.target.background
        same_style = edit.source.style == edit.target.style
        assert same_style == (edit.kind != "restyle")
        if edit.kind != "restyle":
            assert same_ground == (edit.kind != "background")
        if edit.kind == "restyle":  # a style that shows less drops what it does not show, and nothing else
            shown = v.shows_background(edit.target.style)
            assert edit.target.background == (edit.source.background if shown else "plain")
            for a, b in zip(edit.source.sprites, edit.target.sprites, strict=True):
                colour = a.colour if v.shows_colour(edit.target.style) else None
                assert b == dataclasses.replace(a, colour=colour)
        elif edit.kind == "background":
            assert not gone
            assert not new
        elif edit.kind == "remove":
            assert gone
            assert not new
        elif edit.kind == "add":
            assert not gone
            assert len(new) == 1
        else:
            kept = {"recolour": ("object", "x", "y", "size"), "replace": ("colour", "x", "y", "size")}
            fields = kept.get(edit.kind, ("object", "colour", "size"))
            assert sorted(tuple(getattr(s, f) or "" for f in fields) for s in gone) == sorted(
                tuple(getattr(s, f) or "" for f in fields) for s in new
            )


def test_every_style_can_be_asked_of_a_picture() -> None:
    """Also sketch and blueprint, which show neither tints nor grounds."""
    rng = random.Random(0)
    asked = Counter(sample_edit(rng, "restyle").target.style for _ in range(400))
    assert set(asked) == set(v.STYLES)
    assert min(asked["sketch"], asked["blueprint"]) > 20, asked


def test_pixels_outside_the_touched_sprites_stay(edits: list[Edit]) -> None:
    checked = 0
    for edit in edits:
        if edit.source.style != "cartoon" or edit.kind in ("restyle", "background"):
            continue
        before, after = render([edit.source, edit.target])
        touched = torch.zeros(v.SIZE, v.SIZE, dtype=torch.bool)
        for s in set.union(*changed(edit)):
            half = s.size // 2 + 1
            touched[max(0, s.y - half) : s.y + half, max(0, s.x - half) : s.x + half] = True
        assert torch.equal(before[:, ~touched], after[:, ~touched]), edit.instruction
        assert not torch.equal(before, after)
        checked += 1
    assert checked > 50


def test_moves_go_the_way_they_are_told() -> None:
    rng = random.Random(1)
    for _ in range(800):
        edit = sample_edit(rng, "move")
        (old,), (new,) = changed(edit)
        shift = {"left": old.x - new.x, "right": new.x - old.x, "top": old.y - new.y, "bottom": new.y - old.y}
        assert shift[edit.instruction.split()[-1]] >= 32, edit


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="explode"):
        sample_edit(random.Random(0), "explode")
