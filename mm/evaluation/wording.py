"""How drawing prompts in other words are read: the share whose meaning arrives, without drawing anything.

Design choices
- `other-words.jsonl` says what 200 prompts of `compose.jsonl` say, as strangers write. The two lines have one id, and so
  the same demand and seeds: scores compare pair by pair. It was written before the lexicon was read for it, and no
  lexicon, model or setting was tuned on it. `other-words-tune.jsonl` is for that.
- A prompt counts as read where the lexicon has no problem with it, and its reading asks for the same things, numbers,
  colours, position, background and style (`mm.world.demand`). A misspelled word that is corrected aloud is read.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
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


def is_read(prompt: Prompt) -> bool:
    """Whether the lexicon reads a prompt as what it asks for."""
    found = lexicon.read(prompt.text)
    return not found.problems and asks_for(demand_of(split(found.text)), prompt.wanted)


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


def reading_share(prompts: Sequence[Prompt]) -> dict[str, tuple[int, int]]:
    """Prompts that are read, and all, by task."""
    counts: dict[str, tuple[int, int]] = {}
    for task in TASKS:
        mine = [is_read(prompt) for prompt in prompts if prompt.wanted.task == task]
        counts[task] = (sum(mine), len(mine))
    return counts


def main() -> None:
    """The script: prints the shares of a file, and with `--failures` what is read otherwise (for tuning files only)."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=OTHER_WORDS)
    parser.add_argument("--failures", action="store_true")
    given = parser.parse_args()
    prompts = load_prompts(given.file)
    for task, (read, total) in reading_share(prompts).items():
        print(f"{task:20} {read:3} of {total}")
    print(f"{'all':20} {sum(map(is_read, prompts)):3} of {len(prompts)}")
    for prompt in prompts if given.failures else ():
        if not is_read(prompt):
            found = lexicon.read(prompt.text)
            print(f"{prompt.text!r} -> {found.text!r} {found.problems}")


if __name__ == "__main__":
    main()
