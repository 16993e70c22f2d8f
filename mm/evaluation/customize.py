"""`mm eval customize`: what customization learns of objects that no model was trained on.

Design choices
- For each subject an adapter is trained from five pictures, put on, and measured: fidelity (the judge, which knows the
  objects, sees the subject where it is asked for alone), both objects where it is asked for beside another, prompt
  following (background, style or companion as asked), background leakage (a named background that is not there), drift
  (compose prompts before and after, on the same seeds), size and seconds.
- Fidelity has two ceilings: true renders, and the tokenizer's reconstructions of them. Prompt following is compared
  with that of the base on the same prompts with a known object in the subject's place.
- Each subject's result is written when it is done, and a run that was stopped goes on with the next.
- The zero-shot baseline needs no training: the editing pipeline is given a picture of the subject as clean source and
  asked for the background, style or companion.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.adapters.patch import Patch
from mm.core.checks import texts
from mm.core.errors import UserError
from mm.core.files import write_json
from mm.core.run_files import read_result
from mm.core.statistics import paired_change, share
from mm.customization.customize import customize
from mm.evaluation import compose
from mm.evaluation.customize_subjects import (
    GROUNDS,
    Ask,
    asks,
    follows,
    scenes_of,
    shows,
    true_scenes,
    write_pictures,
)
from mm.evaluation.prompts import COMPOSE, COMPOSE_TUNE, load_prompts
from mm.evaluation.report import save_grid, write_report
from mm.world import captions as c
from mm.world import vocabulary as v
from mm.world.judge import Judge
from mm.world.render import render
from mm.world.tasks import satisfies

ZERO_SHOT = "zero-shot"
KNOWN = "dog"  # stands in the subject's place where the base's own prompt following is measured
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class CustomizeConfig:
    """A run.

    Attributes:
        subjects: held-out objects.
        method: of customization, or "zero-shot".
        seed: of the pictures.
        pictures: drawn of each prompt.
        limit: compose prompts of each task for the drift; 0 leaves it out.
        tuning: prompts and seeds for choosing settings.
        one_ground: all training pictures have this background, and no captions; None takes five backgrounds.
        settings: of the method and of training.
    """

    subjects: tuple[str, ...] = v.HELD_OUT_OBJECTS
    method: str = "auto"
    seed: int = 0
    pictures: int = 2
    limit: int = 4
    tuning: bool = False
    one_ground: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "subjects", texts("subjects", self.subjects))
        wrong = [name for name in self.subjects if name not in v.HELD_OUT_OBJECTS]
        if wrong or not self.subjects:
            named = repr(wrong[0]) if wrong else "nothing"
            raise UserError(f"the subject is {named}; there are {', '.join(v.HELD_OUT_OBJECTS)}")
        if twice := [name for name in self.subjects if self.subjects.count(name) > 1]:
            raise UserError(f"the subject {twice[0]!r} is given twice")
        if self.one_ground not in (None, *v.BACKGROUNDS):
            raise UserError(f"the background is {self.one_ground!r}; there are {', '.join(v.BACKGROUNDS)}")
        if self.method == ZERO_SHOT and self.settings:
            raise UserError(f"{ZERO_SHOT} learns nothing, so leave out {', '.join(self.settings)}")
        if self.pictures < 1 or self.limit < 0:
            raise UserError(f"pictures {self.pictures} must be 1 or more, and limit {self.limit} 0 or more")


class Evaluation:
    """One run over its subjects."""

    def __init__(self, pipe: Any, judge: Judge, config: CustomizeConfig, work: Path, progress: Progress) -> None:
        self.pipe, self.judge, self.config, self.work, self.progress = pipe, judge, config, work, progress
        self.asks = asks(tuning=config.tuning)
        self._base_drift: list[bool] | None = None

    def run(self) -> dict[str, Any]:
        """The report over all subjects."""
        rows = {subject: self._subject(subject) for subject in self.config.subjects}
        base = self._cached("base", self._base)
        return self._report(rows, base)

    def _cached(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        key = json.dumps({**asdict(self.config), "subjects": None}, sort_keys=True)
        file = self.work / f"{name}-{hashlib.blake2s(key.encode(), digest_size=4).hexdigest()}.json"
        if file.is_file():
            return read_result(file, "result of an earlier run", f"delete {file}, and it is measured again")
        made = make()
        write_json(file, made)
        return made

    # ---- one subject ------------------------------------------------------------------------------------------------

    def _subject(self, subject: str) -> dict[str, Any]:
        return self._cached(subject, lambda: self._measured(subject))

    def _measured(self, subject: str) -> dict[str, Any]:
        self.progress(f"{subject}: learning")
        grounds = (self.config.one_ground,) * len(GROUNDS) if self.config.one_ground else GROUNDS
        folder = self.work / f"{subject}-pictures{'-' + self.config.one_ground if self.config.one_ground else ''}"
        write_pictures(folder, subject, grounds, captions=self.config.one_ground is None)
        if self.config.method == ZERO_SHOT:
            pictures = self._zero_shot(subject)
            made: dict[str, Any] = {"seconds": 0.0, "bytes": 0, "drift": []}
        else:
            patch, seconds = self._train(subject, folder)
            file = self.work / f"{subject}-{self.config.method}.safetensors"
            patch.save(file)
            made = {"seconds": round(seconds, 1), "bytes": file.stat().st_size, "training": patch.report}
            before = self._drift_verdicts(True)
            patch.apply(self.pipe)
            try:
                pictures = self._draw([ask.text.format(f"<{subject}>") for ask in self.asks], subject)
                after = self._drift_verdicts(False)
            finally:
                patch.undo(self.pipe)
            made["drift"] = [[one, two] for one, two in zip(before, after, strict=True)]
        return made | self._judged(subject, pictures)

    def _train(self, subject: str, folder: Path) -> tuple[Patch, float]:
        started = time.monotonic()
        patch = customize(
            self.pipe, folder, name=f"<{subject}>", method=self.config.method,
            work=self.work / f"{subject}-run", samples=(),
            progress=lambda share_, text: self.progress(f"{subject}: {text}"), **self.config.settings,
        )  # fmt: skip
        return patch, time.monotonic() - started

    def _judged(self, subject: str, pictures: Tensor) -> dict[str, Any]:
        each = [ask for ask in self.asks for _ in range(self.config.pictures)]
        readings = self.judge.read(pictures)
        seen = [shows(reading, subject) for reading in readings]
        done = [follows(reading, ask) for reading, ask in zip(readings, each, strict=True)]
        grounds = [
            reading.background == ask.background
            for reading, ask in zip(readings, each, strict=True)
            if ask.background
        ]  # fmt: skip
        free = [
            r.background for r, ask in zip(readings, each, strict=True) if ask == self.asks[0] or ask == self.asks[1]
        ]
        renders = render(true_scenes(subject, self.asks))
        ceilings = [
            [shows(reading, subject) for reading in self.judge.read(true)]
            for true in (renders, compose.reconstruct(self.pipe, renders))
        ]
        self._grid(subject, pictures, each, seen)
        return {
            "seen": seen, "follows": done, "grounds": grounds, "free_grounds": free, "ceiling": ceilings[0],
            "ceiling_reconstructed": ceilings[1],
        }  # fmt: skip

    def _grid(self, subject: str, pictures: Tensor, each: Sequence[Ask], seen: Sequence[bool]) -> None:
        labels = [ask.text.format(f"<{subject}>") for ask in each]
        save_grid(self.work / f"{subject}-{self.config.method}.png", pictures, labels, list(seen))

    def _draw(self, texts: Sequence[str], salt: str) -> Tensor:
        """uint8 pictures, each prompt's in a row."""
        parts = []
        kind = "tune" if self.config.tuning else "report"
        for text in texts:
            seeds = [compose.picture_seed(self.config.seed, f"{kind} {salt} {text}", i) for i in
                     range(self.config.pictures)]  # fmt: skip
            drawn = self.pipe(
                [text] * len(seeds), generator=[torch.Generator().manual_seed(s) for s in seeds], output_type="pt"
            ).images
            parts.append((drawn * 255).round().to(torch.uint8).cpu())
        return torch.cat(parts)

    def _drift_verdicts(self, base: bool) -> list[bool]:
        if not self.config.limit:
            return []
        if base and self._base_drift is not None:
            return self._base_drift
        prompts = compose.limited(load_prompts(COMPOSE_TUNE if self.config.tuning else COMPOSE), self.config.limit)
        jobs = [(p, compose.picture_seed(self.config.seed, p.id, 0)) for p in prompts]
        pictures = compose.draw(self.pipe, jobs, compose.ComposeConfig(), None)
        made = [satisfies(r, p.wanted).ok for r, (p, _) in zip(self.judge.read(pictures), jobs, strict=True)]
        if base:
            self._base_drift = made
        return made

    # ---- comparisons ------------------------------------------------------------------------------------------------

    def _base(self) -> dict[str, Any]:
        """The base's own prompt following, with a known object in the subject's place."""
        self.progress("the base's own prompt following")
        pictures = self._draw([ask.text.format(KNOWN) for ask in self.asks], KNOWN)
        each = [ask for ask in self.asks for _ in range(self.config.pictures)]
        readings = self.judge.read(pictures)
        done = [follows(reading, ask) for reading, ask in zip(readings, each, strict=True)]
        return {"follows": done, "seen": [shows(reading, KNOWN) for reading in readings]}

    def _zero_shot(self, subject: str) -> Tensor:
        """The editing pipeline, with the subject's picture as clean source."""
        from PIL import Image

        from mm import ImageEditPipeline

        editor = ImageEditPipeline.from_pretrained(self.pipe.name_or_path)
        editor.set_progress_bar_config(disable=True)
        sources = render(scenes_of(subject))
        parts = []
        for number, ask in enumerate(self.asks):
            source = Image.fromarray(sources[number % len(sources)].permute(1, 2, 0).numpy())
            seeds = [compose.picture_seed(self.config.seed, f"zero {subject} {ask.text}", i) for i in
                     range(self.config.pictures)]  # fmt: skip
            drawn = editor(
                [source] * len(seeds), [_instruction(ask)] * len(seeds),
                generator=[torch.Generator().manual_seed(s) for s in seeds], output_type="pt",
            ).images  # fmt: skip
            parts.append((drawn * 255).round().to(torch.uint8).cpu())
        return torch.cat(parts)

    # ---- the report -------------------------------------------------------------------------------------------------

    def _report(self, rows: dict[str, dict[str, Any]], base: dict[str, Any]) -> dict[str, Any]:
        def joined(key: str) -> list[Any]:
            return [value for row in rows.values() for value in row[key]]

        single = [ask.companion is None for ask in self.asks for _ in range(self.config.pictures)]
        alone = {name: [x for x, one in zip(row["seen"], single, strict=True) if one] for name, row in rows.items()}
        fidelity = share([x for seen in alone.values() for x in seen])
        both = share([x for row in rows.values() for x in _together(row, single)])
        ceiling, rebuilt = share(joined("ceiling")), share(joined("ceiling_reconstructed"))
        own = share([x for x in joined("follows") if x is not None])
        theirs = share([x for x in base["follows"] if x is not None])
        pairs = joined("drift")
        clusters = [i for row in rows.values() for i in range(len(row["drift"]))]
        change = paired_change([a for a, _ in pairs], [b for _, b in pairs], clusters) if pairs else (0.0, 0.0, 0.0)
        tasks = {subject: share(seen) for subject, seen in alone.items()}
        trained_on = joined("free_grounds")
        return {
            "overall": fidelity["score"], "n": fidelity["n"], "ceiling": ceiling["score"],
            "ceiling_reconstructed": rebuilt["score"],
            "of_ceiling": round((fidelity["score"] or 0) / max(1e-9, rebuilt["score"] or 0), 4), "fidelity": fidelity,
            "together": both, "together_base": share(_together(base, single)),
            "following": own, "following_base": theirs,
            "of_base": round((own["score"] or 0) / max(1e-9, theirs["score"] or 0), 4),
            "leakage": share([not x for x in joined("grounds")]),
            "same_ground": share([x == self.config.one_ground for x in trained_on]) if self.config.one_ground else None,
            "drift": {"change": round(change[0], 4), "low": round(change[1], 4), "high": round(change[2], 4),
                      "n": len(pairs)},
            "seconds": _middle([row["seconds"] for row in rows.values()]),
            "bytes": max(row["bytes"] for row in rows.values()), "tasks": tasks,
            "settings": asdict(self.config),
        }  # fmt: skip


def _together(row: dict[str, Any], single: Sequence[bool]) -> list[bool]:
    """For each prompt with a companion, whether both are there."""
    each = zip(row["seen"], row["follows"], single, strict=True)
    return [bool(seen and follows_) for seen, follows_, one in each if not one]


def _middle(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def _instruction(ask: Ask) -> str:
    """The instruction of the editing pipeline in place of a prompt."""
    if ask.background:
        return f"change the background to {ask.background}"
    if ask.style:
        return f"make it {ask.style} style"
    if ask.companion:
        return f"add {c.article(ask.companion)} {ask.companion}"
    return "change the background to plain"


def evaluate_customize(
    pipe: Any, judge: Judge, config: CustomizeConfig, *, work: Path, json_file: Path | None = None,
    settings: dict[str, Any] | None = None, progress: Progress = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """Learns, draws, judges and reports.

    Args:
        pipe: of mm-tiny, 16-bit or 4-bit.
        judge: knows the subjects.
        config: the run.
        work: a folder for pictures, adapters and each subject's result; a run that was stopped goes on from it.
        json_file: the report's file.
        settings: added to the report's settings.
        progress: called with a text.
    """
    report = Evaluation(pipe, judge, config, work, progress).run()
    report["settings"] |= settings or {}
    if json_file is not None:
        write_report(json_file, report)
    return report
