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
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from mm.core.checks import texts
from mm.customization.batches import Batches
from mm.customization.captions import renamed
from mm.customization.checks import (
    check_call,
    check_name,
    check_names_read,
    check_rank,
    check_resources,
    check_words,
    guarded_prompts,
    settings_of,
    warn_of_captions,
    warn_of_small,
)
from mm.customization.companions import balanced, companions
from mm.customization.config import TrainingConfig
from mm.customization.data import Example, Kind, fingerprint, read_folder, read_regularization
from mm.customization.effects import check_effects
from mm.customization.estimate import Estimate, estimate
from mm.customization.goals import goal_of
from mm.customization.learned import Learned
from mm.customization.methods.protocol import Job, Learner
from mm.customization.methods.registry import method_of
from mm.customization.methods.through_peft import PeftAdapters
from mm.customization.objectives.protocol import Objective, objective_of
from mm.customization.only_run import only_run
from mm.customization.previews import draw, save_previews, sheet_of
from mm.customization.recoloured import recoloured
from mm.customization.sliders import SliderPrompts
from mm.customization.strangers import Strangers
from mm.customization.training import Progress, Regularization, Training
from mm.families import family_of
from mm.layers.base_hash import base_hash
from mm.layers.surgery import check_pipeline, roots_of

PRESERVED = 48  # unrelated prompts that are held to the base
_STYLE_VISIBLE = 0.95  # share of the highest noise below which a picture shows its style
OnProgress = Callable[[float, str], None]


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
    check_pipeline(pipe, "customization")
    guard = texts("guard", guard)
    preserved = None if preserved is None else texts("preserved", preserved)
    samples = None if samples is None else texts("samples", samples)
    check_call(kind, folder, name, prompts, regularization, work=work, samples=samples)
    guarded = guarded_prompts(guard)
    maker = method_of(method)
    objective = objective_of(pipe, settings.get("size"), edit=kind == "edit")
    config, chosen = settings_of(maker.name, {**objective.training, **maker.defaults}, settings)
    if kind == "slider":
        name = name or "slider"
    else:
        check_name(name, objective)
    check_effects(
        maker.name, kind, settings, drawn=folder is None, guard=guard, preserved=preserved,
        regularization=regularization, noun=noun,
    )  # fmt: skip
    check_rank(objective, chosen)
    check_words(
        objective, kind, name if kind != "slider" else "", noun=noun, guard=guard, samples=samples or (),
        prompts=prompts, preserved=preserved or (),
    )  # fmt: skip
    class_pictures = None
    if regularization is not None:
        class_pictures = read_regularization(regularization, noun=noun, name=name)
    examples = _examples(objective, folder, name, kind, noun, prompts, config, sample_steps, progress)
    warn_of_captions(objective, name, [one.caption for one in (*examples, *(class_pictures or ()))])
    check_names_read(objective, name, [one.caption for one in examples])
    warn_of_small(examples, objective.side)
    kept = _preserved(objective, examples, name, noun, kind, preserved)
    beside, plain = _companions(objective, examples, name, noun, kind, config, sample_steps, progress)
    job = Job(
        objective=objective,
        examples=balanced(examples, beside),
        name=name,
        noun=noun,
        kind=kind,
        settings=chosen,
        seed=config.seed, steps=config.steps,
    )  # fmt: skip
    base = base_hash(objective.modules()[objective.parts[0]])
    wanted = _freeze(pipe)
    learner: Learner | None = None
    strangers: Strangers | None = None
    held = ExitStack()
    try:
        learner = maker.begin(job)
        strangers = Strangers(learner, config.seed) if config.strangers and config.preserve and kept else None
        goal = goal_of(learner, prompts)
        batches = Batches(
            objective, job.examples, batch_size=config.batch_size, seed=config.seed, prompts=len(kept),
            own=len(examples), held=plain, **({"visible": _STYLE_VISIBLE} if kind == "style" else {}),
            preserve_batch=config.preserve_batch, dropout=config.caption_dropout if goal.drops_captions else 0.0,
            guarded=len(guarded), guard_batch=config.guard_batch,
            strangers=0 if strangers is None else len(strangers.prompts), stranger_batch=config.strangers,
        )  # fmt: skip
        of_slider = None if prompts is None else asdict(prompts)
        more = [of_slider, guarded, fingerprint(class_pictures or [])]
        identity = _identity(examples, name, kind, maker.name, chosen, config, base, kept, more)
        place = None if work is None else Path(work)
        held.enter_context(only_run(place))
        training = Training(
            learner, batches, kept, config, goal=goal, guarded=guarded, work=place, identity=identity,
            regularization=_regularization(objective, class_pictures, config), strangers=strangers,
        )  # fmt: skip
        found = estimate(training)
        check_resources(found, place)
        estimated(found)

        def on_step(now: Progress) -> None:
            progress(now.step / config.steps, f"step {now.step} of {config.steps}, loss {now.losses[-1]:.4f}")

        def on_preview(now: Progress) -> None:
            if place is not None:
                save_previews(place, now, sheet_of(_samples(learner, samples, sample_steps)))

        training.run(on_step, on_preview)
        return _learned(pipe, learner, training, base, maker.name, chosen | ({} if of_slider is None else of_slider))
    finally:
        if strangers is not None:
            strangers.remove()
        if learner is not None:
            learner.remove()
        for parameter in wanted:
            parameter.requires_grad_(True)
        held.close()


def _regularization(
    objective: Objective, examples: Sequence[Example] | None, config: TrainingConfig
) -> Regularization | None:  # fmt: skip
    if examples is None:
        return None
    batches = Batches(
        objective, examples, batch_size=config.batch_size, seed=config.seed + 101, prompts=0, preserve_batch=0
    )
    return Regularization(batches=batches, captions=[example.caption for example in examples])


def _examples(
    objective: Objective, folder: str | Path | None, name: str, kind: Kind, noun: str, prompts: SliderPrompts | None,
    config: TrainingConfig, steps: int | None, progress: OnProgress,
) -> list[Example]:  # fmt: skip
    """The pictures of the folder; of a slider without one, pictures that the base draws of its neutral prompts."""
    if folder is not None:
        return read_folder(folder, name=name, kind=kind, noun=noun)
    assert prompts is not None
    words = [triple[0] for triple in prompts.triples()]
    count = max(config.slider_pictures, len(words))
    examples = []
    for k in range(count):
        progress(0.0, f"picture {k + 1} of {count}")
        caption = words[k % len(words)]
        picture = draw(objective.pipe, caption, side=objective.side, seed=config.seed + k, steps=steps)
        examples.append(Example(path=Path(f"{k}.png"), caption=caption, picture=picture.convert("RGB")))
    return examples


def _companions(
    objective: Objective, examples: Sequence[Example], name: str, noun: str, kind: Kind, config: TrainingConfig,
    steps: int | None, progress: OnProgress,
) -> tuple[list[Example], list[Example]]:  # fmt: skip
    """Further training pictures, made of the user's and of what the base draws, and pictures to hold prompts on."""
    given: dict[str, Any] = {"count": config.companions, "seed": config.seed, "steps": steps, "progress": progress}
    if kind == "subject":
        return companions(objective, examples, name=name, noun=noun, **given), []
    return recoloured(objective, examples, name=name, **given) if kind == "style" else ([], [])


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


def _freeze(pipe: Any) -> list[nn.Parameter]:
    """Lets no parameter of the model ask for gradients; gives those that did."""
    found = [p for root in roots_of(pipe).values() for p in root.parameters() if p.requires_grad]
    for parameter in found:
        parameter.requires_grad_(False)
    return found


def _preserved(
    objective: Objective, examples: Sequence[Example], name: str, noun: str, kind: str, given: Sequence[str] | None
) -> list[str]:  # fmt: skip
    if given is not None:
        return list(given)
    if kind == "edit":
        return objective.kept_instructions(PRESERVED)
    if kind == "slider":
        # A slider acts on every prompt of its kind; guidance compares with the empty one, which stays as it is.
        return [""]
    family = family_of(objective.pipe)
    own = family.calibration_prompts(PRESERVED) if family is not None else []
    classes = [re.sub(r"\s+", " ", renamed(renamed(e.caption, f"{name} {noun}", noun), name, noun)) for e in examples]
    return list(dict.fromkeys([*own, *(classes if noun else [])]))


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
    native: dict[str, Tensor] = {}
    for piece in learner.pieces:
        if isinstance(piece, PeftAdapters) and method != "lora":
            native |= piece.native()
    return Learned(
        native=native, entries=learner.entries(), method=method, base=base, settings=settings, report=report,
        name=re.sub(r"[^A-Za-z0-9_-]+", "-", job.name).strip("-") or "subject",
        family=family.name if family is not None else "",
    )  # fmt: skip
