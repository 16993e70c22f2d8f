"""The fingerprint that comes with mm-tiny: on pictures that it was not trained on, and through the command."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import mm
import mm.cli
from mm.core.pictures import read_picture
from mm.provenance.attacks import MEASURED
from mm.provenance.fingerprint import Fingerprint
from mm.provenance.measuring import measure
from mm.provenance.report import embedded_fingerprint
from mm.provenance.stamping import marks
from mm.tokenizers import Autoencoder
from mm.training.fingerprint_stage import encoded

PICTURES = 12


@pytest.fixture(scope="module")
def shipped() -> Fingerprint:
    found = embedded_fingerprint()
    assert found is not None
    return found


@pytest.fixture(scope="module")
def report(shipped: Fingerprint) -> dict[str, Any]:
    autoencoder = Autoencoder.from_pretrained(Path(mm.__file__).parent.parent / "weights/mm-tiny/autoencoder").float()
    latents, originals = encoded(autoencoder, PICTURES, "shipped fingerprint", "cpu")
    return measure(shipped, autoencoder, autoencoder.decoder, latents, originals=originals.float() / 255)


@pytest.mark.parametrize("attack", MEASURED)
def test_bits_are_read_after(attack: str, report: dict[str, Any]) -> None:
    assert report["read"][attack] >= 0.98  # .99 is wanted of many; this is of 12 pictures
    assert report["found"][attack] >= 0.9


def test_pictures_lose_less_than_a_decibel(report: dict[str, Any]) -> None:
    assert report["psnr_plain"] - report["psnr_marked"] < 1.0


def test_a_copy_marks_its_pictures_and_plain_ones_have_none(tmp_path: Path, shipped: Fingerprint) -> None:
    def call(*arguments: str) -> str:
        done = CliRunner().invoke(mm.cli.app, list(arguments))
        assert done.exit_code == 0, done.output
        return done.output

    number = random.Random(7).getrandbits(32)
    copy = tmp_path / "copy"
    call("provenance", "--stamp", f"{number:#x}", "-o", str(copy))
    for name, model in (("marked", str(copy)), ("plain", "mm-tiny")):
        call("generate", "a red star on grass", "--seed", "7", "--model", model, "-o", str(tmp_path / f"{name}.png"))
    read = call("provenance", str(tmp_path / "marked.png"))
    line = next(line for line in read.splitlines() if line.startswith("fingerprint: 0x"))
    wrong = bin(int(line.split()[1], 16) ^ number).count("1")
    assert wrong <= 1
    assert "fingerprint: none" in call("provenance", str(tmp_path / "plain.png"))
    marked, plain = (np.asarray(read_picture(tmp_path / f"{name}.png"), dtype=float) for name in ("marked", "plain"))
    change = np.square(marked - plain).mean()
    assert 0 < change < 60  # of 255 squared: above 30 dB
    again = CliRunner().invoke(mm.cli.app, ["provenance", "--stamp", "7", "--model", str(copy), "-o", f"{copy}2"])
    assert again.exit_code == 1 and "marks its pictures already" in again.stderr  # its own fingerprint is not needed
    assert not Path(f"{copy}2").exists()


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        mm.cli.app, ["provenance", "--stamp", "7", "--model", "nosuch", "-o", str(tmp_path / "a")]
    )
    assert done.exit_code == 1 and "no model 'nosuch'" in done.stderr


def test_decoders_that_mark_are_known(shipped: Fingerprint) -> None:
    autoencoder = Autoencoder.from_pretrained(Path(mm.__file__).parent.parent / "weights/mm-tiny/autoencoder").float()
    assert not marks(autoencoder, shipped)
    shipped.stamp(autoencoder, 0xC0FFEE01)
    assert marks(autoencoder, shipped)


def test_of_a_photograph_the_middle_is_read(shipped: Fingerprint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A photograph of megapixels would take minutes; what is read at its own size is bounded."""
    seen: list[tuple[int, ...]] = []
    reader: Any = shipped.reader
    tile = reader.tile

    def watched(pictures: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(pictures.shape[-2:]))
        found: torch.Tensor = tile(pictures)
        return found

    monkeypatch.setattr(reader, "tile", watched)
    assert shipped.read(torch.rand(1, 3, 1500, 700)).numbers() == [None]
    assert max(max(shape) for shape in seen) == 4 * 128
