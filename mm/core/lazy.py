"""Public names loaded on first use (PEP 562), and root folders as sub-packages.

`loader` is not the `lazy_loader` package: that would be one more dependency for ten lines, imports its own machinery at
`import mm`, and gives `AttributeError` without the names that exist.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, MutableSequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def checkout() -> Path | None:
    """The root of the checkout that mm runs from; None for an installed wheel."""
    return _ROOT if (_ROOT / "pyproject.toml").is_file() else None


def adopt(path: MutableSequence[str], folder: str) -> None:
    """In a checkout, extends a package's `__path__` to the root folder that holds its code; a wheel has it inside.

    Without the check for a checkout, an installed wheel would adopt a folder of that name in site-packages, where
    `tokenizers` is Hugging Face's.
    """
    root = checkout()
    if root is not None and str(root / folder) not in path:
        path.append(str(root / folder))


def loader(package: str, names: Mapping[str, str]) -> Callable[[str], object]:
    """A module's `__getattr__` (PEP 562) for public names: name -> the module below `package` that defines it."""

    def __getattr__(name: str) -> object:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it offers {', '.join(names)}")
        return getattr(importlib.import_module(f"{package}.{names[name]}"), name)

    return __getattr__
