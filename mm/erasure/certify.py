"""Measures an erasure and gives its certificate.

Design choices
- The model leaves a measurement as it came, also where the measurement fails.
- Quantized re-tests run on copies, with the patch on the quantized weights and with the patch baked in before. Dense
  and rotation entries are truncated to a low rank for the first of them, since quantized layers take no others.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from mm.adapters.acting import acting
from mm.adapters.factors import WHOLE
from mm.adapters.patch import Patch
from mm.adapters.stack import stack_of
from mm.core.errors import UserError
from mm.core.statistics import paired_change
from mm.erasure.attacks.protocol import Attack
from mm.erasure.attacks.registry import attack_of
from mm.erasure.certificate import Certificate, rates_of
from mm.erasure.concepts import contexts_of, parse
from mm.erasure.margin import rounded_patch
from mm.erasure.measure import Judge, Labels, Measurer
from mm.erasure.probes import Probe, Split, probes_of
from mm.families.family import resolve
from mm.layers.eager import eagerly

Composition = Callable[[Any], Sequence[bool]]
Quantizer = Callable[[Any], object]
GRID = 8  # pictures a row of the grid
TRUNCATED = 32  # rank of a change that no quantized layer takes as it is


def certify(
    measurer: Measurer,
    patch: Patch,
    probes: Sequence[Probe],
    *,
    attacks: Sequence[Attack] = (),
    quantization: Mapping[str, Quantizer] | None = None,
    composition: Composition | None = None,
    patch_bits: Sequence[int] = (),
    baked: bool = True,
    pictures: bool = True,
) -> Certificate:
    """Measures a patch on the measurer's pipeline, and writes what was found into the patch's report.

    Args:
        measurer: pipeline and judge. Labels of the base that it keeps are used again.
        patch: applied already or not; the model is afterwards as it came.
        probes: prompts, see `mm.erasure.probes`.
        attacks: see `mm.erasure.attacks`.
        quantization: by name, a function that quantizes a pipeline in place. It gets copies.
        composition: gives verdicts on pictures of prompts without the targets, the same prompts at each call.
        patch_bits: widths at which the patch's own tensors are measured, too.
        baked: whether quantized copies are also measured with the patch baked in before, which quantizes a second one.
        pictures: keep some, before and after, for a grid.

    Returns:
        The certificate.
    """
    started, pipe = time.monotonic(), measurer.pipe
    prompts = [p.prompt for p in probes]
    with acting(pipe, patch, None):
        before = measurer.labels(prompts, base=True)
        first = list(composition(pipe)) if composition else []
    with acting(pipe, patch):
        after = measurer.labels(prompts)
        second = list(composition(pipe)) if composition else []
        own = dataclasses.replace(measurer, kept=dict(zip(prompts, after, strict=True)))
        broken = {attack.name: _attacked(own, patch, probes, attack) for attack in attacks}
    made = Certificate(
        targets=tuple(dict.fromkeys(patch.report.get("targets", ()))) or _targets(probes),
        rates=rates_of(probes, after), base=rates_of(probes, before), instead=_instead(probes, before, after),
        composition=_change(first, second) if composition else None,
        quantized={k: _quantized(measurer, patch, probes, q, baked) for k, q in (quantization or {}).items()}
        | {f"patch at {bits} bits": _rounded(measurer, patch, probes, bits) for bits in patch_bits},
        attacks=broken, seconds={"make": patch.report.get("seconds"), "measure": round(time.monotonic() - started, 1)},
        settings={"seed": measurer.seed, **{k: x for k, x in measurer.call.items() if _jsonable(x)}},
        pictures=_shown(measurer, patch, probes) if pictures else (),
    )  # fmt: skip
    patch.report["certificate"] = made.to_dict()
    return made


def _attacked(measurer: Measurer, patch: Patch, probes: Sequence[Probe], attack: Attack) -> dict[str, Any]:
    started = time.monotonic()
    with eagerly():
        found = attack.run(measurer, patch, probes)
    found["seconds"] = round(time.monotonic() - started, 1)
    measurer.progress(0, f"attack {attack.name}: {found}")
    return found


def verify(
    patch: Patch,
    pipe: Any,
    *,
    judge: Judge,
    attacks: str | Sequence[Any] = (),
    quantization: Mapping[str, Any] | Sequence[Any] = (),
    probes: Sequence[Probe] | None = None,
    each: int = 24,
    split: Split = "report",
    composition: Composition | None = None,
    calibration: Any = None,
    patch_bits: Sequence[int] = (),
    seed: int = 0,
    batch_size: int = 16,
    pictures: bool = True,
    **call: Any,
) -> Certificate:
    """`patch.verify(pipe, judge=...)`: measures an erasure.

    Args:
        patch: of `mm.erase`.
        pipe: that draws.
        judge: from PIL pictures to labels, a set a picture; None for one that cannot be read.
        attacks: names or objects of `mm.erasure.attacks`.
        quantization: settings for `mm.quantize`, or by name functions that quantize a pipeline in place.
        probes: prompts to measure with; None takes the family's, or templates of plain English.
        each: probes of each role.
        split: "report", or "tune" for choosing settings.
        composition: gives verdicts on compositional prompts.
        calibration: prompts for quantizing.
        patch_bits: widths at which the patch's own tensors are measured, too.
        seed: of the pictures.
        batch_size: prompts a call.
        pictures: keep some, for a grid.
        call: arguments of the pipeline.

    Raises:
        UserError: for a patch that does not say what it erases, and an unknown attack.
    """
    named = patch.report.get("concepts") or patch.report.get("targets")
    if not named and probes is None:
        raise UserError(f"patch {patch.name!r} does not say what it erases; give probes=[...]")
    if probes is None:
        contexts = contexts_of(pipe)
        concepts = [parse(name, contexts) for name in named or ()]
        probes = probes_of(contexts, concepts, patch.report.get("retained", ()), split=split, each=each)
    measurer = Measurer(pipe=pipe, judge=judge, seed=seed, batch_size=batch_size, call=call)
    chosen = [attacks] if isinstance(attacks, str) else attacks
    return certify(
        measurer, patch, probes, attacks=[attack_of(a) if isinstance(a, str) else a for a in chosen],
        quantization=_quantizers(quantization, calibration), composition=composition,
        patch_bits=patch_bits, pictures=pictures,
    )  # fmt: skip


def _quantizers(given: Mapping[str, Any] | Sequence[Any], calibration: Any) -> dict[str, Quantizer]:
    """Functions by name. `mm.quantization` and this package do not import each other, so it is named here."""
    if isinstance(given, Mapping):
        return dict(given)
    quantize = resolve("mm.quantization.quantize:quantize")

    def of(config: Any) -> Quantizer:
        return lambda pipe: quantize(pipe, config, calibration=calibration, progress=False)

    return {f"w{c.bits}a{c.activation_bits}-r{c.rank}": of(c) for c in given}


def _targets(probes: Sequence[Probe]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(p.concept for p in probes if p.role == "target"))


def _instead(probes: Sequence[Probe], before: Sequence[Labels], after: Sequence[Labels]) -> dict[str, int]:
    """Labels on pictures of the target's prompts that the base's pictures of them lack, the most frequent first."""
    seen: Counter[str] = Counter()
    for probe, old, new in zip(probes, before, after, strict=True):
        if probe.role == "target":
            seen.update({"unreadable"} if new is None else new - (old or frozenset()))
    return dict(seen.most_common(12))


def _change(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
    change, low, high = paired_change(before, after, range(len(before)))
    base = sum(before) / max(1, len(before))
    names = {"change": change, "low": low, "high": high, "base": base}
    return {key: round(value, 4) for key, value in names.items()} | {"n": len(before)}


def _quantized(
    measurer: Measurer, patch: Patch, probes: Sequence[Probe], quantize: Quantizer, baked: bool
) -> dict[str, Any]:
    """Rates of a quantized copy without the patch, with it, and with it baked in before quantizing."""
    prompts = [p.prompt for p in probes]
    pipe = _without(measurer.pipe, patch)
    quantize(pipe)
    own = measurer.on(pipe)
    rows: dict[str, Any] = {"base": rates_of(probes, own.labels(prompts))}
    rows |= _applied(patch, pipe)
    rows["rates"] = rates_of(probes, own.labels(prompts))
    if not baked:
        return rows
    try:
        pipe = _without(measurer.pipe, patch)
        patch.bake(pipe)
    except UserError as error:  # 4-bit weights take no baking
        return rows | {"not baked": str(error)}
    quantize(pipe)
    return rows | {"baked": rates_of(probes, measurer.on(pipe).labels(prompts))}


def _without(pipe: Any, patch: Patch) -> Any:
    """A copy of a pipeline that does not carry the patch."""
    made = copy.deepcopy(pipe)
    if any(item.name == patch.name for item in stack_of(made).list()):
        patch.undo(made)
    return made


def _applied(patch: Patch, pipe: Any) -> dict[str, Any]:
    """Applies a patch to a quantized model; what no 4-bit layer takes is truncated to a low rank first.

    Returns:
        Empty where the patch went on as it is; else "truncated", with the rank and the largest share that was lost.
    """
    try:
        patch.apply(pipe)
    except UserError:
        if all(entry.kind not in (*WHOLE, "rotation") for entry in patch.entries.values()):
            raise
    else:
        return {}
    cut = patch.truncated(TRUNCATED, pipe)
    cut.apply(pipe)
    return {"truncated": {"rank": TRUNCATED, "lost": round(max(cut.report["truncated"].values()), 4)}}


def _rounded(measurer: Measurer, patch: Patch, probes: Sequence[Probe], bits: int) -> dict[str, Any]:
    """Rates with the patch's own tensors rounded."""
    small = dataclasses.replace(patch, entries=rounded_patch(patch.entries, bits), name=f"{patch.name} at {bits} bits")
    with acting(measurer.pipe, patch, None), acting(measurer.pipe, small):
        return {"rates": rates_of(probes, measurer.labels([p.prompt for p in probes]))}


def _shown(
    measurer: Measurer, patch: Patch, probes: Sequence[Probe]
) -> tuple[tuple[str, Image.Image, Image.Image], ...]:
    """Pictures of some targets and some retained concepts, before and after."""
    rows = [[p.prompt for p in probes if p.role == role][: GRID // 2] for role in ("target", "retained")]
    prompts = [prompt for row in rows for prompt in row]
    with acting(measurer.pipe, patch, None):
        before = measurer.draw(prompts)
    with acting(measurer.pipe, patch):
        after = measurer.draw(prompts)
    return tuple(zip(prompts, before, after, strict=True))


def _jsonable(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)
