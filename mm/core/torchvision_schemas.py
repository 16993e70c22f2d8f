"""Makes torchvision importable beside a torch that it was not linked to.

PyPI's torchvision is linked to CUDA. Beside a CPU build of torch its `_C` library cannot be loaded, and then
`import torchvision` raises "operator torchvision::nms does not exist": it registers fake kernels for two operators that
nobody defined, and peft, timm, open_clip and half of transformers fall with it. Here the missing schemas are defined
just before torchvision's own code runs. The operators stay without kernels: calling one still raises.

Design choices:
- A lazy import hook: whoever never imports torchvision pays microseconds, and no torch.
- `import mm` installs it, so mm is imported before open_clip, timm or peft where torchvision is broken. An entry point
  that torch calls would make the order free, and would run at every `import torch` of the environment.
- A torchvision whose library loads is left alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

_ARGUMENTS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_kept: list[object] = []  # torch forgets the schemas when the library object that defined them dies


def install() -> None:
    """Puts the hook in place, once; does nothing where torchvision is imported already."""
    if "torchvision" not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds torchvision as Python would, and has the schemas defined before the module runs."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None or spec.origin is None:
            return spec
        folder, run = Path(spec.origin).parent, spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            _define_missing(folder)
            run(module)

        # Not a loader class of our own: inspect and pkgutil want the real one. Not at once: is torchvision there?
        # is a question that transformers asks often, and it must not cost an import of torch.
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _define_missing(folder: Path) -> None:
    import torch

    if _kept or any(_loads(library) for library in folder.glob("_C*")):
        return
    fragment = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        fragment.define(operator + _ARGUMENTS)
    _kept.append(fragment)


def _loads(library: Path) -> bool:
    import torch

    try:
        torch.ops.load_library(str(library))
    except OSError:
        return False
    return True
