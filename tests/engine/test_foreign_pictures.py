"""Pictures of A1111 and ComfyUI that are drawn again: seeds beyond mm's, and settings that do not act here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

import mm
from mm.core.checks import MAX_SEED
from mm.core.png_settings import read_settings
from mm.engine.capabilities import Capabilities
from mm.engine.events import Picture
from mm.engine.requests import Draw
from mm.engine.settings import drawn_again

COMFY = 156680208700286  # a seed as ComfyUI draws it


@pytest.fixture(scope="module")
def can() -> Capabilities:
    return mm.load("mm-tiny").capabilities


def _graph(**sampler: Any) -> dict[str, Any]:
    inputs = {
        "seed": COMFY, "steps": 12, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
        "model": ["5", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["4", 0],
    }  # fmt: skip
    return {
        "3": {"class_type": "KSampler", "inputs": inputs | sampler},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "5": {"class_type": "LoraLoader", "inputs": {"lora_name": "style.safetensors", "strength_model": 1.0}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red cat"}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": ""}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["3", 0]}},
    }


def _read(tmp_path: Path, key: str, text: str) -> dict[str, Any]:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(key, text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=chunks)
    return read_settings(tmp_path / "a.png")


def test_a_seed_of_64_bits_becomes_one_of_32_and_is_named(tmp_path: Path, can: Capabilities) -> None:
    settings = _read(tmp_path, "prompt", json.dumps(_graph()))
    again = drawn_again(settings, can)
    assert again.request.seed == COMFY % 2**32 <= MAX_SEED
    assert any(f"seed {COMFY} is larger" in note and str(COMFY % 2**32) in note for note in again.notes)
    assert any("the LoRA style.safetensors" in note for note in again.notes)
    own = drawn_again(settings, can, seed=3)
    assert own.request.seed == 3
    assert not any("seed" in note for note in own.notes)


def test_what_does_not_act_here_is_named(tmp_path: Path, can: Capabilities) -> None:
    settings = _read(tmp_path, "prompt", json.dumps(_graph(denoise=0.5, scheduler="karras", seed=1)))
    (note,) = [note for note in drawn_again(settings, can).notes if note.startswith("left out")]
    assert note == "left out of the picture's settings: denoise 0.5, the noise schedule karras"
    plain = drawn_again(_read(tmp_path, "prompt", json.dumps(_graph(seed=1))), can)
    assert not any("left out of" in note for note in plain.notes)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("Clip skip: 2", "Clip skip 2, the noise schedule karras"),
        ("Clip skip: 1", "the noise schedule karras"),
        (
            "Denoising strength: 0.5, Hires upscale: 2",
            "Denoising strength 0.5, Hires upscale 2, the noise schedule karras",
        ),
    ],
)
def test_settings_of_a1111_that_do_not_act_here_are_named(
    tmp_path: Path, can: Capabilities, more: str, named: str
) -> None:
    text = f"a red cat\nSteps: 12, Sampler: DPM++ 2M Karras, CFG scale: 2, Seed: 5, Size: 128x128, {more}, Version: v1"
    notes = drawn_again(_read(tmp_path, "parameters", text), can).notes
    assert f"left out of the picture's settings: {named}" in notes


def test_a_seed_that_was_never_written_is_another_one(tmp_path: Path, can: Capabilities) -> None:
    settings = _read(tmp_path, "parameters", "a red cat\nSteps: 12, Sampler: Euler, Seed: -1, Size: 128x128")
    again = drawn_again(settings, can)
    assert again.request.seed is None
    assert any("it is not known" in note for note in again.notes)


def test_pictures_of_mm_have_no_such_notes(can: Capabilities) -> None:
    events: list[Any] = []
    mm.load("mm-tiny").run(Draw(prompt="a red cat", seed=MAX_SEED, steps=1)).each(events.append)
    (picture,) = [event for event in events if isinstance(event, Picture)]
    again = drawn_again(picture.settings, can)
    assert again.request.seed == MAX_SEED
    assert not again.notes
