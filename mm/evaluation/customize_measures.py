"""What each cell of `mm.evaluation.customize_cells` measures: verdicts of the judge on pictures that are drawn for it.

Design choices
- Every function takes the `Bench` first and returns plain values, which are kept as the cell's file.
- Prompts, seeds and counts are the same for all methods of one table, so that their rows can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mm.adapters.patch import Patch
from mm.customization.merging.merge import DRAWING, merge
from mm.erasure.erase import erase
from mm.evaluation import compose
from mm.evaluation.customize_bench import GROUND, ORTHOGONAL, SUBJECTS, Bench
from mm.evaluation.customize_styles import StyleReader, in_style, scenes_of_objects, style_prompts, undone, write_style
from mm.evaluation.customize_subjects import Ask, asks, follows, shows, write_pictures
from mm.evaluation.prompts import COMPOSE, load_prompts
from mm.world import captions as c
from mm.world import vocabulary as v
from mm.world.tasks import satisfies

PLAIN = "dreambooth"
NOUNS: dict[str, str] = {"panda": "bear", "tulip": "sunflower", "gift": "cake"}  # the nearest known class
KNOWN: tuple[tuple[str, str], ...] = (("cat", "car"), ("tree", "apple"), ("house", "star"), ("fish", "clock"))
PAIRS: tuple[str, ...] = ("a {0} and a {1}", "a {1} left of a {0}", "a {0} above a {1}", "a {0} and a {1} on grass")
ERASED = "wolf"
UNRELATED = 12  # compose prompts of each task
LEARNED_WOLF = "<mug>"  # a name that says nothing of what is learned


def _alone_asks(bench: Bench) -> list[Ask]:
    return list(bench.few([ask for ask in asks() if ask.companion is None]))


def _verdicts(bench: Bench, subject: str, word: str, *patches: Patch, pipe: Any = None) -> dict[str, Any]:
    """Pictures of a subject alone: whether it is seen, and whether what else was asked for is there."""
    prompts = _alone_asks(bench)
    each = [ask for ask in prompts for _ in range(bench.pictures)]
    readings = bench.read(bench.drawn([ask.text.format(word) for ask in prompts], subject, *patches, pipe=pipe))
    done = [follows(reading, ask) for reading, ask in zip(readings, each, strict=True)]
    return {"seen": [shows(r, subject) for r in readings], "follows": [x for x in done if x is not None]}


def _of(patch: Patch) -> dict[str, Any]:
    return {key: patch.report.get(key) for key in ("seconds", "cpu_seconds", "best_step", "error", "drift")}


def alone(bench: Bench, method: str, subject: str) -> dict[str, Any]:
    """An adapter by itself."""
    patch = bench.adapter(method, subject)
    return _verdicts(bench, subject, f"<{subject}>", patch) | {"training": _of(patch)}


def merged(bench: Bench, method: str, subjects: Sequence[str], how: str) -> dict[str, Any]:
    """Each subject with all their adapters merged; the same seeds as by itself."""
    total = _total(bench, method, subjects, how)
    found = {subject: _verdicts(bench, subject, f"<{subject}>", total) for subject in subjects}
    measured = ("largest_loss", "mean_error", "error_before", "error")
    errors = {key: total.report[key] for key in measured if key in total.report}
    return {"subjects": found, "seen": [x for one in found.values() for x in one["seen"]], "errors": errors}


def _total(bench: Bench, method: str, subjects: Sequence[str], how: str) -> Patch:
    each = [bench.adapter(method, subject) for subject in subjects]
    if how in DRAWING:
        return merge(each, method=how, pipe=bench.pipe, steps=bench.steps)
    return merge(each, method="orthogonal" if method == ORTHOGONAL else how)


def unrelated(bench: Bench, method: str | None = None, subject: str = "") -> dict[str, Any]:
    """Reporting prompts that do not name the subject, with its adapter on or with none; the same seeds."""
    prompts = bench.few(compose.limited(load_prompts(COMPOSE), UNRELATED))
    patches = () if method is None else (bench.adapter(method, subject),)
    readings = bench.read(bench.drawn([prompt.text for prompt in prompts], "compose", *patches))
    wanted = [prompt.wanted for prompt in prompts for _ in range(bench.pictures)]
    return {"right": [satisfies(reading, w).ok for reading, w in zip(readings, wanted, strict=True)]}


def beside(bench: Bench, method: str, subject: str) -> dict[str, Any]:
    """A learned subject beside a known object."""
    return {"both": _beside(bench, subject, f"<{subject}>", bench.adapter(method, subject))}


def beside_base(bench: Bench) -> dict[str, Any]:
    """A known object beside another one, drawn by the base."""
    return {"both": _beside(bench, "dog", "dog")}


def _beside(bench: Bench, subject: str, word: str, *patches: Patch) -> list[bool]:
    prompts = bench.few([ask for ask in asks() if ask.companion])
    each = [ask for ask in prompts for _ in range(bench.pictures)]
    readings = bench.read(bench.drawn([ask.text.format(word) for ask in prompts], f"beside {subject}", *patches))
    return [shows(r, subject) and bool(follows(r, ask)) for r, ask in zip(readings, each, strict=True)]


def _both(bench: Bench, names: tuple[str, str], words: tuple[str, str], *patches: Patch) -> list[bool]:
    texts = bench.few([form.format(*words) for form in PAIRS])
    readings = bench.read(bench.drawn(texts, " ".join(names), *patches, times=2 * bench.pictures))
    return [all(shows(reading, name) for name in names) for reading in readings]


def pairs_base(bench: Bench) -> dict[str, Any]:
    """Two known objects in one picture, drawn by the base."""
    return {"both": [x for names in KNOWN for x in _both(bench, names, names)]}


def pairs(bench: Bench, method: str, subjects: Sequence[str], how: str) -> dict[str, Any]:
    """Two learned subjects in one picture, from two adapters merged; each with its neighbour."""
    found = []
    for one, other in zip(subjects[::2], subjects[1::2], strict=True):
        total = _total(bench, method, (one, other), how)
        found += _both(bench, (one, other), (f"<{one}>", f"<{other}>"), total)
    return {"both": found}


def pairs_apart(bench: Bench, method: str, subjects: Sequence[str]) -> dict[str, Any]:
    """Two learned subjects in one picture, each drawn by its own adapter in a place of its own; the same seeds."""
    found = []
    for names in zip(subjects[::2], subjects[1::2], strict=True):
        adapters = [bench.adapter(method, name) for name in names]
        texts = bench.few([form.format(*(f"<{name}>" for name in names)) for form in PAIRS])
        drawn = bench.drawn_apart(texts, " ".join(names), adapters, times=2 * bench.pictures)
        found += [all(shows(reading, name) for name in names) for reading in bench.read(drawn)]
    return {"both": found}


def four_applied(bench: Bench, subject: str) -> dict[str, Any]:
    """An adapter of the 16-bit model on the 4-bit one, which is not quantized again."""
    patch = bench.adapter(PLAIN, subject)
    return _verdicts(bench, subject, f"<{subject}>", patch, pipe=bench.four)


def four_trained(bench: Bench, subject: str) -> dict[str, Any]:
    """An adapter that was trained on the 4-bit model, on it, and the bytes of both models' trained components."""
    patch = bench.adapter(PLAIN, subject, variant="four", pipe=bench.four)
    found = _verdicts(bench, subject, f"<{subject}>", patch, pipe=bench.four)
    return found | {"bytes": weights_of(bench.four), "bytes_sixteen": weights_of(bench.pipe), "training": _of(patch)}


def weights_of(pipe: Any) -> int:
    """Bytes of the weights that a training step reads: parameters and buffers of the components that take adapters."""
    from mm.customization.objectives.protocol import objective_of

    modules = objective_of(pipe).modules().values()
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for module in modules for t in (*module.parameters(), *module.buffers())
    }  # fmt: skip
    return sum(storages.values())


def ground(bench: Bench, method: str, subject: str) -> dict[str, Any]:
    """Learned on one background without captions: how often it is there where none, or another one, is asked for."""
    patch = bench.adapter(method, subject, variant=GROUND)
    word = f"<{subject}>"
    texts = [
        f"a {word}", f"a photo of a {word}", f"one {word}",
        *(f"a {word} {c.BACKGROUND_PHRASES[other][1]}" for other in v.BACKGROUNDS if other != GROUND),
    ]  # fmt: skip
    readings = bench.read(bench.drawn(bench.few(texts), f"ground {subject}", patch, times=2 * bench.pictures))
    free = readings[: 6 * bench.pictures]
    return {
        "free": [r.background == GROUND for r in free],
        "other": [r.background == GROUND for r in readings[len(free) :]],
        "seen": [shows(reading, subject) for reading in readings], "training": _of(patch),
    }  # fmt: skip


def _composed(bench: Bench, word: str, salt: str, *patches: Patch) -> dict[str, Any]:
    prompts = bench.few([ask for ask in asks() if ask.companion or ask.background or ask.style])
    each = [ask for ask in prompts for _ in range(bench.pictures)]
    readings = bench.read(bench.drawn([ask.text.format(word) for ask in prompts], salt, *patches))
    return {
        "composed": [bool(follows(r, ask)) for r, ask in zip(readings, each, strict=True)],
        "companion": [bool(follows(r, ask)) for r, ask in zip(readings, each, strict=True) if ask.companion],
    }  # fmt: skip


def class_base(bench: Bench) -> dict[str, Any]:
    """What the base composes with a known object."""
    return _composed(bench, "dog", "class dog")


def class_kept(bench: Bench, method: str, subject: str) -> dict[str, Any]:
    """What is composed with the subject under "NAME NOUN", after training under captions of that form."""
    noun = NOUNS[subject]
    patch = bench.trained(
        f"{method}-{subject}-noun", partial(_noun_pictures, bench.work / f"{subject}-noun", subject, noun),
        name=f"<{subject}>", method=method, noun=noun,
    )  # fmt: skip
    return _composed(bench, f"<{subject}> {noun}", f"class {subject}", patch) | {"training": _of(patch)}


def _noun_pictures(folder: Path, subject: str, noun: str) -> Path:
    write_pictures(folder, subject)
    for file in folder.glob("*.txt"):
        file.write_text(file.read_text().replace("[trigger]", f"[trigger] {noun}"))
    return folder


def erased(bench: Bench, adapter: str) -> dict[str, Any]:
    """Prompts for an erased concept, with an adapter on top: an unrelated one, or one trained on the concept."""
    file = bench.work / f"erased-{ERASED}.safetensors"
    patch = Patch.load(file) if file.is_file() else erase(bench.pipe, (ERASED,))
    if not file.is_file():
        patch.save(file)
    more = [_on_erased(bench, patch, adapter)] if adapter else []
    prompts = _alone_asks(bench)
    readings = bench.read(bench.drawn([a.text.format(ERASED) for a in prompts], ERASED, patch, *more, times=2))
    found: dict[str, Any] = {"back": [shows(reading, ERASED) for reading in readings]}
    if adapter.startswith("on"):
        readings = bench.read(bench.drawn([a.text.format(LEARNED_WOLF) for a in prompts], ERASED, patch, *more))
        found["learned"] = [shows(reading, ERASED) for reading in readings]
    for one in more:
        found |= {"guard_drift": one.report.get("guard_drift"), "training": _of(one)}
    return found


def _on_erased(bench: Bench, patch: Patch, adapter: str) -> Patch:
    if adapter == "unrelated":
        return bench.adapter(PLAIN, SUBJECTS[0])
    weight = {} if "guarded" in adapter else {"guard_weight": 0.0}
    patch.apply(bench.pipe)
    try:
        return bench.trained(
            f"{PLAIN}-{ERASED}-{adapter.replace(', ', '-')}", partial(write_pictures, bench.work / "wolves", ERASED),
            name=LEARNED_WOLF, method=PLAIN, guard=(ERASED,), **weight,
        )  # fmt: skip
    finally:
        patch.undo(bench.pipe)


def style_learned(bench: Bench, method: str, style: str) -> dict[str, Any]:
    """A style on objects that its training pictures do not show, and the ceilings of both measures."""
    patch = bench.trained(
        f"{method}-{style}", partial(write_style, bench.work / f"{style}-pictures", style),
        name=f"<{style}>", kind="style", method=method,
    )  # fmt: skip
    prompts = bench.few(style_prompts(style))
    drawn = bench.drawn([text for text, _ in prompts], style, patch, times=3 * bench.pictures)
    names = [name for _, name in prompts for _ in range(3 * bench.pictures)]
    reader, true = StyleReader(style), in_style(style, scenes_of_objects(names, "ceiling"))
    return {
        "style": [found == style for found in reader.read(drawn)],
        "style_ceiling": [found == style for found in reader.read(true)],
        "object": _objects(bench, style, drawn, names), "object_ceiling": _objects(bench, style, true, names),
        "training": _of(patch),
    }  # fmt: skip


def _objects(bench: Bench, style: str, pictures: Tensor, names: Sequence[str]) -> list[bool]:
    return [shows(r, name) for r, name in zip(bench.read(undone(style, pictures)), names, strict=True)]
