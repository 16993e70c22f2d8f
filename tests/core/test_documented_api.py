"""Of the documented API: a path may be a text or a `Path`, and what writes a file says whether one is replaced."""

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
}  # fmt: skip
# Not in the API pages, but public and writing files.
WRITING = (
    "mm.erasure.grid", "mm.evaluation.report", "mm.pipelines.unified.UnifiedPipeline", "mm.world.judge.Judge",
    "mm.quantization.config.SVDQuantConfig",
)  # fmt: skip


def _all() -> dict[str, Any]:
    """The public functions by name."""
    names = (*NAMES, *WRITING, *(f"mm.{name}" for name in mm.__all__))
    return {called: call for name in names for called, call in _calls(_found(name), name)}


def test_a_path_may_be_a_text() -> None:
    taken = {
        f"{name}({parameter.name})": str(parameter.annotation)
        for name, call in _all().items()
        if name.removesuffix(".__init__") not in OWN
        for parameter in inspect.signature(call).parameters.values()
        if "Path" in str(parameter.annotation)
    }
    assert "mm.quantization.folders.quantize_folder(out)" in taken and len(taken) > 40
    assert {name for name, kind in taken.items() if not re.search(r"\bstr\b", kind)} == OPEN


def test_what_writes_a_file_says_whether_one_is_replaced() -> None:
    verbs = re.compile(r"(save|write|export|to_json_file)(_|$)")
    writers = {
        name: inspect.getdoc(call) or ""
        for name, call in _all().items()
        if verbs.match(name.rpartition(".")[2]) and re.search("Path|[Fs]tr", str(inspect.signature(call)))
    }
    assert "mm.adapters.patch.Patch.save" in writers and len(writers) > 15
    said = re.compile("replace|in the place of|after the last|must not be there|where it exists")
    silent = {name for name, text in writers.items() if not said.search(text)}
    assert not silent
