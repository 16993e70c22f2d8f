"""Reads what others have quantized: published Nunchaku files and diffusers' nunchaku_lite folders, on any machine.

Design choices
- Everything is checked by names, shapes, types and values before the model is touched: each tensor of the file has its
  place, each tensor of the model its source, or the first misfits are named.
- Tensors are read when they are needed, and all layers are built before the first is put into the model. On the meta
  device FLUX never stands in memory at 16 bits (`load_nunchaku`).
- Inputs are rounded as the publisher had it, 4 bits a group of 64, unless 8 or 16 bits are asked for, which err less
  and cost the same on CPUs and Hopper. Where two layers of a file make one of diffusers' (Flux's `proj_out`), one
  rule cannot serve both, and the inputs take 8 bits a group.
- The order of numbers in a file is in `nunchaku_layout`, what they mean in `nunchaku_layer`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mm.adapters.patch import Applied
from mm.core.build_limit import build_empty
from mm.core.checks import check_kind, check_path
from mm.core.errors import UserError, shown
from mm.core.model_files import check_sizes, weight_files
from mm.core.nouns import with_article
from mm.core.safe_json import parse_object, read_object
from mm.core.safe_tensors import FLOATS, check_finite, read_header
from mm.layers.linear import ActivationRule, BranchedLinear
from mm.layers.surgery import swap
from mm.quantization.config import SVDQuantConfig
from mm.quantization.integrations import nunchaku_layer as layer
from mm.quantization.integrations import nunchaku_names as names
from mm.quantization.layout import record

InputBits = Literal[4, 8, 16]
LITE = "nunchaku_lite"
MAX_SETTING = 1_000_000  # no width, length or vocabulary of a model that makes pictures is larger


@dataclass(kw_only=True)
class _Source:
    """Tensors of one or several files, read when asked for."""

    where: Path
    config: dict[str, Any]
    lite: bool
    files: dict[str, Any] = field(default_factory=dict)  # by tensor
    headers: dict[str, layer.Header] = field(default_factory=dict)

    def add(self, path: Path) -> dict[str, str]:
        """Takes a file's tensors in; gives its metadata."""
        header = read_header(path, "Nunchaku file")
        file = safe_open(path, "pt")
        for key, tensor in header.tensors.items():
            if key in self.files:
                raise UserError(f"{path} holds {shown(key)}, which another file of {self.where} holds as well")
            self.files[key] = file
            self.headers[key] = (tensor.shape, tensor.dtype)
        return header.metadata

    def check_values(self) -> None:
        """Raises UserError where a tensor holds NaN or infinity. Tensors are read one at a time."""
        for key, (shape, kind) in self.headers.items():
            if kind in FLOATS and 0 not in shape:
                check_finite(self.get(key), key, self.where)

    def get(self, key: str) -> Tensor:
        return self.files[key].get_tensor(key)


def _open(source: str | Path) -> _Source:
    """A file, a folder of the two files that came first, or a nunchaku_lite folder."""
    check_path("the Nunchaku file", source)
    where = Path(source)
    if not where.exists():
        raise UserError(f"{where} does not exist; give a file or folder, downloaded before")
    made = _Source(where=where, config={}, lite=False)
    if not where.is_dir():
        made.config = parse_object(made.add(where).get("config", "{}"), f"{where}: config")
        return made
    config = where / "config.json"
    made.config = read_object(config) if config.exists() else {}
    quantization = made.config.get("quantization_config")
    made.lite = isinstance(quantization, dict) and quantization.get("quant_method") == LITE
    for path in _files(where, made.lite):
        made.add(path)
    return made


def _files(where: Path, lite: bool) -> list[Path]:
    """The weight files of a folder: the two that came first, or what diffusers loads of a nunchaku_lite folder."""
    parts = [where / "unquantized_layers.safetensors", where / "transformer_blocks.safetensors"]
    if not lite:
        if all(path.exists() for path in parts):
            return parts
        raise UserError(
            f"{where} is neither a nunchaku_lite folder (config.json with quant_method {LITE!r}, safetensors) nor one "
            f"with {parts[0].name} and {parts[1].name}"
        )
    return weight_files(where)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One quantized layer of the file and where it goes."""

    rule: names.Rule
    keys: dict[str, str]
    outputs: int
    inputs: int


@dataclass(kw_only=True)
class _Plan:
    """layers: targets that share parts -> the parts side by side. plain: name in the model -> key and first row."""

    layers: dict[tuple[str, ...], list[_Part]]
    plain: dict[str, tuple[str, int]]


def read_nunchaku(source: str | Path, model: nn.Module, *, activation_bits: InputBits = 4) -> Applied:
    """Fills a model of diffusers with a published Nunchaku file's or nunchaku_lite folder's layers.

    The model may be on the meta device. Raises UserError, and changes nothing, unless all tensors of both find a match.
    """
    check_kind("model", model, nn.Module, "the model of diffusers that the file is for")
    opened = _open(source)
    plan = _plan(opened, model, _rules(opened, model))
    return _fill(opened, model, plan, activation_bits)


def load_nunchaku(
    source: str | Path, *, dtype: torch.dtype = torch.bfloat16, activation_bits: InputBits = 4
) -> nn.Module:
    """The model that a published Nunchaku file or nunchaku_lite folder holds, built from the settings in it."""
    import diffusers

    opened = _open(source)
    name = opened.config.get("_class_name", "")
    name = name if isinstance(name, str) else ""
    plain = name.removeprefix("Nunchaku").removeprefix("SDXL").removesuffix("V2").replace("2dModel", "2DModel")
    kind: Any = getattr(diffusers, plain, None) if plain.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise UserError(
            f"{opened.where} does not say which model of diffusers it holds ({shown(name)} as _class_name); build the "
            "model and call mm.read_nunchaku(file, model)"
        )
    settings = {k: x for k, x in opened.config.items() if k != "quantization_config"}
    check_sizes(settings, MAX_SETTING, f"{opened.where}: config")
    count, values = len(opened.headers), sum(math.prod(shape) for shape, _ in opened.headers.values())
    # Packed: two integers a byte, eight a word; and one layer of a file may be three of the model.
    made: Any = kind
    model = build_empty(lambda: made.from_config(settings), 3 * count, 8 * values, f"{opened.where}: config")
    nn.Module.to(model, dtype).eval()  # diffusers' own `to` warns of modules that it would keep in fp32
    _fill(opened, model, _plan(opened, model, _rules(opened, model)), activation_bits)
    return model


def _rules(opened: _Source, model: nn.Module) -> tuple[names.Rule, ...]:
    rules = names.LITE if opened.lite else names.rules_for(model)
    if rules is None:
        raise UserError(
            f"Nunchaku files of {type(model).__name__} are not known here; known: {', '.join(names.FAMILIES)}. "
            "Folders of nunchaku_lite are read for any model"
        )
    return rules


# ---- what goes where -------------------------------------------------------------------------------------------------


def _plan(opened: _Source, model: nn.Module, rules: tuple[names.Rule, ...]) -> _Plan:
    """Every tensor's place. Raises UserError with the first that have none."""
    found, rest = names.quantized_fields(list(opened.headers))
    bad: list[str] = []
    plan = _Plan(layers={}, plain={})
    for path, keys in found.items():
        match = names.find(rules, path)
        why = "no such layer in this model" if match is None else _place(opened, model, keys, *match, plan)
        if why:
            bad.append(f"{path} {why}" if match else f"{path} ({why})")
    own = model.state_dict()
    covered = {f"{target}.{name}" for targets in plan.layers for target in targets for name in ("weight", "bias")}
    for key in rest:
        targets = names.plain_names(rules, key, own)
        shape, kind = opened.headers[key]
        if any(name not in own or name in covered for name in targets):
            bad.append(f"{key} (no such tensor in this model)")
            continue
        rows = [own[name].shape[0] if own[name].ndim else 0 for name in targets]
        want = (sum(rows), *own[targets[0]].shape[1:]) if own[targets[0]].ndim else ()
        if shape != want:
            bad.append(f"{key} has shape {list(shape)}, not {list(want)}")
        if (kind in FLOATS) != own[targets[0]].is_floating_point():
            bad.append(f"{key} is of type {kind}")
        bad += [f"{key} and {plan.plain[name][0]} are both {name}" for name in targets if name in plan.plain]
        plan.plain |= {name: (key, sum(rows[:i])) for i, name in enumerate(targets)}
    bad += [f"{name} is not in the file" for name in own if name not in covered and name not in plan.plain]
    counts = Counter(target for targets in plan.layers for target in targets)
    bad += [f"{target} is there under two names" for target, count in counts.items() if count > 1]
    bad += [
        f"{t[0]} is there in part only, or twice" for t, parts in plan.layers.items() if not _whole(model, t, parts)
    ]
    if bad or not found:
        named = "; ".join(bad[:3]) or "it holds no quantized layer"
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(f"{opened.where} does not fit {type(model).__name__}: {named}{more}")
    return plan


def _place(
    opened: _Source, model: nn.Module, keys: dict[str, str], rule: names.Rule, targets: tuple[str, ...], plan: _Plan
) -> str:
    """Enters a layer of the file into the plan; says why not where it does not fit."""
    linears: list[Any] = []
    for target in targets:
        try:
            linears.append(model.get_submodule(target))
        except AttributeError:
            return f"belongs to {target}, which this model does not have"
    if not all(isinstance(linear, nn.Linear) for linear in linears):
        return f"belongs to {targets[0]}, which is {with_article(type(linears[0]).__name__)} here"
    outputs = sum(linear.out_features for linear in linears)
    inputs = linears[0].in_features
    if rule.columns != "all":
        inputs = outputs if rule.columns == "first" else inputs - outputs
    if "bias" not in keys and any(linear.bias is not None for linear in linears):
        return f"lacks the bias that {targets[0]} has"
    why = layer.misfit({name: opened.headers[key] for name, key in keys.items()}, outputs, inputs)
    if not why:
        parts = plan.layers.setdefault(targets, [])
        part = _Part(rule=rule, keys=keys, outputs=outputs, inputs=inputs)
        parts.insert(0 if rule.columns == "first" else len(parts), part)
    return why


def _whole(model: nn.Module, targets: tuple[str, ...], parts: Iterable[_Part]) -> bool:
    return sum(part.inputs for part in parts) == model.get_submodule(targets[0]).in_features


# ---- into the model --------------------------------------------------------------------------------------------------


@torch.no_grad()
def _fill(opened: _Source, model: nn.Module, plan: _Plan, activation_bits: InputBits) -> Applied:
    if activation_bits not in (4, 8, 16):
        raise UserError(f"activation_bits {activation_bits}: inputs take 4, 8 or 16")
    opened.check_values()
    rank, layers = 0, dict[str, BranchedLinear]()
    for targets, parts in plan.layers.items():
        pieces = [_read(opened, part) for part in parts]
        rank = max([rank] + [p.down_RK.shape[0] for p in pieces if p.down_RK is not None and p.smooth_K is not None])
        layers |= _built(model, targets, parts, layer.joined(pieces), activation_bits)
    for path, made in layers.items():
        for name, tensor in made.state_dict().items():
            check_finite(tensor, f"{path}.{name}", opened.where)
    own = model.state_dict()
    plain = {name: _plain(opened, own[name], key, row) for name, (key, row) in plan.plain.items()}
    # From here on nothing can fail: until now the model is as it was.
    for path, made in layers.items():
        swap(model, path, made)
    model.load_state_dict(plain, strict=False, assign=True)
    record(model, SVDQuantConfig(rank=rank, activation_bits=activation_bits), base="")
    return Applied(tensors=len(opened.headers), layers=sum(len(targets) for targets in plan.layers))


def _built(
    model: nn.Module, targets: tuple[str, ...], parts: list[_Part], whole: layer.Piece, activation_bits: InputBits
) -> dict[str, BranchedLinear]:
    """The layers of the model that a layer of the file stands for, by path."""
    rule = _rule(parts, whole, activation_bits)
    if not rule.shift:
        whole = whole.unshifted()
    made, start = {}, 0
    for target in targets:
        old: Any = model.get_submodule(target)
        piece = whole.rows(slice(start, start + old.out_features))
        device = torch.device("cpu") if old.weight.is_meta else old.weight.device
        made[target] = layer.build(piece, rule, old.weight.dtype, device).train(old.training)
        start += old.out_features
    return made


def _plain(opened: _Source, like: Tensor, key: str, row: int) -> Tensor:
    """A tensor of the model that is as it is in the file, some rows of one that holds several."""
    device = torch.device("cpu") if like.is_meta else like.device
    tensor = opened.get(key)
    tensor = tensor[row : row + len(like)] if tensor.ndim else tensor
    return tensor.to(device, like.dtype, copy=True)  # a tensor of the file lies in the file, which may go


def _read(opened: _Source, part: _Part) -> layer.Piece:
    def get(name: str) -> Tensor:
        return opened.get(part.keys[name])

    fields = set(part.keys)
    if "wzeros" in fields:
        return layer.read_awq(get, fields, part.outputs, part.inputs, splits=part.rule.splits)
    return layer.read_w4a4(get, fields, part.outputs, part.inputs, after_gelu=part.rule.after_gelu)


def _rule(parts: list[_Part], piece: layer.Piece, activation_bits: InputBits) -> ActivationRule:
    """How the inputs of a layer are rounded."""
    if "wzeros" in parts[0].keys or piece.bits == 8:
        return ActivationRule(bits=16)
    if len(parts) > 1 and activation_bits != 16:
        return ActivationRule(bits=8, group=layer.GROUP)
    if activation_bits == 4:
        return ActivationRule(bits=4, group=layer.GROUP, unsigned=bool(piece.shift), shift=piece.shift)
    return ActivationRule(bits=activation_bits)
