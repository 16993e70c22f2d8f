"""Runs import-linter on mm: `python .ci/lint_imports.py`. The contracts are in pyproject.toml.

In a checkout mm.tokenizers, mm.pipelines, mm.kernels and mm.ui lie in root folders, which import-linter would not find.
So it gets a folder in which they are where a wheel has them.
"""

from __future__ import annotations

import importlib.machinery
import os
import shutil
import sys
import tempfile
from pathlib import Path

from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).resolve().parents[1]
ROOT_FOLDERS = ("tokenizers", "pipelines", "kernels", "ui")
NO_CODE = shutil.ignore_patterns("__pycache__", "*.so", "*.cpp", "*.h")


def link_package(target: Path) -> None:
    """Fills `target` with links to, and copies of, the package's files as a wheel lays them out."""
    target.mkdir()
    for entry in (ROOT / "mm").iterdir():
        if entry.name not in ROOT_FOLDERS:
            (target / entry.name).symlink_to(entry)
            continue
        for folder in (ROOT / entry.name, entry):  # copies: a link to __init__.py would lead back to its old neighbours
            shutil.copytree(folder, target / entry.name, ignore=NO_CODE, dirs_exist_ok=True)


def main() -> int:
    """Returns 0 where every contract is kept."""
    with tempfile.TemporaryDirectory() as folder:
        link_package(Path(folder) / "mm")
        # an editable install would be found before the folder of links
        sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith("_editable")]
        assert importlib.machinery.PathFinder in sys.meta_path
        sys.path.insert(0, folder)
        os.chdir(folder)
        return int(lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) != EXIT_STATUS_SUCCESS)


if __name__ == "__main__":
    sys.exit(main())
