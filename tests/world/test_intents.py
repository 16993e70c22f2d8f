"""What a turn of a conversation wants, and how changes are worded for the model."""

from __future__ import annotations

import random

import pytest

from mm.world import vocabulary as v
from mm.world.asking.edit_words import Change, Refused, Seen, change_of, steps_of
from mm.world.asking.intents import intent_of
from mm.world.captions import caption
from mm.world.edits import sample_edit
from mm.world.scene import Group, groups, sample_scene
from mm.world.words import split

SEEN = Seen(groups=(Group(object="cat", colour="red"), Group(object="tree")), topic="cat")


@pytest.mark.parametrize(
    ("say", "kind", "words"),
    [
        ("draw a cat", "draw", "a cat"),
        ("Can you please draw me a dog at night?", "draw", "a dog at night"),
        ("hi! draw two red cats on grass, watercolor style", "draw", "two red cats on grass, watercolor style"),
        ("I'd like to see three owls", "draw", "three owls"),
        ("how about a bus?", "draw", "a bus"),
        ("make a cat", "draw", "a cat"),
        ("draw a cat left of a dog", "draw", "a cat left of a dog"),
        ("cats on grass", "draw", "cats on grass"),
        ("draw a <mug> on grass", "draw", "a <mug> on grass"),
        ("draw an owl above the tree", "edit", "draw an owl above the tree"),
        ("now make it blue", "edit", "make it blue"),
        ("could it be blue?", "edit", "could it be blue"),
        ("at night please", "edit", "at night"),
        ("the same in neon style", "edit", "the same in neon style"),
        ("how many cats are there?", "ask", "how many cats are there?"),
        ("did you make it blue?", "ask", "did you make it blue?"),
        ("and the tree?", "ask", "and the tree?"),
        ("is it a zebra?", "ask", "is it a zebra?"),
        ("another one", "again", ""),
        ("draw it again", "again", ""),
        ("undo that, please", "undo", ""),
        ("no wait, remove the tree", "edit", "remove the tree"),
        ("scratch that, draw three apples", "draw", "three apples"),
        ("never mind, a dog", "draw", "a dog"),
        ("no i said two cats", "draw", "two cats"),
        ("I asked for two cats", "draw", "two cats"),
        ("wrong, make it blue", "edit", "make it blue"),
        ("hold on, make it green", "edit", "make it green"),
        ("no, make it red instead", "edit", "make it red instead"),
        ("no tree", "edit", "remove the tree"),
        ("sorry, I meant a dog", "draw", "a dog"),
        ("not a cat, a dog", "draw", "a dog"),
        ("better, but make it red", "edit", "make it red"),
        ("Hmm, is it red?", "ask", "is it red"),
        ("oops, undo", "undo", ""),
        ("previous picture", "undo", ""),
    ],
)
def test_the_words_of_a_turn_decide(say: str, kind: str, words: str) -> None:
    intent = intent_of(say, True)
    assert (intent.kind, intent.words) == (kind, words)


@pytest.mark.parametrize(
    ("say", "reply"),
    [
        ("hello", "Hello!"),
        ("hello, who are you?", "I am mm"),
        ("what can you do?", "I can draw"),
        ("thank you very much", "You are welcome!"),
        ("that looks great, thanks", "Thank you!"),
        ("ok", "What can I draw"),
        ("this is not what I asked for", "I am sorry."),
        ("never mind", "Nothing was changed."),
        ("no wait", "Nothing was changed."),
        ("no no no", "What can I draw"),
        ("nice, thanks", "Thank you!"),
        ("draw something", "Say what to draw"),
        ("i had pasta for lunch", "I do not understand this."),
        ("dibuja un gato", "I do not understand this."),
        ("!!!", "I do not understand this."),
    ],
)
def test_what_asks_for_no_picture_gets_a_short_reply(say: str, reply: str) -> None:
    intent = intent_of(say, True)
    assert intent.kind == "say" and intent.reply.startswith(reply)


def test_without_a_picture_nothing_can_be_changed_or_asked() -> None:
    for say in ("make it blue", "how many cats are there?", "describe it"):
        intent = intent_of(say, False)
        assert intent.kind == "say" and intent.reply.startswith("There is no picture yet.")
    assert intent_of("draw an owl above the tree", False).kind == "draw"


def test_every_caption_can_be_asked_for_in_every_trained_wording() -> None:
    rng = random.Random(1)
    for _ in range(60):
        words = caption(sample_scene(rng), rng)
        for wording in ("draw {}", "please draw {}", "show me {}", "can you draw {}?", "i would like {}", "{}"):
            intent = intent_of(wording.format(words), True)
            assert (intent.kind, intent.words) == ("draw", words), wording


CONTENT = {w for n in (*v.ALL_OBJECTS, *v.PLURALS.values(), *v.COLOURS, *v.STYLES, *v.BACKGROUNDS) for w in split(n)}
CONTENT |= {"left", "right", "top", "bottom", "above", "below"}


def test_every_trained_instruction_keeps_its_content() -> None:
    rng = random.Random(2)
    for _ in range(300):
        edit = sample_edit(rng)
        intent = intent_of(edit.instruction, True)
        assert intent.kind == "edit", edit.instruction
        change = change_of(intent.words, Seen(groups=groups(edit.source)))
        assert isinstance(change, Change), edit.instruction
        assert CONTENT & set(split(change.words)) == CONTENT & set(split(edit.instruction)), edit.instruction


@pytest.mark.parametrize(
    ("say", "words"),
    [
        ("it should be blue", "make the cat blue"),
        ("color the tree blue", "make the tree blue"),
        ("change its colour to pink", "make the cat pink"),
        ("blue instead", "make the cat blue"),
        ("get rid of the tree", "remove the tree"),
        ("make the cat a dog", "replace the cat with a dog"),
        ("a dog instead of the cat", "replace the cat with a dog"),
        ("put an owl on the left of it", "add an owl left of the cat"),
        ("one more cat", "add a cat"),
        ("move it up", "move the cat to the top"),
        ("turn it into a sketch", "make it sketch style"),
        ("make it snowy", "change the background to snow"),
        ("remove the background", "change the background to plain"),
    ],
)
def test_changes_come_in_many_wordings(say: str, words: str) -> None:
    change = change_of(say, SEEN)
    assert isinstance(change, Change) and change.words == words


@pytest.mark.parametrize(
    ("say", "why"),
    [
        ("make it bigger", "I cannot change sizes"),
        ("make everything red", "I change one kind of thing at a time: the cat or the tree?"),
        ("put a hat on it", "I do not know what a hat is."),
        ("make the sky blue", "I do not understand this change."),
        ("make the background blue", "I do not understand this change."),
        ("make it less red", "I do not understand this change."),
        ("swap the cat and the tree", "I do not understand this change."),
    ],
)
def test_what_cannot_be_changed_is_refused_and_not_made_in_part(say: str, why: str) -> None:
    change = change_of(say, SEEN)
    assert isinstance(change, Refused) and change.reply.startswith(why)
    assert "I can recolour" in change.reply or "one kind" in change.reply


def test_several_changes_in_a_sentence_are_several_steps() -> None:
    assert steps_of("make it blue and put it in the snow") == ["make it blue", "put it in the snow"]
    assert steps_of("make the cat and the dog blue") == ["make the cat and the dog blue"]
    assert steps_of("a cat on grass, then add a dog", drawn=True) == ["a cat on grass", "add a dog"]
    assert steps_of("a cat and a set of keys, two cats", drawn=True) == ["a cat and a set of keys, two cats"]


def test_it_is_the_topic_the_only_thing_or_the_first() -> None:
    cats, tree = Group(object="cat", count=2), Group(object="tree")
    assert Seen(groups=(cats, tree), topic="tree").pronoun(False) == ("tree", 1)
    assert Seen(groups=(cats, tree), topic="tree").pronoun(True) == ("cat", 2), "they are several"
    assert Seen(groups=(tree,)).pronoun(True) == ("tree", 1)
    assert Seen(groups=(tree, Group(object="cat"))).pronoun(True) is None
    assert Seen(topic="cat").pronoun(False) is None
