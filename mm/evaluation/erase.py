"""`mm eval erase`: makes erasures of concepts of the world, and measures each of them.

Design choices
- Each target is erased alone, or all of them by one patch, or all by patches that are stacked one after another.
- What the unchanged model draws is drawn once and serves all targets.
- Composition is measured on the prompts of `mm eval compose` that name no target.
- With `split="tune"` nothing is drawn that is used for reporting; methods and settings are chosen that way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mm.adapters.patch import Patch
from mm.core.checks import texts
from mm.core.devices import choose
from mm.core.errors import UserError
from mm.core.statistics import share, wilson
from mm.erasure.certificate import Certificate, harmonic, over
from mm.erasure.certify import certify
from mm.erasure.concepts import contexts_of, parse
from mm.erasure.erase import DEFAULT, erase
from mm.erasure.grid import before_after_png
from mm.erasure.margin import one_warning
from mm.erasure.measure import Labels, Measurer, seed_of
from mm.erasure.probes import Split, probes_of
from mm.evaluation import compose
from mm.evaluation.erase_attacks import world_attack
from mm.evaluation.prompts import COMPOSE, COMPOSE_TUNE, load_prompts
from mm.evaluation.quantizers import quantizer
from mm.evaluation.report import write_report
from mm.world.concept_labels import label_judge
from mm.world.concepts import holds
from mm.world.judge import Judge
from mm.world.tasks import satisfies

OBJECTS: tuple[str, ...] = ("wolf", "cat", "apple", "fish", "car", "house", "guitar", "tree", "owl", "star")
STYLES: tuple[str, ...] = ("watercolor", "neon", "mosaic", "sepia")
TWENTY: tuple[str, ...] = (
    *OBJECTS, "tiger", "bear", "frog", "butterfly", "pizza", "donut", "boat", "castle", "crown", "sunflower",
)  # fmt: skip
BATCH = 128  # prompts a call on a GPU
SHOWN = 2  # certificates that keep pictures for the grid
How = Literal["alone", "together", "stacked"]
ProgressCallback = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class EraseConfig:
    """How erasures are made and measured.

    targets: concepts, as `mm.erase` takes them. how: each alone, all in one patch, or in stacked patches. method and
    options: of `mm.erase`. split: prompts for tuning or for reporting. each: prompts of each role (twice as many of
    retained concepts). composition: prompts a task, 0 for none. quantize: names of `mm.evaluation.quantizers`. attacks:
    names of `mm.evaluation.erase_attacks`. attacked: prompts an attack, None for each attack's own number. patch_bits:
    widths of the patch's own tensors. baked: measure quantized models also with the patch baked in before.
    steps, mode: of the pictures.
    """

    targets: tuple[str, ...] = (*OBJECTS, *STYLES)
    how: How = "alone"
    method: str = DEFAULT
    options: Mapping[str, Any] = field(default_factory=dict)
    split: Split = "report"
    each: int = 32
    composition: int = 0
    quantize: tuple[str, ...] = ()
    attacks: tuple[str, ...] = ()
    attacked: int | None = None
    patch_bits: tuple[int, ...] = ()
    baked: bool = True
    mode: str = "flow"
    steps: int | None = None
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("targets", "quantize", "attacks"):
            object.__setattr__(self, name, texts(name, getattr(self, name)))
        if not self.targets:
            raise UserError("there is no target; name at least one concept to erase")
        if self.how not in ("alone", "together", "stacked"):
            raise UserError(f"how is {self.how!r}; give alone, together or stacked")
        if self.split not in ("tune", "report"):
            raise UserError(f"split is {self.split!r}; give tune or report")
        for name in ("each", "batch_size", "attacked"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give 1 or more")


def loaded(model: str = "mm-tiny", judge: Path | None = None) -> tuple[Any, Judge]:
    """A pipeline and a judge on the device that `mm.core.devices` chooses, in float32, in which attacks train.

    Args:
        model: an embedded model, a folder, or a hub name.
        judge: folder of another judge.
    """
    from mm import TextToImagePipeline

    device = choose().device
    reader = Judge.from_pretrained(judge).to(device)
    pipe: Any = TextToImagePipeline.from_pretrained(model)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, device, torch.float32)
    return pipe, reader


def batch_on(device: torch.device) -> int:
    """Prompts a call: on a GPU a call takes as long for many as for few."""
    return 16 if device.type == "cpu" else BATCH


def evaluate_erase(
    pipe: Any,
    judge: Judge,
    config: EraseConfig,
    *,
    patch: Patch | None = None,
    json_file: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    kept: dict[str, Labels] | None = None,
    progress: ProgressCallback = lambda text: None,
) -> dict[str, Any]:
    """Erases, measures and reports; with `json_file`, writes the report and a grid of before and after beside it.

    Args:
        pipe: a text-to-image pipeline of the world. It is unchanged afterwards.
        judge: of the world.
        config: what is erased and measured.
        patch: measured instead of one that is made here; `config.targets` says what it erases.
        json_file: for the report.
        settings: of the caller, written into the report.
        kept: labels of the unchanged model's pictures, from an earlier call with the same drawing settings.
        progress: called with a text.
    """
    call = {"mode": config.mode, "num_inference_steps": config.steps}
    measurer = Measurer(
        pipe=pipe, judge=label_judge(judge), seed=config.seed, batch_size=config.batch_size, call=call,
        kept={} if kept is None else kept, progress=lambda count, text: progress(text) if not count else None,
    )  # fmt: skip
    found: dict[str, Certificate] = {}
    quiet = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    made: list[Patch] = []
    try:
        with one_warning():
            for names in [config.targets] if config.how == "together" else [(t,) for t in config.targets]:
                progress(f"erasing {', '.join(names)}")
                one = patch or erase(pipe, names, method=config.method, **config.options)
                if config.how == "stacked":
                    one.apply(pipe)
                    made.append(one)
                    continue
                shown = config.split == "report" and len(found) < SHOWN
                found[", ".join(names)] = _measure(measurer, judge, one, names, config, shown)
        undone = {}
        if config.how == "stacked":
            found = _stacked(measurer, made, config)
            undone = taken_off(measurer, made, config)
    finally:
        for one in reversed(made):
            one.undo(pipe)
        pipe.set_progress_bar_config(**quiet)
    report = summary(found) | {"settings": _plain(config) | dict(settings or {})}
    report |= {"undone": undone} if undone else {}
    if json_file is not None:
        rows = [row for c in found.values() for row in c.pictures]
        write_report(json_file, report, before_after_png(rows[:: max(1, len(rows) // 12)][:12]))
    return report


def _measure(
    measurer: Measurer, judge: Judge, patch: Patch, names: Sequence[str], config: EraseConfig, shown: bool
) -> Certificate:
    contexts = contexts_of(measurer.pipe)
    concepts = [parse(name, contexts) for name in names]
    probes = probes_of(contexts, concepts, (), split=config.split, each=config.each)
    verdicts = composition(judge, [c.name for c in concepts], config) if config.composition else None
    return certify(
        measurer, patch, probes, attacks=[world_attack(name, config.attacked) for name in config.attacks],
        quantization={name: quantizer(name) for name in config.quantize}, composition=verdicts,
        patch_bits=config.patch_bits, baked=config.baked, pictures=shown,
    )  # fmt: skip


def _stacked(measurer: Measurer, made: Sequence[Patch], config: EraseConfig) -> dict[str, Certificate]:
    """Each target's rates with all patches on, and again with its own patch taken off."""
    pipe, found = measurer.pipe, {}
    contexts = contexts_of(pipe)
    concepts = [parse(name, contexts) for name in config.targets]
    for concept, patch in zip(concepts, made, strict=True):
        probes = probes_of(contexts, [concept], (), split=config.split, each=config.each)
        banned = [c.name for c in concepts if c != concept]
        probes = [p for p in probes if not any(holds(p.prompt, name) for name in banned)]
        # the base of one patch in a stack is the stack without it
        found[str(concept)] = certify(measurer.on(pipe), patch, probes, pictures=False)
    return found


def taken_off(measurer: Measurer, made: Sequence[Patch], config: EraseConfig) -> dict[str, Any]:
    """What each patch of a stack leaves when it alone is taken off.

    Returns:
        By target: "shown", the share of its pictures that show it again; "base", that of the unchanged model; "equal",
        whether every tensor of the model and every branch is, bit for bit, that of a stack made without the patch.
    """
    contexts, found = contexts_of(measurer.pipe), {}
    concepts = [parse(name, contexts) for name in config.targets]
    base = copy.deepcopy(measurer.pipe)
    for one in reversed(made):
        one.undo(base)
    for k, concept in enumerate(concepts):
        without, never = copy.deepcopy(measurer.pipe), copy.deepcopy(base)
        made[k].undo(without)
        for one in (*made[:k], *made[k + 1 :]):
            one.apply(never)
        banned = [c.name for c in concepts if c != concept]
        probes = probes_of(contexts, [concept], (), split=config.split, each=config.each)
        probes = [p for p in probes if p.role == "target" and not any(holds(p.prompt, name) for name in banned)]
        seen = [measurer.on(pipe).labels([p.prompt for p in probes]) for pipe in (without, base)]
        shown = [share([s is not None and p.concept in s for p, s in zip(probes, x, strict=True)]) for x in seen]
        found[str(concept)] = {"shown": shown[0], "base": shown[1], "equal": same_bits(without, never)}
    return found


def same_bits(one: Any, other: Any) -> bool:
    """Whether all tensors of two pipelines' modules, and the branches of their layers, are equal bit for bit."""
    return [_bits(part) for part in _modules(one)] == [_bits(part) for part in _modules(other)]


def _modules(pipe: Any) -> list[nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


def _bits(module: nn.Module) -> dict[str, bytes]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {
        name: t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() for name, t in tensors.items()
    }


def composition(judge: Judge, targets: Sequence[str], config: EraseConfig) -> Callable[[Any], list[bool]]:
    """Verdicts on compositional prompts that name no target."""
    file = COMPOSE if config.split == "report" else COMPOSE_TUNE
    prompts = [p for p in load_prompts(file) if not any(holds(p.text, name) for name in targets)]
    chosen = compose.limited(prompts, config.composition)
    drawing = compose.ComposeConfig(mode=config.mode, steps=config.steps, batch_size=config.batch_size)

    def verdicts(pipe: Any) -> list[bool]:
        pictures = compose.draw(pipe, [(p, seed_of(config.seed, p.text)) for p in chosen], drawing, None)
        return [satisfies(r, p.wanted).ok for r, p in zip(judge.read(pictures), chosen, strict=True)]

    return verdicts


def summary(found: Mapping[str, Certificate]) -> dict[str, Any]:
    """Pooled rates over certificates, with those of each."""
    tasks, base = (_pooled([getattr(c, which) for c in found.values()]) for which in ("rates", "base"))
    relative = {name: over(tasks[name], base[name]) for name in ("IRA", "CRA", "lookalike") if base[name]["n"]}
    changes = [c.composition for c in found.values() if c.composition]
    return {
        "overall": round(harmonic([tasks[k]["score"] for k in ("UA", "IRA", "CRA")]), 4),
        "relative": round(harmonic([tasks["UA"]["score"], relative["IRA"], relative["CRA"]]), 4),
        "ceiling": round(harmonic([1.0, base["IRA"]["score"], base["CRA"]["score"]]), 4),
        "n": sum(t["n"] for name, t in tasks.items() if name in ("UA", "IRA", "wording", "lookalike")),
        "tasks": tasks, "base": base, "of_base": {k: round(x, 4) for k, x in relative.items()},
        "composition": round(sum(c["change"] for c in changes) / len(changes), 4) if changes else None,
        "concepts": {name: c.to_dict() for name, c in found.items()},
    }  # fmt: skip


def _pooled(rates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    made = {}
    for name in rates[0]:
        n = sum(r[name]["n"] for r in rates)
        hits = sum(round((r[name]["score"] or 0.0) * r[name]["n"]) for r in rates)
        low, high = wilson(hits, n)
        made[name] = share([]) if not n else {
            "score": round(hits / n, 4), "n": n, "low": round(low, 4), "high": round(high, 4)
        }  # fmt: skip
    return made


def _plain(config: EraseConfig) -> dict[str, Any]:
    return asdict(config) | {
        key: list(getattr(config, key)) for key in ("targets", "quantize", "attacks", "patch_bits")
    }
