"""Pictures of files: what a file cannot hold is one error, of `mm generate` and of a row of `mm batch`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from typer.testing import CliRunner

from mm.cli.batch import app as batch
from mm.cli.generate import app as generate
from mm.core.errors import UserError
from mm.engine.output import picture_bytes


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_tensor_is_no_picture(suffix: str) -> None:
    with pytest.raises(UserError, match="a file takes a PIL picture, not a Tensor; leave output_type out"):
        picture_bytes(cast(Any, torch.zeros(3, 8, 8)), {}, suffix)


def test_the_command_says_so(tmp_path: Path) -> None:
    given = ["a cat", "--set", "output_type=pt", "--steps", "1", "--seed", "1", "-o", str(tmp_path / "one.png")]
    made = CliRunner().invoke(generate, given)
    assert isinstance(made.exception, UserError) and not (tmp_path / "one.png").exists()


def test_such_a_row_does_not_end_the_batch(tmp_path: Path) -> None:
    bodies: tuple[dict[str, Any], ...] = ({"options": {"output_type": "pt"}}, {})
    rows = [
        {"custom_id": f"row-{k}", "task": "generate", "body": {"prompt": "a cat", "steps": 1, "seed": k} | body}
        for k, body in enumerate(bodies)
    ]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = CliRunner().invoke(batch, [str(tmp_path / "jobs.jsonl"), "-o", str(tmp_path / "out")])
    assert not isinstance(made.exception, UserError)
    assert "row-0, picture 0: a file takes a PIL picture, not a Tensor" in made.output
    assert len(list(tmp_path.rglob("*.png"))) == 1
