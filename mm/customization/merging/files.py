"""Adapter files of any layout as patches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mm.adapters.entry import Entry
from mm.adapters.formats import read_lora
from mm.adapters.formats.settings import Strengths
from mm.adapters.patch import Patch
from mm.adapters.patch_file import META
from mm.core.errors import UserError
from mm.core.files import open_regular
from mm.core.safe_json import parse_object
from mm.core.safe_tensors import Header, read_header, read_tensors
from mm.customization.file_metadata import family_of_architecture
from mm.customization.learned import Learned
from mm.families import family_of

_OWN = re.compile(r"(?P<path>(?:unet|transformer)\.[^|]+)\.lora_(?P<half>[AB])\.weight")


def check_files(files: Sequence[Path]) -> None:
    """Raises UserError for a file that is missing or given twice, before a model is loaded."""
    for k, file in enumerate(files):
        open_regular(file, "adapter").close()
        if any(file.samefile(other) for other in files[:k]):
            raise UserError(f"{file} is given twice; give it once, with a weight (--weight) where it is to act more")


def read_adapter(path: str | Path, target: Any = None) -> Patch:
    """A patch of mm, or a LoRA file. One of another program, or in another layout than diffusers', needs the model.

    Args:
        path: the file.
        target: the model or pipeline, for files of other programs.

    Raises:
        UserError: for a file that is neither, and without a model for a LoRA file, unless it is mm's own products in
            diffusers' layout.
    """
    file = Path(path)
    header = read_header(file, "adapter")
    if META in header.metadata:
        return Patch.load(file)
    if target is None and (own := _of_mm(file, header)) is not None:
        return own
    if target is None:
        mine = "in a layout or of a kind" if header.metadata.get("mm_base") else "of another program,"
        raise UserError(f"{file} is a LoRA {mine} that only its model explains; give the model (--model)")
    found = read_lora(file, target)
    family = family_of(target)
    return Learned(
        entries=found.entries, method=found.method, base=header.metadata.get("mm_base", ""), settings=found.settings,
        report=found.report, name=found.name, family=family.name if family is not None else "",
    )  # fmt: skip


def _of_mm(file: Path, header: Header) -> Learned | None:
    """What mm itself wrote in diffusers' layout, whose names are those of the model; None for other files."""
    named = {key: _OWN.fullmatch(key) for key in header.tensors}
    if not header.metadata.get("mm_base") or not all(named.values()):
        return None
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(file, "adapter").tensors.items():
        match = named[key]
        assert match is not None
        halves.setdefault(match["path"], {})["down" if match["half"] == "A" else "up"] = tensor
    fits = [
        one.keys() == {"down", "up"} and one["down"].ndim == one["up"].ndim == 2
        and len(one["down"]) == one["up"].shape[1]
        for one in halves.values()
    ]  # fmt: skip
    if not all(fits):
        return None
    strengths = Strengths(settings=parse_object(header.metadata.get("lora_adapter_metadata", "{}"), str(file)))
    entries = {
        path: Entry(kind="lowrank", tensors=one, scale=strengths.of(path, len(one["down"]), None))
        for path, one in halves.items()
    }
    return Learned(
        entries=entries, base=header.metadata["mm_base"], name=file.stem,
        family=family_of_architecture(header.metadata.get("modelspec.architecture", "")),
        settings={"name": header.metadata.get("modelspec.trigger_phrase", "")},
    )  # fmt: skip
