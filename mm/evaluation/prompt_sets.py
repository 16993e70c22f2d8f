"""How our own compose prompts are made: `python -m mm.evaluation.prompt_sets` writes both files again.

Design choices
- GenEval's six tasks in its proportions (553 prompts, arXiv 2310.11513), in the training grammar's words. Reported
  compositions are those that training never saw (`scene.is_held_out`): object pairs for two objects, position and
  colour attribution, object-count and object-colour for counting and colours. Single objects cannot be held out.
- The tuning file uses only compositions that are not held out, so choosing a guidance by it teaches nothing about them.
- A quarter of the prompts name a style, and a background where that style shows it; most others name neither, as in
  GenEval. Few counts and colours are held out, so those prompts name a background more often, to vary.
- The generator is seeded by name and the files are committed; a test compares them.
"""

from __future__ import annotations

import argparse
import itertools
import random

from mm.core import files
from mm.evaluation.prompts import COMPOSE, COMPOSE_TUNE, Prompt, to_line
from mm.world import captions as c
from mm.world import scene as s
from mm.world import vocabulary as v
from mm.world.scene import Group
from mm.world.tasks import TASKS, Expectation

REPORT_SIZES = dict(zip(TASKS, (80, 99, 80, 94, 100, 100), strict=True))
TUNE_SIZES = dict.fromkeys(TASKS, 20)
_STYLED = 0.25
_GROUND_ONLY = {"counting": 0.4, "colours": 0.4}
_COLOURED = ("colours", "colour attribution")


def compose_prompts(*, held_out: bool) -> list[Prompt]:
    """The file for reporting (`held_out`) or the one for tuning."""
    name, sizes = ("report", REPORT_SIZES) if held_out else ("tune", TUNE_SIZES)
    return [prompt for task in TASKS for prompt in _task_prompts(task, sizes[task], name, held_out)]


def _task_prompts(task: str, size: int, name: str, held_out: bool) -> list[Prompt]:
    rng = random.Random(f"compose {name} {task}")
    kinds = _compositions(task, held_out)
    rng.shuffle(kinds)
    out: list[Prompt] = []
    texts: set[str] = set()
    for number in range(size):
        kind = kinds[number % len(kinds)]
        while True:
            text, wanted = _worded(task, kind, rng, ground=task == "single object" and number >= len(kinds))
            if held_out or not s.is_held_out(wanted.groups):  # tints drawn for attribution could hit the split
                if text not in texts:
                    break
        texts.add(text)
        out.append(Prompt(id=f"{task.replace(' ', '-')}-{number + 1:03}", text=text, wanted=wanted))
    return out


def _compositions(task: str, held_out: bool) -> list[tuple[Group, ...]]:
    """What a task's prompts are about; colours of attribution are drawn later, with the style."""
    objects = v.OBJECTS
    if task == "single object":
        return [(Group(object=o),) for o in objects]
    if task == "counting":
        numbers = range(2, v.MAX_COUNT + 1)
        return [(Group(object=o, count=n),) for o in objects for n in numbers if s.count_is_held_out(o, n) == held_out]
    if task == "colours":
        tints = [(o, tint) for o in objects for tint in v.COLOURS if s.colour_is_held_out(o, tint) == held_out]
        return [(Group(object=o, colour=tint),) for o, tint in tints]
    pairs = [pair for pair in itertools.combinations(objects, 2) if s.pair_is_held_out(*pair) == held_out]
    return [(Group(object=a), Group(object=b)) for a, b in pairs]


def _worded(task: str, parts: tuple[Group, ...], rng: random.Random, *, ground: bool) -> tuple[str, Expectation]:
    """A prompt about `parts`, in a random wording, and its demand; `ground` makes it name a background."""
    style = _style(task, parts, rng)
    if task == "colour attribution":
        tints = rng.sample(v.colours_in(style or v.DEFAULT_STYLE), len(parts))
        parts = tuple(Group(object=g.object, colour=t) for g, t in zip(parts, tints, strict=True))
    parts = tuple(rng.sample(parts, len(parts)))
    phrases = [c.group_phrase(g, rng) for g in parts]
    relation = None
    if task == "position":
        relation = (0, rng.choice(v.RELATIONS), 1)
        body = f"{phrases[0]} {rng.choice(c.RELATION_PHRASES[relation[1]])} {phrases[1]}"
    else:
        body = " and ".join(phrases)
    background = None
    named = ground or style is not None or rng.random() < _GROUND_ONLY.get(task, 0.0)
    if named and v.shows_background(style or v.DEFAULT_STYLE):
        background = rng.choice(v.BACKGROUNDS)
        body += " " + rng.choice(c.BACKGROUND_PHRASES[background])
    wanted = Expectation(task=task, groups=parts, relation=relation, background=background, style=style)
    return _in_style(body, style, rng), wanted


def _style(task: str, parts: tuple[Group, ...], rng: random.Random) -> str | None:
    """A style to name, one that shows what is asked; None for most prompts."""
    if rng.random() >= _STYLED:
        return None
    tints = {g.colour for g in parts} - {None}
    fit = [x for x in v.STYLES if tints <= set(v.colours_in(x)) and (task not in _COLOURED or v.shows_colour(x))]
    return rng.choice(fit)


def _in_style(body: str, style: str | None, rng: random.Random) -> str:
    if style is None:
        return f"a photo of {body}" if rng.random() < 0.5 else body
    if rng.random() < 0.6:
        return body + c.style_after(style, rng)
    # Of the default style's openings only the first names it.
    openings = c.STYLE_BEFORE[style][:1] if style == v.DEFAULT_STYLE else c.STYLE_BEFORE[style]
    return f"{rng.choice(openings)} {body}"


def main() -> None:
    """The script: writes both files into the package."""
    argparse.ArgumentParser(description="Writes the prompt files of mm eval compose into the package.").parse_args()
    for path, held_out in ((COMPOSE, True), (COMPOSE_TUNE, False)):
        files.write_text(path, "".join(to_line(p) + "\n" for p in compose_prompts(held_out=held_out)))
        print(path)


if __name__ == "__main__":
    main()
