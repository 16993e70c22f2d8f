"""Tiny models on disk, and engines that have loaded them."""

from __future__ import annotations

import pytest
import tiny_calibration
from tiny import tiny_pipeline

import mm


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders: ours, SDXL, and an image-to-image pipeline of Stable Diffusion."""
    root = tmp_path_factory.mktemp("models")
    tiny_pipeline().save_pretrained(root / "ours")
    tiny_calibration.sdxl().save_pretrained(root / "sdxl")
    tiny_calibration.sd("StableDiffusionPipeline").save_pretrained(root / "sd")
    return root


@pytest.fixture(scope="module")
def ours(folders):
    return mm.load(folders / "ours")


@pytest.fixture(scope="module")
def sdxl(folders):
    return mm.load(folders / "sdxl", dtype="float32")
