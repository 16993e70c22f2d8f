"""`mm.customize`: a patch that draws the subject or style of a few pictures, edits as they do, or is a slider.

Design choices
- The model is not changed: the patch is returned, and `patch.apply(pipe)` puts it on.
- Nothing in the patch depends on time or machine, so that a run that was stopped and resumed gives the same file.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from mm.core.checks import texts
from mm.customization.batches import Batches
from mm.customization.checks import (
    check_call,
    check_name,
    check_noun,
    check_rank,
    check_resources,
    check_words,
    guarded_prompts,
    settings_of,
)
from mm.customization.companions import balanced
from mm.customization.config import TrainingConfig
from mm.customization.data import Example, Kind, fingerprint
from mm.customization.effects import check_effects
from mm.customization.estimate import Estimate, estimate
from mm.customization.goals import goal_of
from mm.customization.learned import Learned
from mm.customization.methods.protocol import Job, Learner
from mm.customization.methods.registry import method_of
from mm.customization.objectives.protocol import Objective, objective_of
from mm.customization.only_run import only_run
from mm.customization.pictures import OnProgress, Pictures, gathered, preserved_prompts
from mm.customization.pieces import frozen
from mm.customization.previews import draw, save_previews, sheet_of
from mm.customization.run_state import Progress
from mm.customization.sliders import SliderPrompts
from mm.customization.strangers import Strangers
from mm.customization.training import Regularization, Training
from mm.families import family_of
from mm.layers.base_hash import base_hash
from mm.layers.checkpointing import checkpointed
from mm.layers.surgery import check_pipeline

_STYLE_VISIBLE = 0.95  # share of the highest noise below which a picture shows its style


def customize(
    pipe: Any,
    folder: str | Path | None = None,
    *,
    name: str = "",
    kind: Kind = "subject",
    method: str = "auto",
    noun: str = "",
    prompts: SliderPrompts | None = None,
    regularization: str | Path | None = None,
    guard: str | Sequence[str] = (),
    work: str | Path | None = None,
    preserved: str | Sequence[str] | None = None,
    samples: str | Sequence[str] | None = None,
    sample_steps: int | None = None,
    estimated: Callable[[Estimate], None] = lambda made: None,
    progress: OnProgress = lambda share, text: None,
    **settings: Any,
) -> Learned:
    """Learns an adapter from a folder of pictures, or from two prompts.

    Args:
        pipe: a pipeline that draws from text, 16-bit or 4-bit; of an edit one that takes a source picture.
        folder: pictures, each with a caption in a text file of the same name (see `mm.customization.data`); pairs of
            pictures with instructions of an edit. A slider needs none.
        name: what the subject, style or edit is called in prompts, for example "<mug>"; of a slider the patch's name.
        kind: "subject", "style", "edit" (pairs before and after) or "slider" (two prompts, a scale on both sides of 0).
        method: one of `mm.customization.methods.registry.METHODS`; "auto" takes dreambooth.
        noun: the subject's class ("mug"), where the model knows it.
        prompts: of a slider.
        regularization: a folder of pictures of the class, learned beside the subject; the preservation needs none.
        guard: concepts, such as erased ones, whose prompts are held to the base with a weight of their own.
        work: a folder for state, plot and sample pictures; a run that was stopped continues from it.
        preserved: prompts that must stay as they are, instructions of an edit; None takes the family's own.
        samples: prompts of the sample pictures in `work`; None takes the first caption. A slider draws its neutral
            prompt at the scales -1, 0 and 1.
        sample_steps: of sampling them.
        estimated: called with memory and time before the run starts; raising stops it.
        progress: called with a share from 0 to 1 and a text.
        settings: of the method, and of `TrainingConfig`.

    Returns:
        The patch, not applied. Its report has steps, losses and scores.

    Raises:
        UserError: for a folder, a name or a setting that does not fit; the model is unchanged then.
    """
    guard = texts("guard", guard)
    preserved = None if preserved is None else texts("preserved", preserved)
    samples = None if samples is None else texts("samples", samples)
    check_pipeline(pipe, "customization")
    check_call(kind, folder, name, prompts, regularization, work=work, samples=samples)
    guarded = guarded_prompts(guard)
    maker = method_of(method)
    objective = objective_of(pipe, settings.get("size"), edit=kind == "edit")
    config, chosen = settings_of(maker.name, {**objective.training, **maker.defaults}, settings)
    name = name or ("slider" if kind == "slider" else "")
    _check(
        objective, maker.name, kind, name, settings, chosen, folder=folder, noun=noun, guard=guard, prompts=prompts,
        samples=samples or (), preserved=preserved, regularization=regularization,
    )  # fmt: skip
    given = gathered(
        objective, folder, name, kind, noun, prompts, regularization, config, sample_steps, progress
    )  # fmt: skip
    job = Job(
        objective=objective, examples=balanced(given.own, given.beside), name=name, noun=noun, kind=kind,
        settings=chosen, seed=config.seed, steps=config.steps,
    )  # fmt: skip
    kept = preserved_prompts(objective, given.own, name, noun, kind, preserved)
    base = base_hash(objective.modules()[objective.parts[0]])
    place = None if work is None else Path(work)
    with ExitStack() as stack:
        stack.enter_context(only_run(place))
        stack.enter_context(frozen(pipe))
        learner = maker.begin(job)
        stack.callback(learner.remove)
        strangers = Strangers(learner, config.seed) if config.strangers and config.preserve and kept else None
        if strangers is not None:
            stack.callback(strangers.remove)
        of_slider = None if prompts is None else asdict(prompts)
        identity = _identity(
            given.own, name, kind, maker.name, chosen, config, base, kept,
            [of_slider, guarded, fingerprint(given.of_class or [])],
        )  # fmt: skip
        if _prompts_stay(learner, strangers):
            stack.enter_context(objective.remembering())
        inputs = stack.enter_context(checkpointed(list(objective.modules().values()), config.checkpointing))
        training = _training(learner, given, kept, guarded, config, strangers, prompts, place, identity)
        found = estimate(training, inputs)
        check_resources(found, place)
        estimated(found)
        _run(training, place, samples, sample_steps, progress)
        return _learned(pipe, learner, training, base, maker.name, chosen | ({} if of_slider is None else of_slider))


def _check(
    objective: Objective, method: str, kind: Kind, name: str, settings: Mapping[str, Any],
    chosen: Mapping[str, Any], *, folder: object, noun: str, guard: Sequence[str], prompts: SliderPrompts | None,
    samples: Sequence[str], preserved: Sequence[str] | None, regularization: object,
) -> None:  # fmt: skip
    """Raises UserError for what does not fit the model, before pictures are read."""
    if kind != "slider":
        check_name(name, objective)
    check_noun(noun)
    check_effects(
        method, kind, settings, drawn=folder is None, guard=guard, regularization=regularization, noun=noun,
    )  # fmt: skip
    check_rank(objective, chosen)
    check_words(
        objective, kind, name if kind != "slider" else "", noun=noun, guard=guard, samples=samples, prompts=prompts,
        preserved=preserved or (),
    )  # fmt: skip


def _prompts_stay(learner: Learner, strangers: Strangers | None) -> bool:
    """Whether the denoiser reads the same of a prompt at each step: neither words nor text layers are trained."""
    return learner.job.objective.open_vocabulary and not learner.rows() and strangers is None


def _training(
    learner: Learner, given: Pictures, kept: Sequence[str], guarded: Sequence[str], config: TrainingConfig,
    strangers: Strangers | None, prompts: SliderPrompts | None, place: Path | None, identity: str,
) -> Training:  # fmt: skip
    """The run, resumed where its folder has a state."""
    job, goal = learner.job, goal_of(learner, prompts)
    batches = Batches(
        job.objective, job.examples, batch_size=config.batch_size, seed=config.seed, prompts=len(kept),
        own=len(given.own), held=given.plain, **({"visible": _STYLE_VISIBLE} if given.plain else {}),
        preserve_batch=config.preserve_batch, dropout=config.caption_dropout if goal.drops_captions else 0.0,
        guarded=len(guarded), guard_batch=config.guard_batch,
        strangers=0 if strangers is None else len(strangers.prompts), stranger_batch=config.strangers,
    )  # fmt: skip
    return Training(
        learner, batches, kept, config, goal=goal, guarded=guarded, work=place, identity=identity,
        regularization=_regularization(job.objective, given.of_class, config), strangers=strangers,
    )  # fmt: skip


def _run(
    training: Training, place: Path | None, samples: Sequence[str] | None, sample_steps: int | None,
    progress: OnProgress,
) -> None:  # fmt: skip
    """Trains; each step is reported, and each preview is written where there is a folder."""
    steps = training.config.steps

    def on_step(now: Progress) -> None:
        progress(now.step / steps, f"step {now.step} of {steps}, loss {now.losses[-1]:.4f}")

    def on_preview(now: Progress) -> None:
        if place is not None:
            save_previews(place, now, sheet_of(_samples(training.learner, samples, sample_steps)))

    training.run(on_step, on_preview)


def _regularization(
    objective: Objective, examples: Sequence[Example] | None, config: TrainingConfig
) -> Regularization | None:  # fmt: skip
    if examples is None:
        return None
    batches = Batches(
        objective, examples, batch_size=config.batch_size, seed=config.seed + 101, prompts=0, preserve_batch=0
    )
    return Regularization(batches=batches, captions=[example.caption for example in examples])


def _samples(learner: Learner, samples: Sequence[str] | None, steps: int | None) -> list[Image.Image]:
    """The sample pictures of a preview."""
    job = learner.job
    first, objective = job.examples[0], job.objective
    prompts = [first.caption] if samples is None else samples
    made = []
    for prompt in prompts:
        for scale in (-1.0, 0.0, 1.0) if job.kind == "slider" else (None,):
            with nullcontext() if scale is None else learner.at(scale):
                learner.settle()
                made.append(
                    draw(
                        objective.pipe, prompt, side=objective.side, seed=job.seed, steps=steps,
                        source=first.before if job.kind == "edit" else None,
                    )
                )  # fmt: skip
    return made


def _identity(
    examples: Sequence[Example], name: str, kind: str, method: str, chosen: Any, config: TrainingConfig, base: str,
    prompts: Sequence[str], more: Sequence[Any],
) -> str:  # fmt: skip
    parts = [fingerprint(examples), name, kind, method, dict(chosen), asdict(config), base, list(prompts), *more]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _learned(
    pipe: Any, learner: Learner, training: Training, base: str, method: str, chosen: dict[str, Any]
) -> Learned:  # fmt: skip
    job, progress, config = learner.job, training.progress, training.config
    family = family_of(pipe)
    best = progress.scores[progress.best]
    if best[0] == 0:
        warnings.warn(
            "no preview was better than the start, so that the adapter changes nothing that was learned; give more "
            "steps, another learning_rate, or a smaller preserve",
            stacklevel=3,
        )
    report = {
        "steps": progress.step, "pictures": training.batches.own,
        "companions": len(job.examples) - training.batches.own, "stopped_early": progress.stopped,
        "best_step": best[0], "score": round(best[1], 6), "error": round(best[2], 6), "drift": round(best[3], 6),
        "last_drift": round(progress.scores[-1][3], 6),
        "loss": [round(x, 5) for x in progress.losses[:: max(1, len(progress.losses) // 50)]],
    }  # fmt: skip
    settings = {
        "name": job.name, "noun": job.noun, "kind": job.kind, "size": job.objective.side, **chosen,
        **{key: value for key, value in asdict(config).items() if key != "size"}, **learner.settings,
    }  # fmt: skip
    if training.guarded:
        report["guard_drift"] = round(training.guard_drift(), 6)
        settings["guarded"] = list(training.guarded)
    tokens = learner.tokens()
    if tokens:
        settings["tokens"] = tokens
    return Learned(
        entries=learner.entries(), method=method, base=base, settings=settings, report=report,
        name=re.sub(r"[^A-Za-z0-9_-]+", "-", job.name).strip("-") or "subject",
        family=family.name if family is not None else "",
    )  # fmt: skip
