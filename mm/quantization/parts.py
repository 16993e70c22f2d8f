"""Finished groups of layers in a folder, from which a quantization that was stopped goes on.

Design choices
- One safetensors file a group, written whole or not at all, named by the group.
- The folder says what it belongs to: the hashes of the 16-bit models, the settings and the calibration. With any other
  it is refused, since groups of two models would be mixed without a trace.

Format of `base.json`: {"bases": {part: hash}, "settings": {...}, "calibration": hash of the calibration or ""}.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mm.core.errors import UserError
from mm.core.files import write_bytes
from mm.core.run_files import read_result, read_state, write_state
from mm.layers.linear import ActivationRule
from mm.layers.surgery import branched
from mm.quantization import search
from mm.quantization.calibration import Group
from mm.quantization.config import SVDQuantConfig
from mm.quantization.report import LayerReport, Report

MARK = "base.json"


def part_of(folder: Path | None, group: Group) -> Path | None:
    """The file of a group."""
    return None if folder is None else folder / f"{group.name}.safetensors"


def is_done(folder: Path | None, group: Group) -> bool:
    """Whether the group's file is there."""
    part = part_of(folder, group)
    return part is not None and part.is_file()


def claim(folder: Path, bases: Mapping[str, str], config: SVDQuantConfig, calibration: Any) -> None:
    """Marks a folder as that of a model, its settings and its calibration.

    Raises:
        UserError: where it holds groups of another model, other settings or another calibration.
    """
    settings = {k: x for k, x in config.to_dict().items() if k not in ("layers", "base", "memory")}
    mark = {"bases": dict(bases), "settings": settings, "calibration": _digest(calibration)}
    file = folder / MARK
    if file.is_file():
        advice = f"remove {folder}, or choose another folder to resume from"
        _compare(folder, read_result(file, "mark of an earlier run", advice), mark)
    elif any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds safetensors files without {MARK}, so it is no folder of a stopped run")
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(file, json.dumps(mark, sort_keys=True).encode())


def _compare(folder: Path, kept: Mapping[str, Any], mark: dict[str, Any]) -> None:
    what = {"bases": "another model", "settings": "other settings", "calibration": "another calibration"}
    if found := [text for key, text in what.items() if kept.get(key) != mark[key]]:
        raise UserError(
            f"{folder} holds layers that were quantized from {' and with '.join(found)}; remove it, or choose another "
            "folder to resume from"
        )


def _digest(calibration: Any) -> str:
    """A hash of prompts; of other kinds of calibration nothing is known that lasts."""
    if isinstance(calibration, Sequence) and all(isinstance(item, str) for item in calibration):
        return hashlib.sha256("\n".join(calibration).encode()).hexdigest()
    return ""


def write(part: Path, tensors: Mapping[str, Tensor], reports: list[LayerReport], rule: ActivationRule) -> None:
    """Writes a group's layers."""
    write_state(part, tensors, {"reports": Report.dump_layers(reports), "rule": search.rule_to_json(rule)})


def restore(whole: nn.Module, group: Group, part: Path) -> list[LayerReport]:
    """Puts a group's layers in place from its file."""
    read = read_state(part, "part of an earlier run", f"delete {part}, and its layers are quantized again")
    with read.taking():
        rule: ActivationRule = search.rule_from_json(read.metadata["rule"])
        reports = Report.load_layers(read.metadata["reports"])
        if {report.path for report in reports} != {site.path for site in group.sites}:
            raise UserError(f"{part} lacks the report of a layer")
        found = {site.path: _of_layer(site.path, read.tensors, part) for site in group.sites}
        for path, own in found.items():
            branched(whole, path).quantize_(
                own["qweight"], own["weight_scales"], smooth=own.get("smooth"), down=own.get("down"),
                up=own.get("up"), bias=own.get("bias"), activation=rule,
            )  # fmt: skip
    return reports


def _of_layer(path: str, tensors: Mapping[str, Tensor], part: Path) -> dict[str, Tensor]:
    """The tensors of a layer. Raises UserError where its weights are missing."""
    own = {key.split("|")[1]: tensor for key, tensor in tensors.items() if key.startswith(f"{path}|")}
    if lost := [name for name in ("qweight", "weight_scales") if name not in own]:
        raise UserError(f"{part} lacks the tensor '{path}|{lost[0]}'")
    return own
