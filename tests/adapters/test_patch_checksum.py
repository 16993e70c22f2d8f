"""A patch file that was damaged is refused; files of earlier versions, which have no checksum, are read."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mm.adapters.patch import Entry, Patch
from mm.adapters.patch_file import CHECKSUM, META
from mm.core.errors import UserError

KINDS = {
    "a": Entry(kind="lowrank", tensors={"down": torch.ones(2, 8), "up": torch.ones(4, 2).bfloat16()}),
    "b.bias": Entry(kind="bias", tensors={"delta": torch.ones(4).half()}),
    "c": Entry(kind="rows", tensors={"ids": torch.tensor([3, 5]), "rows": torch.ones(2, 4)}),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    Patch(entries=KINDS, name="p", report={"note": 1}).save(tmp_path / "p.safetensors")
    return tmp_path / "p.safetensors"


def test_the_checksum_is_of_the_header_and_of_blocks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {"down": torch.randn(3, 777), "up": torch.randn(5, 3).bfloat16()}  # more than two blocks, and a rest
    Patch(entries={"a": Entry(kind="lowrank", tensors=tensors)}).save(tmp_path / "p")
    data = (tmp_path / "p").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    found = header["__metadata__"].pop(CHECKSUM)
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    while len(data) - start >= 4096:
        words = struct.unpack("<512Q", data[start : start + 4096])
        digest.update((sum(words) % 2**64).to_bytes(8, "little"))
        start += 4096
    digest.update(data[start:])
    assert found == digest.hexdigest()


def test_the_same_patch_gives_the_same_file(file: Path) -> None:
    before = file.read_bytes()
    for _ in range(8):
        Patch(entries=KINDS, name="p", report={"note": 1}).save(file)
        assert file.read_bytes() == before


def test_one_flipped_bit_anywhere_is_refused(file: Path) -> None:
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert Patch.load(file).report == {"note": 1}
    for place in range(start, len(data), 3):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(UserError):
            Patch.load(file)
    file.write_bytes(data[:start] + bytes([data[start] ^ 1]) + data[start + 1 :])
    with pytest.raises(UserError, match=r"p\.safetensors is damaged: .*copy or download it again"):
        Patch.load(file)


def test_a_flipped_bit_of_a_large_tensor_is_refused(tmp_path: Path) -> None:
    entry = Entry(kind="lowrank", tensors={"down": torch.ones(4, 4096), "up": torch.ones(8, 4)})
    Patch(entries={"a": entry}).save(tmp_path / "p")
    data = (tmp_path / "p").read_bytes()
    for place in (len(data) - 20_000, len(data) - 40_001, len(data) - 1):
        (tmp_path / "p").write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(UserError, match="is damaged"):
            Patch.load(tmp_path / "p")


def test_changed_metadata_is_refused(file: Path) -> None:
    data = file.read_bytes()
    changed = data.replace(rb"\"scale\": 1.0", rb"\"scale\": 9.0")
    assert changed != data
    file.write_bytes(changed)
    with pytest.raises(UserError, match="is damaged"):
        Patch.load(file)


def test_a_file_without_a_checksum_is_read(file: Path) -> None:
    with safe_open(file, "pt") as read:
        meta = {META: read.metadata()[META]}
        tensors = {name: read.get_tensor(name) for name in read.keys()}
    save_file(tensors, file, metadata=meta)
    assert set(Patch.load(file).entries) == set(KINDS)


def test_saving_replaces_a_file_as_a_whole(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python replaces without asking, as diffusers' `save_lora_weights` does; a save that fails leaves the old file."""
    before = file.read_bytes()
    monkeypatch.setattr("os.fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        Patch(entries=KINDS, name="other").save(file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["p.safetensors"]
    monkeypatch.undo()
    Patch(entries=KINDS, name="other").save(file)
    assert Patch.load(file).name == "other"
