"""How drawing prompts in other words are read: the share whose meaning arrives, without drawing anything.

Design choices
- `other-words.jsonl` says what 200 prompts of `compose.jsonl` say, as strangers write. The two lines have one id, and
  so the same demand and seeds: scores compare pair by pair. It was written before the lexicon was read for it, and no
  lexicon, model or setting was tuned on it. `other-words-tune.jsonl` is for that.
- A prompt is read where its reading asks for the same things, numbers, colours, position, background and style
  (`mm.world.demand`). It is read in silence where no warning names a word that the world cannot show ("cute", "big");
  a misspelled word that is corrected aloud is no such word.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mm.evaluation.prompts import FOLDER, Prompt, load_prompts
from mm.world import lexicon
from mm.world import vocabulary as v
from mm.world.demand import Demand, demand_of
from mm.world.scene import Group
from mm.world.tasks import TASKS, Expectation
from mm.world.words import split

OTHER_WORDS = FOLDER / "other-words.jsonl"
OTHER_WORDS_TUNE = FOLDER / "other-words-tune.jsonl"


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """How a prompt was read: whether its meaning arrived, and whether without a warning."""

    read: bool
    silent: bool


def arrival_of(prompt: Prompt) -> Arrival:
    """How the lexicon reads a prompt."""
    found = lexicon.read(prompt.text)
    read = asks_for(demand_of(split(found.text)), prompt.wanted)
    return Arrival(read=read, silent=read and not found.problems)


def asks_for(demand: Demand | None, wanted: Expectation) -> bool:
    """Whether a reading asks for the same; the default style may be named or not."""
    if demand is None or demand.lone_side or sorted(map(repr, demand.groups)) != sorted(map(repr, wanted.groups)):
        return False
    if (demand.style or v.DEFAULT_STYLE) != (wanted.style or v.DEFAULT_STYLE):
        return False
    return demand.background == wanted.background and _position(demand) == _position(wanted)


def _position(of: Demand | Expectation) -> frozenset[tuple[Group, str, Group]]:
    """A relation in both directions, so that "a left of b" is "b right of a"."""
    if of.relation is None:
        return frozenset()
    first, name, second = of.groups[of.relation[0]], of.relation[1], of.groups[of.relation[2]]
    return frozenset({(first, name, second), (second, v.OPPOSITE[name], first)})


def reading_shares(prompts: Sequence[Prompt]) -> dict[str, dict[str, int]]:
    """Prompts that are read, those read in silence, and all, by task and together ("all")."""
    out: dict[str, dict[str, int]] = {}
    for task in (*TASKS, "all"):
        mine = [arrival_of(prompt) for prompt in prompts if task in ("all", prompt.wanted.task)]
        out[task] = {"read": sum(a.read for a in mine), "silent": sum(a.silent for a in mine), "n": len(mine)}
    return out


def main() -> None:
    """Prints how many prompts of a file are read, and with --failures which are not (for tuning files only)."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=OTHER_WORDS)
    parser.add_argument("--failures", action="store_true")
    given = parser.parse_args()
    prompts = load_prompts(given.file)
    for task, row in reading_shares(prompts).items():
        print(f"{task:20} read {row['read']:3}, in silence {row['silent']:3}, of {row['n']}")
    for prompt in prompts if given.failures else ():
        if not arrival_of(prompt).silent:
            found = lexicon.read(prompt.text)
            print(f"{prompt.text!r} -> {found.text!r} {found.problems}")


if __name__ == "__main__":
    main()
