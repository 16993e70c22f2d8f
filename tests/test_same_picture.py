"""One seed is one picture: diffusers' own call, Python, the command, batch, the page's orders and its API agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradio_client import Client
from PIL import Image
from tiny import tiny_pipeline
from tiny_page import served
from tiny_pipelines import SIDE, tiny_pipeline_of
from typer.testing import CliRunner

import mm
import mm.cli
from mm.batch import run_jobs
from mm.engine.events import CancelToken
from mm.engine.requests import Draw
from mm.ui.orders import Orders

BOUND = 2  # of 255, docs/models.md
COUNT, SEED, STEPS = 8, 5, 2
PROMPT = "a red cat"
SIZES = {"ours": {}, "flux": {"size": (SIDE, SIDE)}, "stable-diffusion-xl": {"size": (SIDE, SIDE)}}


@pytest.fixture(scope="module", params=SIZES)
def model(request, tmp_path_factory):
    """A family's name, its folder, and eight pictures of diffusers' own call, one by one."""
    pipe: Any = tiny_pipeline() if request.param == "ours" else tiny_pipeline_of(request.param)
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    size = SIZES[request.param].get("size")
    options = {} if size is None else {"width": size[0], "height": size[1]}
    made = [
        pipe(PROMPT, generator=torch.Generator().manual_seed(SEED + k), num_inference_steps=STEPS, **options).images[0]
        for k in range(COUNT)
    ]
    return request.param, folder, [np.asarray(image).astype(int) for image in made]


def check(made: list[Any], wanted: list[np.ndarray]) -> None:
    assert len(made) == len(wanted)
    for k, (one, other) in enumerate(zip(made, wanted, strict=True)):
        with Image.open(one) if isinstance(one, (str, Path)) else one as image:
            apart = abs(np.asarray(image.convert("RGB")).astype(int) - other).max()
        assert apart <= BOUND, f"picture {k}"
    assert len({other.tobytes() for other in wanted}) == len(wanted)  # the seeds matter


@pytest.mark.parametrize("size", [1, 3, 8])
def test_python_command_and_batch(model, size: int, tmp_path: Path) -> None:
    name, folder, wanted = model
    engine = mm.load(folder, dtype="float32")
    check(engine.draw(PROMPT, seed=SEED, count=COUNT, steps=STEPS, batch_size=size, **SIZES[name]), wanted)

    words = ["generate", PROMPT, "--model", str(folder), "-n", str(COUNT), "--seed", str(SEED), "--steps", str(STEPS)]
    words += ["--dtype", "float32", "--batch-size", str(size), "-o", str(tmp_path / "command")]
    words += ["--size", f"{SIDE}x{SIDE}"] if SIZES[name] else []
    done = CliRunner().invoke(mm.cli.app, words)
    assert done.exit_code == 0, done.output
    check(sorted((tmp_path / "command").glob("*.png")), wanted)

    body = {"prompt": PROMPT, "seed": SEED, "n": COUNT, "steps": STEPS}
    body |= {"size": f"{SIDE}x{SIDE}"} if SIZES[name] else {}
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text(json.dumps({"custom_id": "a", "task": "generate", "body": body}))
    run_jobs(jobs, tmp_path / "batch", load=lambda _: engine, model=str(folder), batch_size=size)
    check(sorted((tmp_path / "batch").rglob("*.png")), wanted)


def test_page_and_api(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, folder, wanted = model
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    engine = mm.load(folder, dtype="float32")
    (tmp_path / "pictures").mkdir()
    request = Draw(prompt=PROMPT, seed=SEED, count=COUNT, steps=STEPS, **SIZES[name])
    check(list(Orders(engine, tmp_path / "pictures").run(request, CancelToken()))[-1].files, wanted)
    size = {"width": SIDE, "height": SIDE} if SIZES[name] else {}
    with served(engine, tmp_path / "pictures") as at:
        files, _ = Client(at, verbose=False).predict(
            PROMPT, seed=SEED, count=COUNT, steps=STEPS, **size, api_name="/draw"
        )
    check(files, wanted)
