"""`mm provenance`: what is found in a file, and what is said of what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mm.cli
from mm.core.errors import UserError
from mm.core.png_settings import save_png
from mm.provenance import credentials, report
from mm.provenance.fingerprint import Fingerprint, FingerprintConfig

STORE = {
    "active_manifest": "urn:1",
    "manifests": {
        "urn:1": {
            "title": "a.png", "claim_generator_info": [{"name": "mm", "version": "1"}],
            "signature_info": {"issuer": "Alice"},
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [{"action": "c2pa.created"}]}}],
        }
    },
}  # fmt: skip


def _picture(folder: Path, name: str = "a.png") -> Path:
    picture = Image.new("RGB", (128, 128), (90, 120, 40))
    if name.endswith(".png"):
        save_png(folder / name, picture, {"prompt": "a red star", "seed": 7, "steps": 4, "mode": "flow"})
    else:
        picture.save(folder / name)
    return folder / name


def test_settings_and_what_was_not_searched_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "available", lambda: False)
    monkeypatch.setattr(report, "embedded_fingerprint", lambda: None)
    done = CliRunner().invoke(
        mm.cli.app, ["provenance", str(_picture(tmp_path)), "--json", str(tmp_path / "found.json")]
    )
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("settings: prompt a red star, seed 7")
    assert lines[1] == "fingerprint: not searched for; give the fingerprint's file (--fingerprint)"
    assert lines[2] == f"content credentials: {credentials.MISSING}"
    assert json.loads((tmp_path / "found.json").read_text())["settings"]["seed"] == 7
    other = CliRunner().invoke(mm.cli.app, ["provenance", str(_picture(tmp_path, "b.jpg"))])
    assert other.stdout.startswith("settings: none (")
    wrong = tmp_path / "no.png"
    wrong.write_bytes(b"nothing")
    for path in (wrong, tmp_path / "missing.png"):
        done = CliRunner().invoke(mm.cli.app, ["provenance", str(path)])
        assert done.exit_code == 1
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_fingerprint_is_read_and_a_plain_picture_has_none(tmp_path: Path) -> None:
    """A reader whose bias alone decides: present with the bits 10, or absent."""
    made = Fingerprint({"conv": (3, 3)}, FingerprintConfig(bits=2, side=64, period=8))
    with torch.no_grad():
        made.reader.out.weight.zero_()
        made.reader.out.bias.copy_(torch.tensor([5.0, -5.0, 30.0]))
    file = tmp_path / "fingerprint.safetensors"
    made.save(file)
    picture = _picture(tmp_path)
    done = CliRunner().invoke(mm.cli.app, ["provenance", str(picture), "--fingerprint", str(file)])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[1] == "fingerprint: 0x2"
    with torch.no_grad():
        made.reader.out.bias[-1] = -30.0
    made.save(file)
    done = CliRunner().invoke(mm.cli.app, ["provenance", str(picture), "--fingerprint", str(file)])
    assert done.stdout.splitlines()[1] == "fingerprint: none"
    with pytest.raises(UserError, match="no fingerprint of mm"):
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
        Fingerprint.load(tmp_path / "other.safetensors")


def test_credentials_of_a_manifest() -> None:
    found = credentials.credentials_of(STORE, "Valid")
    assert str(found) == "valid, written by mm 1, signed by Alice; c2pa.created"
    for odd in ({}, [], {"active_manifest": 3, "manifests": []}, {"manifests": {None: 1}}):
        assert credentials.credentials_of(odd, "Invalid").actions == ()


def test_a_file_without_credentials_has_none(tmp_path: Path) -> None:
    """With c2pa-python itself, where it is installed."""
    if not credentials.available():
        pytest.skip("needs c2pa-python (the c2pa extra)")
    assert credentials.read_credentials(_picture(tmp_path)) is None


def test_a_stamped_copy_draws_with_the_changed_decoder(tmp_path: Path) -> None:
    """The copy has the bits in its weights, loads as any model, and nothing is left of a call that fails."""
    made = Fingerprint({"decoder.16": (32, 12)}, FingerprintConfig(bits=4, period=4))
    with torch.no_grad():
        made.shift["decoder/16"].copy_(torch.randn(5, 12, generator=torch.Generator().manual_seed(0)))
    file, folder = tmp_path / "fingerprint.safetensors", tmp_path / "copy"
    made.save(file)

    def call(*arguments: str) -> Any:
        return CliRunner().invoke(mm.cli.app, ["provenance", *arguments])

    done = call("--stamp", "0b1010", "--fingerprint", str(file), "-o", str(folder))
    assert done.exit_code == 0, done.output
    plain, copy = (mm.TextToImagePipeline.from_pretrained(name).autoencoder for name in ("mm-tiny", folder))
    assert mm.UnderstandingPipeline.from_pretrained(folder).understanding_encoder is not None  # the copy reads as well
    read = Fingerprint.load(file)
    wanted = read.changes("decoder.16", read.bits_of(0b1010)[None])[1][0]
    change = copy.decoder[16].bias.float() - plain.decoder[16].bias.float()
    assert torch.allclose(change, wanted, atol=0.02)
    assert torch.equal(copy.decoder[11].weight, plain.decoder[11].weight)
    for arguments, message in (
        (("--stamp", "1", "--fingerprint", str(file), "-o", str(folder)), "exists; give a new folder"),
        (("--stamp", "16", "--fingerprint", str(file), "-o", str(tmp_path / "b")), "does not fit into 4 bits"),
        (("--stamp", "ten", "--fingerprint", str(file), "-o", str(tmp_path / "b")), "is no number"),
        (("--stamp", "1"), "belong together"),
        ((), "give a picture to read"),
    ):
        failed = call(*arguments)
        assert failed.exit_code == 1 and message in failed.stderr, failed.output
    other = tmp_path / "other.safetensors"
    Fingerprint({"decoder.99": (3, 3)}, FingerprintConfig(bits=4, period=4)).save(other)
    failed = call("--stamp", "1", "--fingerprint", str(other), "-o", str(tmp_path / "b"))
    assert failed.exit_code == 1 and "no layer decoder.99" in failed.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "fingerprint.safetensors", "other.safetensors"]
