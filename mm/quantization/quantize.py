"""`mm.quantize`: SVDQuant on any module or pipeline, layer by layer, with a report.

Design choices
- A pipeline's drawing parts are quantized (text encoders only when named); a bare module is quantized itself. Which
  parts and layers, and how, `mm.families` says.
- Calibration: prompts for a pipeline (it draws with them), keyword arguments for a bare module, or a callable of one's
  own that runs the model. Nothing is trained, and the 16-bit weights of a layer go as soon as it is done.
- Groups are independent: inputs come from the 16-bit model, so the order does not matter, a run can resume from what
  it has written, and same seed means same bytes.

This module does not know files beyond its parts, nor pictures.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from mm.core.errors import UserError
from mm.core.files import write_bytes
from mm.core.safe_tensors import FLOATS, INTEGERS, read_tensors
from mm.families import find_sites, quantizable_parts, rules_of
from mm.layers.base_hash import base_hash
from mm.layers.linear import ActivationRule, BranchedLinear
from mm.layers.originals import refuse_patched
from mm.layers.sites import Site
from mm.layers.surgery import branched
from mm.layers.tracing import regroup, trace
from mm.quantization import auto, search
from mm.quantization import calibration as cal
from mm.quantization.calibration import Group, Seen
from mm.quantization.config import SVDQuantConfig
from mm.quantization.layout import record
from mm.quantization.report import LayerReport, Report

Calibration = Sequence[str] | Sequence[Mapping[str, Any]] | Callable[[Any], object]
SCORED = 1024  # rows by which candidates are told apart; rounding takes all of them


@torch.no_grad()
def quantize(
    target: Any,
    config: SVDQuantConfig | None = None,
    *,
    calibration: Calibration | None = None,
    components: Iterable[str] | None = None,
    progress: bool = True,
    resume: str | Path | None = None,
) -> Report:
    """Quantizes a module or the drawing parts of a pipeline in place, and reports what each layer lost.

    `calibration`: for a pipeline prompts, for a module keyword arguments of calls, or a callable that gets the target
    and runs it; not needed with `data_free`. `components`: which of a pipeline's parts. `resume`: a folder where
    finished groups are kept, from which a run that was stopped goes on. Raises UserError where there is nothing to
    quantize or to calibrate with.
    """
    config = config or SVDQuantConfig()
    started = time.monotonic()
    roots = quantizable_parts(target, components)
    for name, root in roots.items():
        refuse_patched(root, name)
    runs = [] if config.data_free else _runs(target, calibration, config)
    whole = nn.Module()  # several parts as one, so that one run of the prompts serves all of them
    for name, root in roots.items():
        whole.add_module(name, root)
    groups = cal.groups_of(_traced(whole, roots, config, runs))
    bases = {name: base_hash(root) for name, root in roots.items()}
    report = Report(settings=config.to_dict())
    report.layers = _quantize(whole, groups, runs, config, progress, None if resume is None else Path(resume))
    for name, root in roots.items():
        record(root, config, bases[name])
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
    if isinstance(target, nn.Module):
        if not all(isinstance(item, Mapping) for item in items):
            raise UserError(
                f"a module is calibrated with keyword arguments of its calls, not {type(items[0]).__name__}"
            )
        return [partial(target, **item) for item in items]
    return [partial(_draw, target, item, config, k) for k, item in enumerate(items)]


def _draw(pipe: Any, prompt: str, config: SVDQuantConfig, number: int) -> object:
    """One picture's latents; a pipeline with several modes takes them in turn."""
    names = inspect.signature(type(pipe).__call__).parameters
    generator = torch.Generator().manual_seed(config.seed + number)
    options: dict[str, Any] = {"num_inference_steps": config.steps, "generator": generator, "output_type": "latent"}
    modes = getattr(pipe, "modes", ())
    if "mode" in names and modes:
        options["mode"] = modes[number % len(modes)]
    bar = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        return pipe(prompt, **options)
    finally:
        pipe.set_progress_bar_config(**bar)


def _sites(name: str, root: nn.Module, config: SVDQuantConfig) -> list[Site]:
    """The sites to quantize, with paths from above the root."""
    kept = [re.compile(pattern) for pattern in config.keep]
    chosen = [
        site
        for site in find_sites(root)
        if site.precision != "keep" and _is_16_bit(root, site.path) and not any(p.search(site.path) for p in kept)
    ]
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
    seen = trace(whole, runs[:2])  # pipelines with two modes take them in turns
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
) -> list[LayerReport]:
    counts, sizes = cal.call_sizes(whole, groups, runs[:4]) if runs else ({}, {})
    bits: dict[str, int] = {}
    if config.bits == "auto":
        bits = auto.choose(whole, groups, runs, counts, sizes, config)
    out: list[LayerReport] = []
    with tqdm(total=len(groups), desc="quantizing", disable=not progress) as bar:
        for batch in cal.passes(whole, groups, config, sizes):
            todo = [group for group in batch if not _is_done(folder, group)]
            seen = cal.watch(whole, todo, runs, counts, config) if runs and todo else {}
            for group in batch:
                width = bits[group.name] if config.bits == "auto" else max(int(config.bits), group.first.bits or 0)
                out += _finish(whole, group, seen.pop(group.name, Seen()), config, width, _part(folder, group))
                bar.update()
    return out


def _is_16_bit(root: nn.Module, path: str) -> bool:
    layer = root.get_submodule(path)
    return not isinstance(layer, BranchedLinear) or layer.bits == 16


def _part(folder: Path | None, group: Group) -> Path | None:
    return None if folder is None else folder / f"{group.name}.safetensors"


def _is_done(folder: Path | None, group: Group) -> bool:
    part = _part(folder, group)
    return part is not None and part.is_file()


def _linear(whole: nn.Module, path: str) -> nn.Linear:
    layer = whole.get_submodule(path)
    assert isinstance(layer, nn.Linear), path
    return layer


def _finish(
    whole: nn.Module, group: Group, seen: Seen, config: SVDQuantConfig, bits: int, part: Path | None
) -> list[LayerReport]:
    """One group, from its part where there is one; else solved, put in place and written."""
    if bits == 16:
        return [LayerReport.kept(s.path, _linear(whole, s.path)) for s in group.sites]
    if part is not None and part.is_file():
        return _restore(whole, group, part)
    solution = _solve(whole, group, seen, config, bits)
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
        part.parent.mkdir(parents=True, exist_ok=True)
        meta = {"reports": Report.dump_layers(reports), "rule": search.rule_to_json(solution.rule)}
        write_bytes(part, save(tensors, metadata=meta))
    return reports


def _solve(whole: nn.Module, group: Group, seen: Seen, config: SVDQuantConfig, bits: int) -> search.Solution:
    layers = [_linear(whole, site.path) for site in group.sites]
    weight = torch.cat([layer.weight.float() for layer in layers])
    dtype = layers[0].weight.dtype
    dtype = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
    if group.first.precision == "weight_only":
        config = dataclasses.replace(config, smooth=False, activation_bits=16)
    elif config.bits != "auto" and bits > config.bits:  # 8 bits have nothing left for a branch
        config = dataclasses.replace(config, rank=0, activation_bits=max(config.activation_bits, 8))
    config = dataclasses.replace(config, rank=search.branch_rank(config.rank, group, layers))
    score, after = _scorer(whole, group, seen), group.first.after
    return search.solve(weight, seen.rows, score, after=after, config=config, bits=bits, dtype=dtype)


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


def _restore(whole: nn.Module, group: Group, part: Path) -> list[LayerReport]:
    read = read_tensors(part, "part of an earlier run", types=(*FLOATS, *INTEGERS))
    tensors, meta = read.tensors, read.metadata
    try:
        rule: ActivationRule = search.rule_from_json(meta["rule"])
        reports = Report.load_layers(meta["reports"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{part} is damaged ({error!r:.200}); remove it, and its layers are quantized again") from error
    for site in group.sites:
        layer = branched(whole, site.path)
        own = {key.split("|")[1]: tensor for key, tensor in tensors.items() if key.startswith(f"{site.path}|")}
        layer.quantize_(
            own["qweight"], own["weight_scales"], smooth=own.get("smooth"), down=own.get("down"), up=own.get("up"),
            bias=own.get("bias"), activation=rule,
        )  # fmt: skip
    return reports


def _scorer(whole: nn.Module, group: Group, seen: Seen) -> search.Score | None:
    """Squared error at the parent's output, or at the layers' own where there is no parent."""
    if seen.rows is None:
        return None
    layers = [_linear(whole, site.path) for site in group.sites]
    sizes = [layer.out_features for layer in layers]
    rows = seen.rows[:: max(1, len(seen.rows) // SCORED)]
    if not group.first.parent or not seen.calls:
        weight = torch.cat([layer.weight.float() for layer in layers])
        wanted = rows @ weight.T

        def own(dense: Tensor, up: Tensor, down: Tensor, rounder: search.Rounder, share: float) -> float:
            some = _some(len(rows), share)
            x = rows[some]
            got = torch.addmm(rounder(x) @ dense.T, x @ down.T, up.T)
            return float(got.sub_(wanted[some]).square().sum())

        return own
    parent = whole.get_submodule(group.first.parent)

    def at_parent(dense: Tensor, up: Tensor, down: Tensor, rounder: search.Rounder, share: float) -> float:
        parts = zip(layers, dense.split(sizes), up.split(sizes), strict=True)
        error = 0.0
        try:
            for layer, d, u in parts:
                layer.__dict__["forward"] = _stand_in(layer, d, u, down, rounder)  # in front of the class's own
            for k in _some(len(seen.calls), share):
                args, kwargs, output = seen.calls[k]
                for got, want in zip(cal.tensors_of(parent(*args, **kwargs)), cal.tensors_of(output), strict=True):
                    error += float((got.float() - want.float()).square().sum())
        finally:
            for layer in layers:
                layer.__dict__.pop("forward", None)
        return error

    return at_parent


def _some(of: int, share: float) -> list[int]:
    """A share of so many, at least two of them, evenly spread: rows and calls come in the order of timesteps."""
    count = min(of, max(2, round(share * of)))
    return [int((i + 0.5) * of / count) for i in range(count)]


def _stand_in(
    layer: nn.Linear, dense: Tensor, up: Tensor, down: Tensor, rounder: search.Rounder
) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        wide = x.float()
        y = rounder(wide) @ dense.T + (wide @ down.T) @ up.T
        return (y if layer.bias is None else y + layer.bias.float()).to(x.dtype)

    return forward
