"""Drawing prompts in other words: how many are read correctly, and how their pictures score (`--wording`).

Design choices
- Each of 200 lines of `other-words.jsonl` asks for the same as a line of `compose.jsonl`, in free wording. The two
  lines have the same id, and so the same seeds: scores are compared pair by pair. The file was written before anyone
  compared the lexicon with it, and no lexicon, model or setting was tuned on it; `other-words-tune.jsonl` is for that.
- A prompt counts as read where its reading asks for the same things, numbers, colours, position, background and style
  (`mm.world.demand`). It counts as read without a warning where no warning names a word that the world cannot show
  ("cute", "big"). The notice of a corrected misspelling is no such warning.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mm.core.errors import UserError
from mm.core.statistics import paired_change
from mm.evaluation.compose import (
    ComposeConfig,
    ProgressCallback,
    drawn_and_judged,
    limited,
    score,
    true_scene,
)
from mm.evaluation.prompts import COMPOSE, FOLDER, Prompt, load_prompts
from mm.evaluation.report import grid_png, write_report
from mm.world import lexicon
from mm.world import vocabulary as v
from mm.world.demand import Demand, demand_of
from mm.world.judge import Judge
from mm.world.render import render
from mm.world.scene import Group
from mm.world.tasks import TASKS, Expectation, satisfies
from mm.world.words import split

if TYPE_CHECKING:
    from mm import TextToImagePipeline

OTHER_WORDS = FOLDER / "other-words.jsonl"
OTHER_WORDS_TUNE = FOLDER / "other-words-tune.jsonl"


@dataclass(frozen=True, kw_only=True)
class Understood:
    """How a prompt was read.

    Attributes:
        read: Whether its reading asks for what is wanted.
        silent: Whether that was so without a warning.
    """

    read: bool
    silent: bool


def understood_of(prompt: Prompt) -> Understood:
    """How the lexicon reads a prompt, against what the prompt is known to ask for."""
    found = lexicon.read(prompt.text)
    read = asks_for(demand_of(split(found.text)), prompt.wanted)
    return Understood(read=read, silent=read and not found.problems)


def asks_for(demand: Demand | None, wanted: Expectation) -> bool:
    """Whether a reading asks for what is wanted; the default style may be named or not."""
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
    """Counts by task and together ("all"): prompts that are read, those read without a warning, and all."""
    out: dict[str, dict[str, int]] = {}
    for task in (*TASKS, "all"):
        mine = [understood_of(prompt) for prompt in prompts if task in ("all", prompt.wanted.task)]
        out[task] = {"read": sum(a.read for a in mine), "silent": sum(a.silent for a in mine), "n": len(mine)}
    return out


def plain_twins(prompts: Sequence[Prompt]) -> list[Prompt]:
    """For each prompt the one of `compose.jsonl` with its id, which asks for the same in the models' own words.

    Raises:
        UserError: for an id that is not there, or asks for something else.
    """
    plain = {prompt.id: prompt for prompt in load_prompts(COMPOSE)}
    for prompt in prompts:
        if prompt.id not in plain or plain[prompt.id].wanted != prompt.wanted:
            raise UserError(
                f"prompt {prompt.id!r} ({prompt.text!r}) does not ask for what the prompt of that id in {COMPOSE.name} "
                "does; give it the groups, relation, background and style of that line"
            )
    return [plain[prompt.id] for prompt in prompts]


def evaluate_wording(
    pipe: TextToImagePipeline,
    judge: Judge,
    config: ComposeConfig,
    *,
    prompts: str | Path = OTHER_WORDS,
    json_file: Path | None = None,
    settings: dict[str, Any] | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Draws prompts in other words and their plain twins from the same seeds, and reports both.

    Args:
        pipe: Draws.
        judge: Reads the pictures.
        config: Of both runs.
        prompts: A file whose ids are those of `compose.jsonl`.
        json_file: For the report; a picture grid is written beside it.
        settings: Of the model, for the report.
        progress: Called with the pictures drawn and all, for each of both runs.

    Returns:
        The report of `evaluate_compose` for the other words, with "plain" (that of the twins), "change" (the score
        of other words minus that of plain ones: mean over pictures, interval over prompts) and "reading"
        (`reading_shares`).
    """
    chosen = limited(load_prompts(prompts), config.limit)
    twins = plain_twins(chosen)
    with warnings.catch_warnings():  # of words that are left out, which "reading" counts
        warnings.simplefilter("ignore")
        asked, pictures, verdicts = drawn_and_judged(pipe, judge, config, chosen, progress)
    as_plain = drawn_and_judged(pipe, judge, config, twins, progress)[2]
    clusters = [at // config.pictures for at in range(len(asked))]
    mean, low, high = paired_change([w.ok for w in as_plain], [w.ok for w in verdicts], clusters)
    report = score(verdicts, asked) | {
        "ceiling": ceiling_of(judge, chosen, config.seed),
        "plain": score(as_plain, asked),
        "change": {"score": round(mean, 4), "low": round(low, 4), "high": round(high, 4)},
        "reading": reading_shares(chosen),
        "settings": asdict(config) | {"prompts": str(prompts)} | (settings or {}),
    }
    if json_file is not None:
        shown = torch.linspace(0, len(asked) - 1, min(len(asked), 48)).long()
        labels, marks = [asked[i].text for i in shown], [verdicts[i].ok for i in shown]
        write_report(json_file, report, grid_png(pictures[shown], labels, marks))
    return report


def ceiling_of(judge: Judge, prompts: Sequence[Prompt], seed: int) -> float:
    """The judge's score on true renders of the prompts' scenes."""
    readings = judge.read(render([true_scene(prompt, seed) for prompt in prompts]))
    return score([satisfies(r, p.wanted) for r, p in zip(readings, prompts, strict=True)], prompts)["overall"]


def main() -> None:
    """Prints how many prompts of a file are read, and with --failures which are not (for tuning files only)."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=OTHER_WORDS)
    parser.add_argument("--failures", action="store_true")
    given = parser.parse_args()
    prompts = load_prompts(given.file)
    for task, row in reading_shares(prompts).items():
        print(f"{task:20} read {row['read']:3}, without a warning {row['silent']:3}, of {row['n']}")
    for prompt in prompts if given.failures else ():
        if not understood_of(prompt).silent:
            found = lexicon.read(prompt.text)
            print(f"{prompt.text!r} -> {found.text!r} {found.problems}")


if __name__ == "__main__":
    main()
