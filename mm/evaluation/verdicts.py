"""The judge's verdicts on pictures of tuning prompts: how mm-tiny is scored before and after a change."""

from __future__ import annotations

from typing import Any

from mm.evaluation import compose
from mm.evaluation.prompts import COMPOSE_TUNE, load_prompts
from mm.world.judge import Judge
from mm.world.tasks import satisfies


def verdicts(pipe: Any, limit: int | None = None, each: int = 2) -> list[bool]:
    """The judge's verdicts on `each` pictures of each of `limit` tuning prompts a task (None: of all)."""
    pipe.set_progress_bar_config(disable=True)
    prompts = compose.limited(load_prompts(COMPOSE_TUNE), limit)
    jobs = [(p, compose.picture_seed(0, p.id, i)) for p in prompts for i in range(each)]
    readings = Judge.from_pretrained().read(compose.draw(pipe, jobs, compose.ComposeConfig(), None))
    return [satisfies(r, p.wanted).ok for r, (p, _) in zip(readings, jobs, strict=True)]
