"""The page of every family: it is served, and draws over HTTP what the engine draws in Python."""

from __future__ import annotations

import io
import json

import httpx
import numpy as np
import pytest
from PIL import Image
from tiny_page import call, png, served, upload
from tiny_pipelines import PIPELINES, SIDE, tiny_pipeline_of

import mm

QUICK = ("flux", "stable-diffusion-xl")
NAMES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(set(PIPELINES) - set(QUICK)))]


@pytest.mark.parametrize("name", NAMES)
def test_a_page_of_every_family_draws(name: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    tiny_pipeline_of(name).save_pretrained(tmp_path / "model")
    engine = mm.load(tmp_path / "model", dtype="float32")
    tasks = engine.capabilities.tasks
    (tmp_path / "pictures").mkdir()
    with served(engine, tmp_path / "pictures") as at:
        labels = {one["props"].get("label") for one in httpx.get(f"{at}/config").json()["components"]}
        assert ("Draw" in labels) == ("draw" in tasks)
        assert bool({"Edit", "From a picture"} & labels) == bool({"edit", "image_to_image", "inpaint"} & set(tasks))
        if "draw" in tasks:
            answer = call(at, "draw", "a fox", 3, 1, 2, None, None, None, SIDE, SIDE)
        else:
            source, mask = upload(at, png(SIDE, SIDE)), upload(at, png(SIDE, SIDE, "white"))
            answer = call(at, "edit", source, "a fox", mask if tasks == ("inpaint",) else None, None, 3, 1, 2)
        assert "event: complete" in answer.text, answer.text[-500:]
        files, about = json.loads(answer.text.rpartition("event: complete\ndata: ")[2].split("\n")[0])
        assert about["state"] == "done" and about["settings"][0]["seed"] == 3
        drawn = Image.open(io.BytesIO(httpx.get(f"{at}/gradio_api/file={files[0]['path']}").content))
    if "draw" in tasks:
        wanted = engine.draw("a fox", seed=3, steps=2, size=(SIDE, SIDE))[0]
        assert np.array_equal(np.asarray(drawn), np.asarray(wanted))
