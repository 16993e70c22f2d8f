"""Whether a model folder is whole: every file readable, every tensor of every component in a safetensors file.

Design choices
- diffusers only logs a tensor that a file lacks, and leaves the new random one in place: a model that loads, and draws
  something else. Here it raises, with the component and the first names.
- Several pipelines live in one folder (drawing, reading, editing); each takes the components that it needs.
- Only headers are read (names, no tensors), so that checking costs milliseconds.

This module does not know which components a pipeline has. It looks at local folders: what comes from the hub has been
checked against its hash on the way.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mm.core.errors import UserError


class SharedFolderMixin:
    """For pipelines that share one folder: what belongs to the others is passed over in silence."""

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """The folder's index without the parts that this pipeline does not take."""
        config = super().load_config(*args, **kwargs)  # type: ignore[misc]
        takes = set(inspect.signature(cls.__init__).parameters)

        def own(index: dict[str, Any]) -> dict[str, Any]:
            return {k: x for k, x in index.items() if k.startswith("_") or k in takes or not isinstance(x, list)}

        return (own(config[0]), *config[1:]) if isinstance(config, tuple) else own(config)


def first_broken(folder: Path) -> str | None:
    """The first file of a model folder that cannot be read, and why; None when all can."""
    for path in sorted([*folder.rglob("*.json"), *folder.rglob("*.safetensors")]):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            else:
                _names(path)
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            return f"{path} ({error})"
    return None


def check_complete(components: Mapping[str, Any], folder: Path, given: Collection[str] = ()) -> None:
    """Raises UserError unless the files of each component hold just its tensors.

    `given`: components that the caller brought along, which do not come from the folder.
    """
    for name, module in components.items():
        # A quantized component keeps its tensors under names of its own.
        foreign = name in given or getattr(module, "hf_quantizer", None) is not None
        if foreign or not isinstance(module, torch.nn.Module):
            continue
        stored = {key for path in (folder / name).glob("*.safetensors") for key in _names(path)}
        wanted = set(module.state_dict())
        wrong = [*sorted(wanted - stored), *sorted(stored - wanted)]
        if wrong:
            found = f"{len(wanted & stored)} of {len(wanted)} tensors"
            raise UserError(
                f"{folder / name} holds {found} of this model; missing or unknown: {', '.join(wrong[:3])}; "
                "copy or save the model again"
            )


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())
