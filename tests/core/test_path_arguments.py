"""Every function of the documented API that takes a path takes a text and a `Path`."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mm

PAGES = Path(__file__).parents[2] / "docs/api"
NAMES = sorted(re.findall(r"^::: (mm\.[\w.]+)", "\n".join(p.read_text() for p in PAGES.glob("*.md")), re.MULTILINE))


def _found(name: str) -> Any:
    """The module, class or function of a name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        above, _, last = name.rpartition(".")
        return getattr(_found(above), last)


def _calls(found: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The public functions of a module or class; a dataclass' fields are what its `__init__` takes."""
    if inspect.isfunction(found):
        yield name, found
    elif inspect.ismodule(found) or inspect.isclass(found):
        own = found.__name__ if inspect.ismodule(found) else found.__module__
        for key, value in vars(found).items():
            one = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            public = not key.startswith("_") or key == "__init__"
            if public and getattr(one, "__module__", None) == own and not isinstance(one, type(found)):
                yield from _calls(one, f"{name}.{key}")


# What mm's own modules pass on to each other: files that were found in a folder.
OWN = {"mm.core.safe_tensors.Header", "mm.core.safe_tensors.TensorFile", "mm.customization.data.Example"}
# These still take a `Path` alone; whoever mends one takes it out.
OPEN = {
    "mm.engine.output.check_file(path)", "mm.engine.output.is_picture_file(path)", "mm.engine.output.save_file(path)",
    "mm.engine.output.save_numbered(folder)", "mm.engine.variants.wildcard_files(folder)",
    "mm.provenance.training.train_fingerprint(work)",
}  # fmt: skip


def test_a_path_may_be_a_text() -> None:
    calls = {pair for name in (*NAMES, *(f"mm.{n}" for n in mm.__all__)) for pair in _calls(_found(name), name)}
    taken = {
        f"{name}({parameter.name})": str(parameter.annotation)
        for name, call in calls
        if name.removesuffix(".__init__") not in OWN
        for parameter in inspect.signature(call).parameters.values()
        if "Path" in str(parameter.annotation)
    }
    assert "mm.quantization.folders.quantize_folder(out)" in taken and len(taken) > 40
    assert {name for name, kind in taken.items() if not re.search(r"\bstr\b", kind)} == OPEN
