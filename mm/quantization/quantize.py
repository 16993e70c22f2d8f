"""`mm.quantize`: SVDQuant on any module or pipeline, layer by layer, with a report.

Design choices
- A pipeline's drawing parts are quantized (components of a known family, text encoders only when named);
  a bare module is quantized itself. Which layers, and how, `mm.families` says. Calibration runs show which layers
  really read the same input, by which groups are split.
- Calibration: prompts for a pipeline (it draws with them), keyword arguments for a bare module, or a callable of one's
  own that runs the model. Nothing is trained, and the 16-bit weights of a layer go as soon as it is done.
- The inputs of all groups of a pass are taken before any of them is quantized. A run that goes on takes the groups in
  the same passes and the same order, so same seed means same bytes, with and without a stop.
- A layer that would be no smaller stays at 16 bits: groups of 64 are padded, so that layers of few inputs grow.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mm.core.checks import check_kind
from mm.core.errors import UserError
from mm.core.nouns import counted
from mm.families import find_sites, quantizable_parts, rules_of
from mm.families.sizes import check_side
from mm.layers.base_hash import base_hash
from mm.layers.eager import eagerly
from mm.layers.linear import BranchedLinear
from mm.layers.originals import refuse_patched
from mm.layers.sites import Site
from mm.layers.surgery import branched, roots_of
from mm.layers.tracing import regroup, trace
from mm.quantization import auto, checks, parts, search
from mm.quantization import calibration as cal
from mm.quantization.calibration import Group, Seen
from mm.quantization.config import SVDQuantConfig
from mm.quantization.layout import record
from mm.quantization.pipeline_calls import draw
from mm.quantization.prompt_memory import prompts_remembered
from mm.quantization.report import LayerReport, Report
from mm.quantization.scoring import judge, linear

Calibration = Sequence[str] | Sequence[Mapping[str, Any]] | Callable[[Any], object]
TRACED_STEPS = 2  # of the runs that show which layers read the same input
COUNTED = 2  # runs by which calls are counted: pipelines with two modes take them in turns
GROWS = "stays at 16 bits: it would be no smaller in groups of 64 inputs"


@torch.no_grad()
@eagerly()
def quantize(
    target: Any,
    config: SVDQuantConfig | None = None,
    *,
    calibration: Calibration | None = None,
    components: str | Iterable[str] | None = None,
    progress: bool = True,
    resume: str | Path | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Report:
    """Quantizes a module or the drawing parts of a pipeline in place, and reports what each layer lost.

    Args:
        target: a module, or a pipeline with `components`.
        config: the settings.
        calibration: for a pipeline prompts, or keyword arguments of calls where it needs more than those; for a module
            keyword arguments of calls; or a callable that gets the target and runs it. Not needed with `data_free`.
        components: which of a pipeline's parts; by default those that draw.
        progress: shows bars on stderr.
        resume: a folder where finished groups are kept, from which a run that was stopped goes on.
        dtypes: by part, in which scales, factors and branches will be kept; by default each layer's own. For a model
            that computes in float32 here and is saved in 16 bits.

    Returns:
        What became of each layer and of the whole.

    Raises:
        UserError: where there is nothing to quantize or to calibrate with, where weights or inputs are not finite,
            where adapters of peft are attached, or where `resume` belongs to something else.
    """
    roots_of(target)  # raises for what is no model
    config = SVDQuantConfig() if config is None else config
    check_kind("config", config, SVDQuantConfig, "mm.SVDQuantConfig(...)")
    started = time.monotonic()
    roots = quantizable_parts(target, components)
    if config.data_free and calibration is not None:
        raise UserError("data_free=True quantizes without calibration, and calibration is given; leave one of them out")
    if config.size is not None and not isinstance(target, nn.Module):
        check_side(target, config.size)
    for name, root in roots.items():
        checks.check_model(name, root)
        refuse_patched(root, name)
    checks.warn_of_keep(roots, config.keep)
    if calibration is not None and not callable(calibration):
        one = isinstance(calibration, str | Mapping)
        calibration = cast("Calibration", [calibration] if one else list(calibration))  # read more than once
    runs = [] if config.data_free else _runs(target, calibration, config)
    whole = nn.Module()  # several parts as one, so that one run of the prompts serves all of them
    for name, root in roots.items():
        whole.add_module(name, root)
    brief = runs and _runs(target, calibration, dataclasses.replace(config, steps=min(config.steps, TRACED_STEPS)))
    with prompts_remembered(target, roots.values()):
        sites = _traced(whole, roots, config, brief)
        if not sites:
            raise UserError("; ".join(checks.why_none(name, root) for name, root in roots.items()))
        report = Report(settings=config.to_dict(), untouched=checks.warn_untouched(roots))
        report.adapters = checks.warn_adapters(roots)
        report.whole["bytes_before"] = sum(map(checks.bytes_of, roots.values()))
        bases = {name: base_hash(root) for name, root in roots.items()}
        folder = None if resume is None else Path(resume)
        if folder is not None:
            parts.claim(folder, bases, config, calibration)
        modes = COUNTED if isinstance(target, nn.Module) else len(getattr(target, "modes", ()))
        report.layers = _quantize(whole, cal.groups_of(sites), runs, config, progress, folder, dtypes or {}, modes)
    changed = {row.path.split(".")[0] for row in report.layers if row.bits != 16}
    if not changed and config.bits != "auto":
        raise UserError(f"nothing is quantized: {'; '.join(report.notes())} ({counted(len(report.layers), 'layer')})")
    for name in changed:
        record(roots[name], config, bases[name])
    report.whole["bytes_after"] = sum(map(checks.bytes_of, roots.values()))
    report.seconds = round(time.monotonic() - started, 2)
    return report


def _runs(target: Any, calibration: Calibration | None, config: SVDQuantConfig) -> list[Callable[[], object]]:
    """One call for each prompt or set of arguments."""
    if calibration is None:
        raise UserError(
            "calibration is missing: give prompts (a pipeline), keyword arguments of calls (a module) or a callable; "
            "or SVDQuantConfig(data_free=True) for a quick first try"
        )
    if callable(calibration):
        return [lambda: calibration(target)]
    items: list[Any] = list(calibration)
    if not items:
        raise UserError("calibration is empty; some 16 prompts make a good start")
    if not all(
        isinstance(item, Mapping) or (isinstance(item, str) and not isinstance(target, nn.Module)) for item in items
    ):
        wanted = "keyword arguments of its calls"
        what = f"a module is calibrated with {wanted}" if isinstance(target, nn.Module) else f"prompts or {wanted}"
        raise UserError(f"{what}, not {type(items[0]).__name__}")
    if isinstance(target, nn.Module):
        return [partial(target, **item) for item in items]
    return [partial(draw, target, item, config, k) for k, item in enumerate(items)]


def _sites(name: str, root: nn.Module, config: SVDQuantConfig) -> list[Site]:
    """The sites to quantize, with paths from above the root."""
    kept = [re.compile(pattern) for pattern in config.keep]
    chosen = [
        site
        for site in find_sites(root)
        if site.precision != "keep" and _is_16_bit(root, site.path) and not any(p.search(site.path) for p in kept)
    ]
    checks.check_weights(name, root, chosen)
    return [
        dataclasses.replace(
            site,
            path=f"{name}.{site.path}",
            group=f"{name}.{site.group}",
            parent=site.parent and f"{name}.{site.parent}",
        )
        for site in chosen
    ]


def _traced(
    whole: nn.Module, roots: Mapping[str, nn.Module], config: SVDQuantConfig, runs: Sequence[cal.Run]
) -> list[Site]:
    """The sites of all parts, their groups split by what two runs read; those of unknown models are joined as well."""
    by_part = {name: _sites(name, root, config) for name, root in roots.items()}
    if not runs:
        return [site for sites in by_part.values() for site in sites]
    seen = trace(whole, runs[:COUNTED])
    return [
        site for name, sites in by_part.items() for site in regroup(sites, seen, join=rules_of(roots[name]) is None)
    ]


def _quantize(
    whole: nn.Module,
    groups: Sequence[Group],
    runs: Sequence[cal.Run],
    config: SVDQuantConfig,
    progress: bool,
    folder: Path | None,
    dtypes: Mapping[str, torch.dtype],
    modes: int,
) -> list[LayerReport]:
    sizes = cal.Sizes()
    if runs:
        first = runs[: max(1, min(COUNTED, modes))]
        sizes = cal.call_sizes(whole, groups, _shown(first, "counting calls", progress), len(first))
    bits: dict[str, int] = {}
    if config.bits == "auto":
        bits = auto.choose(whole, groups, runs, sizes, config)
    out: list[LayerReport] = []
    batches = cal.passes(whole, groups, config, sizes.bytes)
    with tqdm(total=len(groups), desc="quantizing", unit="group", disable=not progress) as bar:
        for number, batch in enumerate(batches, 1):
            seen: dict[str, Seen] = {}
            # what is done comes back in its place, so that the others see the model as in a run without a stop
            todo = [group for group in batch if not parts.is_done(folder, group)]
            if runs and todo:
                title = f"calibrating, pass {number} of {len(batches)}"
                seen = cal.watch(whole, todo, _shown(runs, title, progress), len(runs), sizes, config)
            for group in batch:
                width = bits[group.name] if config.bits == "auto" else max(int(config.bits), group.first.bits or 0)
                part = parts.part_of(folder, group)
                dtype = dtypes.get(group.first.path.split(".")[0])
                out += _finish(whole, group, seen.pop(group.name, Seen()), config, width, part, dtype)
                bar.update()
    places = {site.path: k for k, site in enumerate(s for group in groups for s in group.sites)}
    return sorted(out, key=lambda row: places[row.path])


def _shown(runs: Sequence[cal.Run], title: str, progress: bool) -> Iterator[cal.Run]:
    """The runs, with a bar that says how many are done."""
    yield from tqdm(runs, desc=title, unit="run", leave=False, disable=not progress)


def _is_16_bit(root: nn.Module, path: str) -> bool:
    layer = root.get_submodule(path)
    return not isinstance(layer, BranchedLinear) or layer.bits == 16


def _finish(
    whole: nn.Module,
    group: Group,
    seen: Seen,
    config: SVDQuantConfig,
    bits: int,
    part: Path | None,
    dtype: torch.dtype | None,
) -> list[LayerReport]:
    """One group, from its part where there is one; else solved, put in place and written."""
    if bits == 16:
        return [LayerReport.kept(s.path, linear(whole, s.path)) for s in group.sites]
    if _grows(whole, group, config, bits):
        return [LayerReport.kept(s.path, linear(whole, s.path), GROWS) for s in group.sites]
    if part is not None and part.is_file():
        return parts.restore(whole, group, part)
    solution = _solve(whole, group, seen, config, bits, dtype)
    reports: list[LayerReport] = []
    tensors: dict[str, Tensor] = {}
    start = 0
    for site in group.sites:
        layer = branched(whole, site.path)
        rows = slice(start, start + layer.out_features)
        start = rows.stop
        _put(layer, solution, rows, bits)
        reports.append(LayerReport.of(site.path, layer, solution))
        tensors |= {f"{site.path}|{key}": tensor.contiguous() for key, tensor in layer.state_dict().items()}
    if part is not None:
        parts.write(part, tensors, reports, solution.rule)
    return reports


def _grows(whole: nn.Module, group: Group, config: SVDQuantConfig, bits: int) -> bool:
    """Whether quantized layers of the group would take no less than at 16 bits."""
    layers = [linear(whole, site.path) for site in group.sites]
    rank = search.branch_rank(_settings(group, config, bits).rank, group, layers)
    after = sum(auto.layer_bytes_at(layer, bits, rank) for layer in layers)
    return after >= sum(2 * layer.in_features * layer.out_features for layer in layers)


def _settings(group: Group, config: SVDQuantConfig, bits: int) -> SVDQuantConfig:
    """The settings for a group, by its precision and its bits."""
    if group.first.precision == "weight_only":
        return dataclasses.replace(config, smooth=False, activation_bits=16)
    if config.bits != "auto" and bits > config.bits:  # 8 bits have nothing left for a branch
        return dataclasses.replace(config, rank=0, activation_bits=max(config.activation_bits, 8))
    return config


def _solve(
    whole: nn.Module, group: Group, seen: Seen, config: SVDQuantConfig, bits: int, dtype: torch.dtype | None
) -> search.Solution:
    layers = [linear(whole, site.path) for site in group.sites]
    weight = torch.cat([layer.weight.float() for layer in layers])
    dtype = dtype or layers[0].weight.dtype
    dtype = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
    config = _settings(group, config, bits)
    config = dataclasses.replace(config, rank=search.branch_rank(config.rank, group, layers))
    parent, after = judge(whole, group, seen), group.first.after
    return search.solve(weight, seen.rows, parent, after=after, config=config, bits=bits, dtype=dtype)


def _put(layer: BranchedLinear, solution: search.Solution, rows: slice, bits: int) -> None:
    """The group's solution into one of its layers."""
    integers = search.n.Rounded(solution.integers.values[rows], solution.integers.scales[rows])
    bias: Tensor | None = None
    if solution.rule.shift:
        # The kernels lift x by the shift before they multiply; what that adds is taken off here.
        steps = 1.0 if solution.smooth is None else 1.0 / solution.smooth
        lifted = (integers.dense() * steps).sum(1) * solution.rule.shift
        bias = (0.0 if layer.bias is None else layer.bias.float()) - lifted
    layer.quantize_(
        integers.packed(bits),
        integers.scales,
        smooth=solution.smooth,
        down=solution.down,
        up=None if solution.up is None else solution.up[rows],
        bias=bias,
        activation=solution.rule,
    )
