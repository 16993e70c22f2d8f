"""The output folder: pictures with their records beside them, and a manifest per shard.

    00000/000000123-<custom_id>-2-s<seed>.png    the picture; 123 is the row's line in the job file, 1000 lines a shard,
                                                 2 the picture's number in the row, from 0
    00000/000000123-<custom_id>-2-s<seed>.json   its record: settings, status, error, and the picture's sha256
    00000/manifest.jsonl                         all records of the folder, and this run's rows that could not be read

Design choices:
- The record is written after its picture, each whole or not at all: where a record says "done", the picture is there.
- A picture counts as present by content: a record has its settings' hash, and the PNG beside it has the record's
  sha256. Records are found by custom_id, so rows may be moved or inserted without drawing anything again.
- The number is part of the name: hashed seeds of two pictures of a row may be the same. Folders of versions that left
  it out go on, since records are found by what is in them.
- Manifests are made from the records, so a run that was killed loses nothing: the next one writes them.
- Every path is resolved and must lie under the root, also where somebody planted a link in it.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm.batch.jobs import BadRow
from mm.core.errors import UserError
from mm.core.files import open_regular, write_bytes, write_json, write_text
from mm.core.paths import expanded
from mm.core.safe_json import read_object

SHARD = 1000  # lines of the job file
MANIFEST = "manifest.jsonl"
_RECORD = ("custom_id", "index", "line", "status", "error", "file", "sha256", "warnings", "settings_hash", "settings")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture of a row. `settings` is all that it depends on."""

    line: int
    custom_id: str
    index: int
    settings: dict[str, Any]

    @property
    def seed(self) -> int:
        return self.settings["seed"]

    @property
    def settings_hash(self) -> str:
        plain = json.dumps(self.settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(plain.encode()).hexdigest()

    @property
    def stem(self) -> str:
        return f"{self.line:09d}-{self.custom_id}-{self.index}-s{self.seed}"


class Store:
    """A folder of results. Made where it is missing, but only once something is written."""

    def __init__(self, root: str | Path) -> None:
        self.root = expanded(root).resolve()
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"{self.root} is a file; give a folder for the results")
        self._records: dict[tuple[str, int], list[tuple[Path, dict[str, Any]]]] = defaultdict(list)
        for path in sorted(self.root.glob("[0-9]*/*.json")):
            record = _read_record(path)
            if record is not None:
                self._records[record["custom_id"], record["index"]].append((path, record))

    def status(self, picture: Picture) -> tuple[str, str]:
        """("done" | "failed" | "missing", error) of this very picture with these very settings."""
        found = ("missing", "")
        for path, record in self._records.get((picture.custom_id, picture.index), ()):
            if record["settings_hash"] != picture.settings_hash:
                continue
            if record["status"] == "failed":
                found = ("failed", str(record["error"]))
            elif _sha256(path.with_suffix(".png")) == record["sha256"]:
                return ("done", "")
        return found

    def save(self, picture: Picture, png: bytes, warnings: Iterable[str] = ()) -> Path:
        """Keeps a picture and its record."""
        path = self._path(picture, ".png")
        write_bytes(path, png)
        self._record(picture, "done", sha256=hashlib.sha256(png).hexdigest(), warnings=list(warnings))
        return path

    def fail(self, picture: Picture, error: str) -> None:
        """Keeps why a picture could not be drawn. An older picture of that name had other settings, and goes."""
        self._path(picture, ".png").unlink(missing_ok=True)
        self._record(picture, "failed", error=error)

    def write_manifests(self, bad: Iterable[BadRow] = ()) -> None:
        """Writes every shard's manifest anew."""
        shards: dict[Path, list[tuple[int, int, dict[str, Any]]]] = defaultdict(list)
        for path in self.root.glob("[0-9]*/*.json"):
            record = _read_record(path)
            if record is not None:
                shards[path.parent].append((record["line"], record["index"], record))
        for path in self.root.glob(f"[0-9]*/{MANIFEST}"):
            shards[path.parent]  # written anew also where its bad rows are gone from the job file
        for row in bad:
            record = dict.fromkeys(_RECORD) | {"custom_id": row.custom_id, "line": row.line}
            shards[self._shard(row.line)].append((row.line, 0, record | {"status": "failed", "error": row.error}))
        for folder, entries in shards.items():
            lines = (json.dumps(record) for *_, record in sorted(entries, key=lambda entry: entry[:2]))
            write_text(self._inside(folder / MANIFEST), "".join(f"{line}\n" for line in lines))

    def _record(self, picture: Picture, status: str, **more: Any) -> None:
        path = self._path(picture, ".json")
        record = dict.fromkeys(_RECORD) | {
            "custom_id": picture.custom_id,
            "index": picture.index,
            "line": picture.line,
            "status": status,
            "file": f"{picture.stem}.png" if status == "done" else None,
            "settings_hash": picture.settings_hash,
            "settings": picture.settings,
            **more,
        }
        write_json(path, record)
        known = self._records[picture.custom_id, picture.index]
        for old, before in [entry for entry in known if entry[0] != path]:
            if before["status"] == "failed" and before["settings_hash"] == picture.settings_hash:
                self._inside(old).unlink(missing_ok=True)  # the same picture under a name of before
                known.remove((old, before))
        known.append((path, record))

    def _shard(self, line: int) -> Path:
        return self.root / f"{line // SHARD:05d}"

    def _path(self, picture: Picture, suffix: str) -> Path:
        return self._inside(self._shard(picture.line) / f"{picture.stem}{suffix}")

    def _inside(self, path: Path) -> Path:
        """Follows links in the folders, not the file itself: that is replaced, never written through."""
        found = path.parent.resolve() / path.name
        if not found.is_relative_to(self.root):
            raise UserError(f"{path} leads out of {self.root}, to {found}; remove the link or take another folder")
        return found


def _read_record(path: Path) -> dict[str, Any] | None:
    """A record, or None for any other JSON file and for a damaged one: its picture is drawn again."""
    try:
        record = read_object(path)
    except (OSError, UserError):
        return None
    right = set(record) == set(_RECORD) and record["status"] in ("done", "failed")
    whole = right and all(type(record[key]) is int and record[key] >= 0 for key in ("index", "line"))
    return record if whole and isinstance(record["custom_id"], str) else None


def _sha256(path: Path) -> str | None:
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, UserError):
        return None
