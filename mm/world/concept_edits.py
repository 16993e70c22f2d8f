"""Instructions for editing by which concepts of the world are erased and others are kept; see `mm.erasure.routes`."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from PIL import Image

from mm.erasure.concepts import Concept
from mm.erasure.routes import Edit
from mm.world import vocabulary as v
from mm.world.concept_words import forms, holds, tokens, with_article
from mm.world.edits import Edit as SceneEdit
from mm.world.edits import sample_edit
from mm.world.render import render
from mm.world.scene import Scene

OTHERS = 48  # instructions that must stay
TRIES = 40  # sampled edits for each that is wanted


def world_edits(targets: Sequence[Concept], anchors: Mapping[str, str], count: int) -> list[Edit]:
    """Instructions of the training grammar, each with a render that it changes.

    Args:
        targets: what is erased; objects and styles, which are all that instructions bring into a picture by name alone.
        anchors: what stands for each of them.
        count: of each target; others that must stay are twice as many, and at least `OTHERS`.

    Returns:
        Instructions that bring a target in, each with its anchor in its place, and others; none without any target.
    """
    banned = {t.name for t in targets}
    made = [edit for t in targets for edit in _bringing(t.name, anchors[str(t)], banned, count)]
    return made + _others(banned, max(OTHERS, 2 * count)) if made else []


def _bringing(target: str, anchor: str, banned: set[str], count: int) -> list[Edit]:
    kinds = ("replace", "add") if target in v.OBJECTS else ("restyle",) if target in v.STYLES else ()
    rng, made = random.Random(f"edits {target}"), []
    for _ in range(TRIES * count if kinds and anchor else 0):
        edit = sample_edit(rng, rng.choice(kinds))
        arrived = _arrived(edit)
        if arrived is None or banned & shown(edit.source):
            continue
        text, instead = (with_name(edit.instruction, arrived, name) for name in (target, anchor))
        if text != instead and holds(text, target):
            made.append(Edit(text=text, instead=instead, picture=picture_of(edit.source)))
        if len(made) == count:
            break
    return made


def _others(banned: set[str], count: int) -> list[Edit]:
    rng, made = random.Random(f"edits kept {sorted(banned)}"), []
    for _ in range(TRIES * count):
        edit = sample_edit(rng)
        if not banned & shown(edit.source) and not any(holds(edit.instruction, name) for name in banned):
            made.append(Edit(text=edit.instruction, instead=None, picture=picture_of(edit.source)))
        if len(made) == count:
            break
    return made


def _arrived(edit: SceneEdit) -> str | None:
    """What an edit brings into the picture and its instruction names: one object, or a style."""
    if edit.kind == "restyle":
        return edit.target.style if edit.target.style in edit.instruction else None
    new = {s.object for s in edit.target.sprites} - {s.object for s in edit.source.sprites}
    return next((name for name in new if holds(edit.instruction, name)), None)


def with_name(text: str, old: str, new: str) -> str:
    """An instruction with one concept's words in the place of another's, in number and article."""
    if old in v.STYLES:
        return text.replace(old, new)
    both = list(zip(forms(old), forms(new), strict=True))[::-1]  # a word of both numbers counts as singular
    swaps = {word: into[0] for words, into in both for word in words}
    parts = tokens(text)
    for spot, word in enumerate(parts):
        if word in swaps:
            text = with_article(parts, spot, swaps[word])
            parts = tokens(text)
    return text


def shown(scene: Scene) -> set[str]:
    """The objects and the style of a scene."""
    return {scene.style, *(s.object for s in scene.sprites)}


def picture_of(scene: Scene) -> Image.Image:
    """A render as a PIL picture."""
    return Image.fromarray(render([scene])[0].permute(1, 2, 0).numpy())
