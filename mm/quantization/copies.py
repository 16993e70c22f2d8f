"""The 4-bit copies of `mm generate --bits 4` in the user's cache.

Design choices
- A copy is made once, and kept under the hash of what it was made from: weights, configs and settings.
- A copy that was not finished is gone on with. Of two processes that want the same copy the second waits for the first.
- The embedded 4-bit model is made in the same way: shipping it would cost more megabytes than making it costs seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mm.core.errors import UserError
from mm.core.locks import locked
from mm.core.paths import expanded, resolve_model
from mm.quantization.config import SVDQuantConfig
from mm.quantization.folders import quantize_folder


def cache_dir() -> Path:
    """Where things are kept that can be made again: MM_CACHE, or the user's cache folder."""
    base = os.environ.get("MM_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "mm")
    return expanded(base)


def quantized_copy(model: str | Path, config: SVDQuantConfig | None = None, *, progress: bool = True) -> Path:
    """The folder of a model's 4-bit copy in the cache, made now if it is not there."""
    where = resolve_model(model)
    if not isinstance(where, Path):
        raise UserError(f"{model!r} is a name on the hub; download it, and give its folder")
    config = config or SVDQuantConfig()
    name = where.parent.parent.name if where.parent.name == "snapshots" else where.name  # the hub's cache
    folder = copy_folder(name, model_files(where), config)
    with making(folder):
        make_copy(model, folder, config, progress=progress)
    return folder


@contextmanager
def making(folder: str | Path) -> Iterator[None]:
    """Within the context no other process makes this copy; where one does, waits until it ends."""
    folder = Path(folder)

    def say() -> None:
        print(f"mm: another process makes {folder}; waiting for it", file=sys.stderr, flush=True)

    if is_whole(folder):
        yield
        return
    with locked(folder.with_name(f".{folder.name}.running"), waiting=say):
        yield


def make_copy(model: str | Path, folder: str | Path, config: SVDQuantConfig, *, progress: bool = True) -> None:
    """Quantizes a model into a folder of the cache, or goes on where an earlier run ended; nothing where it is done.

    Call it within `making`.
    """
    folder = Path(folder)
    if is_whole(folder):
        return
    if folder.exists() and not (folder / ".parts").is_dir():  # an earlier run ended between two files
        shutil.rmtree(folder)
    try:
        quantize_folder(model, folder, config, progress=progress, pictures=0, compose=0)
    except UserError:
        if not folder.exists():
            raise
        shutil.rmtree(folder)  # parts that cannot be gone on with
        quantize_folder(model, folder, config, progress=progress, pictures=0, compose=0)


def model_files(folder: str | Path) -> list[Path]:
    """The files that make a model what it is: weights, and settings of all its parts."""
    kinds = (".safetensors", ".json", ".txt", ".model", ".jinja")
    return sorted(path for path in Path(folder).rglob("*") if path.suffix in kinds and path.is_file())


def copy_folder(name: str, files: Iterable[str | Path], config: SVDQuantConfig) -> Path:
    """Where the cache keeps the copy of a model whose files have certain bytes, made with certain settings."""
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode())
    for path in files:
        with Path(path).open("rb") as file:  # models are larger than memory
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return cache_dir() / "quantized" / f"{name}-{digest.hexdigest()[:16]}"


def is_whole(folder: str | Path) -> bool:
    """Whether a copy was finished and every component that its index names is there."""
    folder = Path(folder)
    if not (folder / "report.json").is_file() or (folder / ".parts").exists():
        return False
    try:
        resolve_model(folder)
    except UserError:
        return False
    return True
