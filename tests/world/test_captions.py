"""Captions are true of their scene, closed over the vocabulary, and never say what cannot be seen."""

from __future__ import annotations

import dataclasses
import random
import re

import pytest

from mm.models.text import build_text_tokenizer, nearest_words, unknown_words
from mm.world import vocabulary as v
from mm.world.captions import COUNT_WORDS, caption
from mm.world.scene import Group, Scene, Sprite, group_relation, groups, is_held_out, relation_of, sample_scene
from mm.world.words import WORDS, split


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = random.Random(1)
    return [sample_scene(rng) for _ in range(600)]


def test_every_caption_word_is_in_the_vocabulary(scenes: list[Scene]) -> None:
    rng = random.Random(2)
    for scene in scenes:
        for detail in ("full", "partial", "plain"):
            text = caption(scene, rng, detail=detail)
            assert not unknown_words(text), text
    assert len(WORDS) == len(set(WORDS))
    assert len(WORDS) + 74 <= 1024


def test_the_tokenizer_agrees_with_split_and_round_trips(scenes: list[Scene]) -> None:
    tokenizer = build_text_tokenizer()
    for scene in scenes[:100]:
        text = caption(scene, random.Random(3))
        ids = tokenizer(text).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", *split(text), "<eos>"]
        assert len(ids) <= 64
    assert tokenizer("").input_ids == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert tokenizer("a blorp").input_ids[2] == tokenizer.unk_token_id
    assert nearest_words("tigr")[0] == "tiger"


def test_full_captions_name_what_shows_and_nothing_else(scenes: list[Scene]) -> None:
    rng = random.Random(4)
    for scene in scenes:
        text = caption(scene, rng, detail="plain")
        for group in groups(scene):
            noun = v.plural(group.object, group.count)
            assert re.search(rf"\b{noun}\b", text), (text, group)
            if group.colour:
                assert f"{group.colour} {noun}" in text
            if group.count > 1:
                assert COUNT_WORDS[group.count][0] in text
        assert (scene.style in text) == (scene.style != "cartoon")
        if not v.shows_colour(scene.style):
            assert not any(re.search(rf"\b{c}\b", text) for c in v.COLOURS), text


def test_relations_follow_genevals_rule() -> None:
    assert relation_of(-40, 0, 44, 44) == {"left of"}
    assert relation_of(0, 40, 44, 44) == {"below"}
    assert relation_of(40, -40, 44, 44) == {"right of", "above"}
    assert relation_of(8, 0, 44, 44) == frozenset()  # within a tenth of both sizes
    cat, dog = (Sprite(object=o, x=x, y=64, size=44) for o, x in (("cat", 30), ("dog", 90)))
    scene = Scene(sprites=(cat, dog))
    assert group_relation(scene, *groups(scene)) == {"left of"}


def test_held_out_compositions_stay_out_of_training(scenes: list[Scene]) -> None:
    assert not any(is_held_out(groups(s)) for s in scenes)
    rng = random.Random(5)
    assert all(is_held_out(groups(sample_scene(rng, held_out=True))) for _ in range(50))
    pairs = [(a, b) for i, a in enumerate(v.OBJECTS) for b in v.OBJECTS[i + 1 :]]
    share = sum(is_held_out((Group(object=a), Group(object=b))) for a, b in pairs) / len(pairs)
    assert 0.02 < share < 0.09


def test_lessons_make_the_scenes_they_name() -> None:
    rng = random.Random(3)
    for _ in range(60):
        assert [g.count for g in groups(sample_scene(rng, pair_share=1.0))] == [1, 1]
        (alone,) = groups(sample_scene(rng, count_share=1.0))
        assert alone.count >= 2
        assert 2 <= len(groups(sample_scene(rng, crowd_share=1.0))) <= 3
    free, mixed = ([len(sample_scene(rng, crowd_share=share).sprites) >= 5 for _ in range(300)] for share in (0.0, 0.8))
    assert sum(mixed) > 1.5 * sum(free)
    with pytest.raises(ValueError, match="at most 1"):
        sample_scene(rng, pair_share=0.6, crowd_share=0.6)


def test_scenes_keep_apart_and_inside(scenes: list[Scene]) -> None:
    for scene in scenes:
        for i, a in enumerate(scene.sprites):
            assert a.size // 2 <= a.x <= v.SIZE - a.size // 2
            assert a.size >= v.smallest_sprite(scene.style)
            assert a.colour is None or a.colour in v.colours_in(scene.style)
            for b in scene.sprites[i + 1 :]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.size + b.size) // 2


def test_bad_scenes_are_refused_with_the_value() -> None:
    with pytest.raises(ValueError, match="zebra"):
        Sprite(object="zebra", x=64, y=64, size=44)
    with pytest.raises(ValueError, match="mauve"):
        Sprite(object="cat", colour="mauve", x=64, y=64, size=44)
    with pytest.raises(ValueError, match="41"):
        Sprite(object="cat", x=64, y=64, size=41)
    with pytest.raises(ValueError, match="cubist"):
        Scene(sprites=(), style="cubist")


def test_a_scene_has_one_plain_caption():
    for seed in range(60):
        scene = sample_scene(random.Random(seed))
        said = {caption(scene, random.Random(luck), detail="plain") for luck in range(5)}
        assert len(said) == 1, said
        turned = dataclasses.replace(scene, sprites=scene.sprites[::-1])
        assert caption(turned, random.Random(9), detail="plain") in said
