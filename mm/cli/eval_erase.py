"""`mm eval erase`: makes erasures, or takes one from a file, and measures what they do."""

from __future__ import annotations

import json as json_lib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mm.cli import options as shared
from mm.cli.options import DrawingMode
from mm.core.checks import MAX_SEED

EXAMPLE = "Example: mm eval erase wolf 'style: neon' --limit 16 --json runs/erase.json"


def erase(
    targets: Annotated[
        list[str] | None, typer.Argument(help="Concepts; default: ten objects and four styles, one after another.")
    ] = None,
    patch: Annotated[Path | None, typer.Option(help="Measure this patch instead of making one.")] = None,
    model: Annotated[str, typer.Option(help="An embedded model, a folder, or a hub name.")] = "mm-tiny",
    method: Annotated[str | None, typer.Option(help="A method of mm erase.")] = None,
    how: Annotated[str, typer.Option(help="alone, together (one patch for all) or stacked (a patch each).")] = "alone",
    setting: Annotated[list[str] | None, typer.Option(help="name=value of the method, as JSON.")] = None,
    mode: Annotated[DrawingMode, typer.Option(help="By flow matching, or in codes.")] = DrawingMode.flow,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the run.")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="Prompts of each role.")] = 32,
    composition: Annotated[int, typer.Option(min=0, help="Compositional prompts a task; 0 = none.")] = 0,
    attack: Annotated[list[str] | None, typer.Option(help="An attack; repeat for more.")] = None,
    quantize: Annotated[list[str] | None, typer.Option(help="Measure again after w4a8, w4a4, int4 ...")] = None,
    patch_bits: Annotated[list[int] | None, typer.Option(help="Measure the patch at so many bits, too.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Sampling steps.")] = None,
    tuning: Annotated[bool, typer.Option(help="Prompts for choosing settings, not those for reporting.")] = False,
    judge: Annotated[Path | None, typer.Option(help="Folder of another judge.")] = None,
    json: shared.ReportOption = None,
    force: shared.ForceOption = False,
) -> None:
    """Erases concepts and measures what is drawn instead, what is kept, and what attacks bring back."""
    from mm.adapters.patch import Patch
    from mm.core.errors import UserError
    from mm.engine.notices import no_loading_bars
    from mm.erasure.checks import check_call
    from mm.erasure.concepts import contexts_for
    from mm.erasure.erase import DEFAULT
    from mm.evaluation.erase import EraseConfig, batch_on, evaluate_erase, loaded
    from mm.evaluation.erase_attacks import world_attack
    from mm.evaluation.quantizers import quantizer

    if (family := shared.family_of_model(model)) is not None:
        shared.check_world(model, family.modes)
    made = {"--method": method, "--setting": setting, "--how": how != "alone"}
    if patch is not None and (idle := [name for name, value in made.items() if value]):
        raise UserError(f"{', '.join(idle)} would act on a patch that is made, and --patch is there; leave it out")
    given_patch = Patch.load(patch) if patch else None
    if given_patch is not None:
        if targets:
            raise UserError("targets and --patch exclude each other; the patch says what it erases")
        targets, how = list(given_patch.report.get("concepts", ())), "together"
        if not targets:
            raise UserError(f"{patch} does not say what it erases; it is no patch of mm erase")
    given: dict[str, Any] = {"targets": tuple(targets)} if targets else {}
    config = EraseConfig(
        **given, how=how, method=method or DEFAULT, options=dict(setting_of(s) for s in setting or ()),  # type: ignore[arg-type]
        split="tune" if tuning else "report", each=limit, composition=composition, quantize=tuple(quantize or ()),
        attacks=tuple(attack or ()), patch_bits=tuple(patch_bits or ()), mode=mode.value, steps=steps, seed=seed,
    )  # fmt: skip
    if given_patch is None:
        check_call(
            config.targets, anchors=None, retain="auto", method=config.method, strength=1.0, scope="draw",
            settings=config.options, contexts=contexts_for(shared.family_of_model(model)),
        )  # fmt: skip
    for name in config.attacks:
        world_attack(name, None)
    for name in config.quantize:
        quantizer(name)
    no_loading_bars()
    pipe, reader = loaded(model, judge)
    config = replace(config, batch_size=batch_on(pipe.device))
    report = evaluate_erase(
        pipe, reader, config, patch=given_patch, json_file=json, settings={"model": model},
        progress=lambda text: print(text, file=sys.stderr, flush=True),
    )  # fmt: skip
    if given_patch is not None and patch is not None:
        given_patch.save(patch)
        print(f"{patch}: the certificate in it is that of this run")
    print(table(report))


def setting_of(text: str) -> tuple[str, Any]:
    """A setting's name and value from "name=value". Raises UserError for anything else."""
    from mm.core.errors import UserError

    name, _, value = text.partition("=")
    try:
        return name, json_lib.loads(value)
    except ValueError:
        raise UserError(f"--setting {text!r}: give name=value, the value as JSON, for example rank=64") from None


def table(report: dict[str, Any]) -> str:
    """The pooled rates and the card of each concept."""
    rows = [f"overall {report['overall']:.3f} (as shares of the base's {report['relative']:.3f}), "
            f"ceiling {report['ceiling']:.3f}"]  # fmt: skip
    for name, rate in report["tasks"].items():
        if rate["n"]:
            base = report["base"][name]["score"]
            interval = f"[{rate['low']:.3f}, {rate['high']:.3f}]"
            rows.append(f"{name:12} {rate['score']:.3f}  {interval}  n {rate['n']:<5} base {base:.3f}")
    if report["composition"] is not None:
        rows.append(f"composition  {report['composition']:+.3f}")
    for name, concept in report["concepts"].items():
        seen = ", ".join(f"{k} {n}" for k, n in list(concept["instead"].items())[:3])
        rates = ", ".join(f"{k} {concept['rates'][k]['score']:.3f}" for k in ("UA", "IRA", "CRA"))
        rows.append(f"{name}: {rates}; instead: {seen}")
        rows += [
            f"  {kind} {which}: {_brief(found)}"
            for kind in ("quantized", "attacks") for which, found in concept[kind].items()
        ]  # fmt: skip
    return "\n".join(rows)


def _brief(found: dict[str, Any]) -> str:
    if "success" in found:
        hit, without = found["success"], found["without"]
        interval = f"[{hit['low']:.3f}, {hit['high']:.3f}]"
        return f"success {hit['score']:.3f} {interval} n {hit['n']}, without {without['score']:.3f}"
    which = [name for name in ("rates", "baked", "base") if name in found]
    return "; ".join(f"{w} UA {found[w]['UA']['score']:.3f}, IRA {found[w]['IRA']['score']:.3f}" for w in which)
