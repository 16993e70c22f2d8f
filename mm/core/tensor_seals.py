"""Seals: a checksum in a safetensors file, which finds what was damaged on the file's way.

Design choices
- The checksum is in the metadata and covers the rest: the header with all other metadata, and the bytes of the tensors.
- It is compared after the file was read and found whole, so damage that breaks the format has a clearer error.
- A file without one is not compared, since other programs write none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mm.core.errors import UserError
from mm.core.files import open_regular
from mm.core.safe_tensors import ADAPTER_LIMITS, Limits, ordered, parts, raw_header

_BLOCK = 4096  # bytes of a sum


def sealed(data: bytes, key: str) -> bytes:
    """The bytes of a safetensors file with a checksum of all of it in its metadata, which `check_seal` compares."""
    header, values = parts(data)
    header.setdefault("__metadata__", {})
    return ordered(data, {key: _checksum(header, np.frombuffer(values, np.uint8))})


def check_seal(path: str | os.PathLike[str], key: str, what: str, *, limits: Limits = ADAPTER_LIMITS) -> None:
    """Raises UserError where a file is not what was sealed; one without a checksum is not compared.

    Args:
        path: a safetensors file that was read and found whole.
        key: of the checksum in the metadata.
        what: what the file is, for the error message.
        limits: as in `read_header`.
    """
    where = Path(path)
    with open_regular(where, what) as file:
        header, start = raw_header(file, where, os.fstat(file.fileno()).st_size, limits)
        metadata = header.get("__metadata__", {})
        wanted = metadata.pop(key, None)
        if wanted is None:
            return
        values = np.memmap(file, np.uint8, "r", offset=start) if len(header) > 1 else np.zeros(0, np.uint8)
        if wanted != _checksum(header, values):
            raise UserError(
                f"{where} is damaged: what it holds is not what was written (its checksum differs); copy or download "
                "it again, or make it again"
            )


def _checksum(header: Mapping[str, Any], values: np.ndarray[Any, Any]) -> str:
    """SHA-256 of a header and of the sums of its data's blocks of 4 KiB, as 64-bit numbers modulo 2^64.

    A changed byte always changes its block's sum, and sums cost a fiftieth of SHA-256 of all bytes. That finds damage,
    and no forgery.
    """
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    whole = len(values) // _BLOCK * _BLOCK
    digest.update(values[:whole].view("<u8").reshape(-1, _BLOCK // 8).sum(1, dtype="<u8").tobytes())
    digest.update(values[whole:].tobytes())
    return digest.hexdigest()
