"""Pictures of files: what a file cannot hold is one error, of `mm generate` and of a row of `mm batch`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mm
from mm.cli.batch import app as batch
from mm.cli.edit import app as edit
from mm.cli.generate import app as generate
from mm.core.errors import UserError
from mm.engine.output import picture_bytes
from mm.engine.requests import Edit


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_tensor_is_no_picture(suffix: str) -> None:
    with pytest.raises(UserError, match="a file takes a PIL picture, not a Tensor; leave output_type out"):
        picture_bytes(cast(Any, torch.zeros(3, 8, 8)), {}, suffix)


SAYS = "files hold PIL pictures alone; leave it out"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call of a pipeline is made."""
    monkeypatch.setattr("mm.engine.calls.draw", lambda *_, **__: pytest.fail("it was drawn before it was refused"))


@pytest.mark.parametrize("kind", ["pt", "gif", "1", '["pil"]'])
def test_the_commands_say_so_before_they_draw(tmp_path: Path, undrawn: None, kind: str) -> None:
    source, out = tmp_path / "source.png", tmp_path / "one.png"
    Image.new("RGB", (128, 128)).save(source)
    for command, given in ((generate, ["a cat"]), (edit, [str(source), "make it night"])):
        made = CliRunner().invoke(command, [*given, "--set", f"output_type={kind}", "-o", str(out)])
        assert isinstance(made.exception, UserError) and SAYS in str(made.exception) and not out.exists()


def test_what_no_pipeline_gives_is_refused_before_drawing(undrawn: None) -> None:
    engine = mm.load("mm-tiny")
    with pytest.raises(UserError, match='output_type is "gif"; give pil, np, pt, latent'):
        engine.draw("a cat", options={"output_type": "gif"})
    request = Edit(image=Image.new("RGB", (128, 128)), instruction="make it night", options={"output_type": "gif"})
    with pytest.raises(UserError, match='output_type is "gif"'):
        engine.run(request)


def test_such_a_row_does_not_end_the_batch(tmp_path: Path) -> None:
    bodies: tuple[dict[str, Any], ...] = ({"options": {"output_type": "pt"}}, {})
    rows = [
        {"custom_id": f"row-{k}", "task": "generate", "body": {"prompt": "a cat", "steps": 1, "seed": k} | body}
        for k, body in enumerate(bodies)
    ]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = CliRunner().invoke(batch, [str(tmp_path / "jobs.jsonl"), "-o", str(tmp_path / "out")])
    assert not isinstance(made.exception, UserError)
    assert 'line 1: output_type is "pt", and files' in made.output.replace("'", '"')
    assert len(list(tmp_path.rglob("*.png"))) == 1
