"""How our own scripts of `mm eval chat` are made: `python -m mm.evaluation.chat_scripts` writes both files again.

Design choices
- The words of the turns off the script are fixed lists. Those for reporting were written before the rules of
  conversations were measured, and are used for nothing else.
- The generator is seeded by name and the files are committed; a test compares them.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm.core.files import write_text
from mm.evaluation.chat import LONG_SCRIPTS, SCRIPTS
from mm.world import vocabulary as v
from mm.world.captions import BACKGROUND_PHRASES, article, group_phrase
from mm.world.edits import edit_scene
from mm.world.scene import Scene, groups, sample_scene


def _wanted(scene: Scene, gone: Sequence[str] = (), relation: Any = None) -> dict[str, Any]:
    """What a picture of `scene` must hold, as a script says it."""
    parts = [[g.object, g.colour, g.count] for g in groups(scene)]
    out: dict[str, Any] = {"groups": parts, "background": scene.background}
    return out | ({"gone": list(gone)} if gone else {}) | ({"relation": relation} if relation else {})


def _edit_turn(scene: Scene, rng: random.Random) -> tuple[Scene, dict[str, Any]]:
    """A random edit of what should be there now, and the state after it."""
    kinds = ["add", "recolour", "remove", "replace", "background"]
    rng.shuffle(kinds)
    edit = next(e for kind in kinds for _ in range(9) if (e := edit_scene(scene, rng, kind)) is not None)
    before, after = {s.object for s in scene.sprites}, {s.object for s in edit.target.sprites}
    relation = None
    names = [g.object for g in groups(edit.target)]
    new = next(iter(after - before), None)
    for name in v.RELATIONS:
        anchor = next((o for o in names if edit.instruction.endswith(f"{name} the {o}")), None)
        if edit.kind == "add" and new and anchor:
            relation = [names.index(new), name, names.index(anchor)]
    row = {"say": edit.instruction, "draws": _wanted(edit.target, sorted(before - after), relation)}
    return edit.target, row


def _question_turn(scene: Scene, rng: random.Random) -> dict[str, Any]:
    name = rng.choice([s.object for s in scene.sprites])
    kind = rng.choice(("count", "animals", "existence", "colour", "background"))
    if kind == "animals":
        return {"say": "how many animals are there?", "asks": ["count", "animals"]}
    if kind == "existence":
        name = rng.choice((name, rng.choice(v.OBJECTS)))
        return {"say": f"is there {article(name)} {name} in the picture?", "asks": ["existence", name]}
    tinted = [g.object for g in groups(scene) if g.colour is not None and g.count == 1]
    if kind == "colour" and tinted:
        return {"say": f"what colour is the {tinted[0]}?", "asks": ["colour", tinted[0]]}
    if kind == "background":
        return {"say": "what is the background?", "asks": ["background", ""]}
    return {"say": f"how many {v.PLURALS[name]} are there?", "asks": ["count", name]}


def _first_scene(rng: random.Random, held_out: bool = True) -> Scene:
    while True:
        scene = sample_scene(rng, styles=(v.DEFAULT_STYLE,), held_out=held_out)
        if len(scene.sprites) <= 2:
            return scene


def _draw_turn(scene: Scene, rng: random.Random, wording: str = "draw {}") -> dict[str, Any]:
    phrases = " and ".join(group_phrase(g, rng, plain=True) for g in groups(scene))
    say = wording.format(f"{phrases} {BACKGROUND_PHRASES[scene.background][0]}")
    return {"say": say, "draws": _wanted(scene)}


def short_script(rng: random.Random, held_out: bool = True) -> list[dict[str, Any]]:
    """Draw, edit, ask, then edit or ask again."""
    scene = _first_scene(rng, held_out)
    turns = [_draw_turn(scene, rng)]
    scene, row = _edit_turn(scene, rng)
    turns += [row, _question_turn(scene, rng)]
    if rng.random() < 0.5:
        scene, row = _edit_turn(scene, rng)
        turns.append(row)
    else:
        turns.append(_question_turn(scene, rng))
    return turns


# Off-script turns of the long scripts, for reporting and for tuning: other words for each.
_OFF: dict[str, dict[str, tuple[str, ...]]] = {
    "report": {
        "greeting": ("hello", "hi there!", "good evening", "hey, how are you?", "hello, who are you?",
            "hi, what can you do?"),
        "thanks": ("thank you", "thanks, that is great", "wow, nice work", "thank you very much!",
            "looks good, thanks"),
        "outside": (
            "is it a zebra?", "who painted this?", "what's the weather like in London?",
            "how many elephants are there?",
            "tell me a story", "i had pasta for lunch", "can you play chess?", "is there an airplane?",
        ),
        "undo": ("undo", "undo that", "undo the last change", "go back", "take that back please"),
        "again": ("another one", "draw it again", "one more please", "show me another one", "try again"),
        "new": ("now draw {}", "please draw {}", "could you draw {}?", "i would like to see {}", "next, draw {}"),
        "recolour": ("now make it {colour}", "can you color it {colour}?", "it should be {colour}", "{colour} please"),
        "count": ("count the {some}", "how many {some} do you see?", "what's the number of {some}?"),
        "existence": ("do you see {a}?", "any {some} in there?", "can you spot {a}?"),
        "ground": ("is it {ground} there?", "is the background {ground}?"),
    },
    "tune": {
        "greeting": ("hi", "good morning!", "hello there", "who are you?", "help"),
        "thanks": ("thanks", "thank you so much", "great", "very nice, thank you"),
        "outside": ("is there a train?", "why is it so?", "what is your favourite food?", "tell me a joke",
            "i am bored"),
        "undo": ("undo it", "revert that", "please undo"),
        "again": ("again", "a different one", "once more", "draw another one"),
        "new": ("draw {}", "show me {}", "can you draw {}?", "paint {}"),
        "recolour": ("make it {colour}", "paint it {colour}", "could you make it {colour}?", "now {colour}"),
        "count": ("how many {some}?", "how many {some} can be seen?", "count {some}"),
        "existence": ("is there {a}?", "are there any {some}?", "can you find {a}?"),
        "ground": ("is it {ground}?", "does it show {ground}?"),
    },
}  # fmt: skip


def _off(kind: str, words: dict[str, tuple[str, ...]], rng: random.Random) -> dict[str, Any]:
    """A turn that wants a reply in words."""
    say = rng.choice(words[kind])
    helps = "who are" in say or "what can" in say or say == "help" or "how are" in say
    return {"say": say, "says": "help" if helps else kind, "off": True}


def _asked_otherwise(scene: Scene, words: dict[str, tuple[str, ...]], rng: random.Random) -> dict[str, Any]:
    """A question in other words than those that the model was trained on."""
    kind = rng.choice(("count", "existence", "ground"))
    name = rng.choice([s.object for s in scene.sprites])
    if kind == "existence":
        name = rng.choice((name, rng.choice(v.OBJECTS)))
    ground = rng.choice((scene.background, rng.choice(v.BACKGROUNDS)))
    say = rng.choice(words[kind]).format(a=f"{article(name)} {name}", some=v.PLURALS[name], ground=ground)
    return {"say": say, "asks": [kind, ground if kind == "ground" else name], "off": True}


def _recolour_turn(scene: Scene, words: dict[str, tuple[str, ...]], rng: random.Random) -> tuple[Scene, dict[str, Any]]:
    """ "it" becomes another colour, where the scene holds one thing; else an edit in trained words."""
    parts = groups(scene)
    if len(parts) != 1 or parts[0].count != 1:
        return _edit_turn(scene, rng)
    (group,) = parts
    colour = rng.choice([c for c in v.colours_in(scene.style) if not v.counts_as(group.object, group.colour, c)])
    target = replace(scene, sprites=tuple(replace(s, colour=colour) for s in scene.sprites))
    say = rng.choice(words["recolour"]).format(colour=colour)
    return target, {"say": say, "draws": _wanted(target), "off": True}


def long_script(rng: random.Random, held_out: bool = True) -> list[dict[str, Any]]:
    """Twelve turns: two pictures with edits and questions, and turns off the script between them."""
    words = _OFF["report" if held_out else "tune"]
    scene = _first_scene(rng, held_out)
    turns = [_off("greeting", words, rng), _draw_turn(scene, rng)]
    scene, row = _recolour_turn(scene, words, rng)
    turns += [row, _asked_otherwise(scene, words, rng)]
    _, row = _edit_turn(scene, rng)
    turns += [row, _off("thanks", words, rng), {"say": rng.choice(words["undo"]), "undo": True, "off": True}]
    turns += [_question_turn(scene, rng), _off("outside", words, rng)]
    scene = _first_scene(rng, held_out)
    new = _draw_turn(scene, rng, rng.choice(words["new"]))
    again = {"say": rng.choice(words["again"]), "draws": new["draws"], "off": True}
    return [*turns, new, again, _question_turn(scene, rng)]


def write_scripts(path: Path, kind: str, count: int = 20, *, held_out: bool = True) -> None:
    """Writes scripts of `kind` "short" or "long": ours for reporting, or with `held_out` False some for tuning.

    A file that is there is replaced.
    """
    name = "report 0" if held_out else "tune 0"
    rng = random.Random(f"chat {name}" if kind == "short" else f"chat long {name}")
    make = short_script if kind == "short" else long_script
    write_text(path, "".join(json.dumps({"turns": make(rng, held_out)}) + "\n" for _ in range(count)))


if __name__ == "__main__":
    argparse.ArgumentParser(description="Writes the scripts of mm eval chat into the package.").parse_args()
    write_scripts(SCRIPTS, "short")
    write_scripts(LONG_SCRIPTS, "long")
