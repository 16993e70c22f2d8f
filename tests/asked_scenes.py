"""A model without faults for the questions that mm-tiny was trained on; it answers from the scene."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from mm.evaluation.understand import to_pictures
from mm.world import vocabulary as v
from mm.world.asking.parse import parse_question
from mm.world.asking.plans import plan, run
from mm.world.captions import caption
from mm.world.scene import Scene, group_relation, groups

_SINGULAR = {plural: name for name, plural in v.PLURALS.items()} | {name: name for name in v.ALL_OBJECTS}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")


def answer(scene: Scene, question: str) -> str:
    """The right answer to a question in a trained wording; about absent things, an answer without sense."""
    parts = groups(scene)
    if found := re.fullmatch(
        r"(?:is there|can you see|does the picture show) an? ([\w ]+?)(?: in the picture)?\?", question
    ):
        return "yes" if any(g.object == found[1] for g in parts) else "no"
    if found := re.fullmatch(r"(?:how many|what is the number of) (\w+)(?: are there| can you see)?\?", question):
        counted = v.CATEGORIES.get(found[1], (_SINGULAR.get(found[1], ""),))
        number = sum(g.count for g in parts if g.object in counted)
        return _NUMBERS[number] if number or found[1] in v.CATEGORIES else "three"
    if found := re.fullmatch(r"(?:what|which) colour (?:is|are|do) the (\w+)(?: have)?\?", question):
        group = next((g for g in parts if g.object == _SINGULAR[found[1]]), None)
        natural = v.NATURAL_COLOURS[_SINGULAR[found[1]]]
        return "pink" if group is None else group.colour or (natural[0] if natural else "red")
    if found := re.fullmatch(r"is the (\w+) (left of|right of|above|below) the (\w+)\?", question):
        a, b = (next((g for g in parts if g.object == _SINGULAR[found[k]]), None) for k in (1, 3))
        return "yes" if a and b and found[2] in group_relation(scene, a, b) else "no"
    if question in ("what style is this?", "what is the style of the picture?", "which style is the picture in?"):
        return scene.style
    if question in ("what is the background?", "what is in the background?", "which background is this?"):
        return scene.background if v.shows_background(scene.style) else "snow"
    if question in ("describe the picture", "describe the image", "describe it", "what do you see?"):
        return caption(scene, random.Random(0), detail="plain")
    if question == "what does the picture show?":
        return caption(scene, random.Random(0), detail="plain")
    raise AssertionError(f"{question!r} is no question of training")


def reply(scene: Scene, question: str, topic: str | None = None) -> str:
    """The reply to a question in any wording."""
    (said,) = run([plan(parse_question(question), topic)], lambda _, asked: [answer(scene, q) for q in asked])
    return said


class Oracle:
    """A reader for evaluations: answers about pictures of known scenes."""

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self.scenes = {p.tobytes(): s for p, s in zip(to_pictures(scenes), scenes, strict=True)}

    def answer(self, pictures: Sequence[Any], questions: Sequence[str]) -> list[str]:
        """One reply a pair."""
        about = [self.scenes[p.tobytes()] for p in pictures]
        plans = [plan(parse_question(q)) for q in questions]
        return run(plans, lambda rows, asked: [answer(about[i], q) for i, q in zip(rows, asked, strict=True)])

    def describe(self, pictures: Sequence[Any]) -> list[str]:
        """One description a picture."""
        return self.answer(pictures, ["describe the picture"] * len(pictures))
