"""Adapter files of any layout as patches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm.adapters.formats import read_lora
from mm.adapters.patch import Patch
from mm.adapters.patch_file import META
from mm.core.errors import UserError
from mm.core.files import open_regular
from mm.core.safe_tensors import read_header
from mm.customization.learned import Learned
from mm.families import family_of


def check_files(files: Sequence[Path]) -> None:
    """Raises UserError for a file that is missing or given twice, before a model is loaded."""
    for k, file in enumerate(files):
        open_regular(file, "adapter").close()
        if any(file.samefile(other) for other in files[:k]):
            raise UserError(f"{file} is given twice; give it once, with a weight (--weight) where it is to act more")


def read_adapter(path: str | Path, target: Any = None) -> Patch:
    """A patch of mm, or a LoRA file of another program, which needs the model.

    Args:
        path: the file.
        target: the model or pipeline, for files of other programs.

    Raises:
        UserError: for a file that is neither, and for a LoRA file without a model.
    """
    file = Path(path)
    header = read_header(file, "adapter")
    if META in header.metadata:
        return Patch.load(file)
    if target is None:
        raise UserError(f"{file} is a LoRA of another program; give the model that it is for (--model)")
    found = read_lora(file, target, name=file.stem)
    family = family_of(target)
    return Learned(
        entries=found.entries, method=found.method, base=header.metadata.get("mm_base", ""), settings=found.settings,
        report=found.report, name=found.name, family=family.name if family is not None else "",
    )  # fmt: skip
