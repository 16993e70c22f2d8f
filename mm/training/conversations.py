"""Conversations about scenes, as training data for reading, editing and chatting.

Design choices
- A conversation starts with a given or a drawn picture, may change it by an edit, and asks questions about the current
  picture; one row of tokens holds half a dozen answers, each with its own labels.
- A request for a description is answered by the plain, full caption: everything visible, in one wording and one order.
- Questions are sampled twice a scene, and kinds that are learned early are sampled rarely: what needs finding one
  object among others (count, colour, position) is learned slowest.
- A tenth of the conversations begins with small talk; questions without a picture are answered by saying so.
- A single object of a picture may be called "it", in questions and in edits.
- Numbers, colours and objects are label-smoothed within their kind (`word_kinds`). Without it a model that never sees
  three clocks learns that "three" is impossible of clocks; with it, every wrong number is equally unlikely.
- A scene may be described with another count of one of its objects (`with_other_count`), which also overrides the
  counter's counts: replies must follow the counter.
- Turns carry the scene that they refer to (an edit's is its target), and descriptions the scene that they describe, as
  labels (`mm.training.scene_labels`).

In dialogues of this module the pictures are scenes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from mm.models.dialogue import Dialogue, WordKinds
from mm.world import vocabulary as v
from mm.world.captions import caption
from mm.world.edits import Edit
from mm.world.questions import questions
from mm.world.scene import Scene, Sprite, add_sprite, group_relation, groups, is_held_out, members

NewDialogue = Callable[[], Dialogue]
DESCRIBE = (
    "describe the picture",
    "describe the image",
    "describe it",
    "what do you see?",
    "what does the picture show?",
)
DRAW = ("draw {}", "draw {}", "please draw {}", "show me {}", "can you draw {}?", "i would like {}")
SMALL_TALK: tuple[tuple[str, str], ...] = (
    ("hello", "hello! what can i draw for you?"),
    ("hi", "hello! what can i draw for you?"),
    ("thanks", "you are welcome!"),
    ("thank you", "you are welcome!"),
    ("what can you do?", "i can draw, change and describe a picture."),
    ("what are you?", "i can draw, change and describe a picture."),
    ("ok", "what can i draw for you?"),
    ("good", "thank you!"),
    ("that is great", "thank you!"),
    ("nice", "thank you!"),
)
ASKED = {"style": 0.3, "background": 0.3, "existence": 0.5}  # sampling rates of kinds that are learned early
# Scenes to read. Pairs of single objects train relations, and crowds, rare by chance, train long descriptions.
READ: dict[str, Any] = {"default_weight": 3, "pair_share": 0.15, "count_share": 0.2, "crowd_share": 0.25}
NO_PICTURE = "sorry, there is no picture. what can i draw for you?"


def number_words(number: Callable[[str], int]) -> list[list[int]]:
    """Token ids of the words that say one, two, three and four; `number` gives a word's id."""
    return [[number("a"), number("an"), number("one")], *([number(word)] for word in ("two", "three", "four"))]


def word_kinds(number: Callable[[str], int], size: int) -> WordKinds:
    """The kinds numbers, colours, objects, and objects in the plural.

    Args:
        number: Gives a word's token id.
        size: Rows of the vocabulary.
    """
    plurals = [v.PLURALS[name] for name in v.ALL_OBJECTS]
    of, spread = torch.full((size,), -1), torch.zeros(4, size)
    for kind, words in enumerate((("a", "an", "one", "two", "three", "four"), v.COLOURS, v.ALL_OBJECTS, plurals)):
        ids = sorted({number(word) for word in words})
        of[ids], spread[kind, ids] = kind, 1 / len(ids)
    return WordKinds(of_V=of, spread_KV=spread)


def ask(
    dialogue: Dialogue, scene: Scene, rng: random.Random, most: int, objects: Sequence[str] = v.OBJECTS
) -> Dialogue:
    """Adds up to `most` questions about `scene` with their answers, and now and then a description."""
    asked = {qa.question: qa for _ in range(2) for qa in questions(scene, rng, objects=objects)}
    turns: list[tuple[str, str | None]] = [
        (q, qa.answer) for q, qa in asked.items() if rng.random() < ASKED.get(qa.kind, 1.0)
    ]
    rng.shuffle(turns)
    turns = turns[:most]
    if rng.random() < 0.4:
        # Later answers could be copied from a description, so most of the time it comes last.
        place = len(turns) if rng.random() < 0.8 else rng.randrange(len(turns) + 1)
        turns.insert(place, (rng.choice(DESCRIBE), None))
    for question, answer in turns:
        if answer is None:
            describe(dialogue.user(question), scene, rng)
        else:
            dialogue.user(question, about=scene).says(answer)
    return dialogue


def describe(dialogue: Dialogue, scene: Scene, rng: random.Random) -> Dialogue:
    """Adds a reply that describes `scene`."""
    return dialogue.says(caption(scene, rng, detail="plain"), describes=scene)


def draw_words(scene: Scene, rng: random.Random) -> str:
    """A request for a picture of `scene`."""
    detail = "partial" if rng.random() < 0.5 else "full"
    return rng.choice(DRAW).format(caption(scene, rng, detail=detail))  # type: ignore[arg-type]


def with_pronoun(edit: Edit, rng: random.Random) -> str:
    """The edit's instruction; a source's only group may be called "it" or "them"."""
    parts = groups(edit.source)
    if len(parts) != 1 or rng.random() < 0.5:
        return edit.instruction
    name = f"the {v.plural(parts[0].object, parts[0].count)}"
    return edit.instruction.replace(name, "it" if parts[0].count == 1 else "them")


def begin(dialogue: Dialogue, scene: Scene, rng: random.Random, *, drawn: bool) -> Dialogue:
    """Adds the first picture: drawn, or given by the user with a first question."""
    if rng.random() < 0.1:
        words, reply = rng.choice(SMALL_TALK)
        dialogue.user(words).says(reply)
    if drawn:
        return dialogue.user(draw_words(scene, rng), about=scene).starts_drawing().has_drawn(scene)
    first = rng.choice(questions(scene, rng))
    if rng.random() < 0.5:
        return describe(dialogue.user(rng.choice(DESCRIBE), scene), scene, rng)
    return dialogue.user(first.question, scene, about=scene).says(first.answer)


def reading(new: NewDialogue, scene: Scene, rng: random.Random) -> Dialogue:
    """One picture and questions about it."""
    if rng.random() < 0.03:
        nothing = new().user(rng.choice([*DESCRIBE, questions(scene, rng)[0].question])).says(NO_PICTURE)
        return begin(nothing, scene, rng, drawn=True)
    return ask(begin(new(), scene, rng, drawn=rng.random() < 0.4), scene, rng, most=9)


def changing(new: NewDialogue, edit: Edit, rng: random.Random) -> Dialogue:
    """A picture, an edit of it, and questions about the result."""
    dialogue = begin(new(), edit.source, rng, drawn=rng.random() < 0.6)
    if rng.random() < 0.3:
        ask(dialogue, edit.source, rng, most=1)
    dialogue.user(with_pronoun(edit, rng), about=edit.target).starts_drawing().has_drawn(edit.target)
    return ask(dialogue, edit.target, rng, most=4)


def with_other_count(scene: Scene, rng: random.Random) -> Scene:
    """`scene` with another count of one of its groups, the same otherwise; `scene` itself where that is not possible.

    The result is never a held-out composition.
    """
    parts = groups(scene)
    choices = [(g, n) for g in parts for n in range(1, v.MAX_COUNT + 1) if n != g.count]
    rng.shuffle(choices)
    for group, number in choices:
        changed = _with_number(scene, members(scene, group), number, rng)
        if changed is None or is_held_out(groups(changed)):
            continue
        if all(group_relation(scene, a, b) == group_relation(changed, a, b) for a in parts for b in parts if a != b):
            return changed
    return scene


def _with_number(scene: Scene, same: list[Sprite], number: int, rng: random.Random) -> Scene | None:
    """The scene with `number` sprites of the group `same`; None where there is no free place."""
    gone = set(rng.sample(same, len(same) - number)) if number < len(same) else set()
    changed: Scene | None = replace(scene, sprites=tuple(s for s in scene.sprites if s not in gone))
    for _ in range(number - len(same)):
        changed = add_sprite(changed, same[0], rng) if changed is not None else None
    return changed


def edit_prompt(new: NewDialogue, edit: Edit, rng: random.Random) -> Dialogue:
    """The prompt of an edit: the picture and its instruction, or a conversation that ends in it."""
    if rng.random() < 0.5:
        return new().user(with_pronoun(edit, rng), edit.source, about=edit.target).starts_drawing()
    dialogue = begin(new(), edit.source, rng, drawn=rng.random() < 0.8)
    if rng.random() < 0.3:
        ask(dialogue, edit.source, rng, most=1)
    return dialogue.user(with_pronoun(edit, rng), about=edit.target).starts_drawing()
