"""LoRA files of every layout, kind and family: the model does with one what it does in the program that wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lora_families import FAMILIES, fresh, pipeline_of, run
from lora_writers import TABLE_MARKS, cells, made, table

import mm

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(("family", "layout", "kind"), list(cells()))
def test_a_file_does_what_it_does_in_the_program_that_wrote_it(family, layout, kind, tmp_path):
    file = made(family, layout, kind, tmp_path)
    model = fresh(family)
    target = model if layout == "peft" else pipeline_of(family, model)
    before = run(family, model)
    patch = mm.read_lora(file.source, target)
    assert patch.report["file"] == f"{file.keys} of {file.keys} tensors of the file"
    patch.apply(target)
    got = run(family, model)
    assert float((got - before).abs().max()) > 1e-3
    for program, want in file.wanted.items():
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4, msg=lambda text, by=program: f"{by}: {text}")
    patch.undo(target)
    assert torch.equal(run(family, model), before)


def test_the_table_is_whole():
    assert len({family for family, _, _ in cells()}) == len(FAMILIES) == 8
    assert len(list(cells())) > 150


def test_the_table_in_the_docs_is_this_one():
    text = (Path(__file__).resolve().parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
    assert f"{TABLE_MARKS[0]}\n\n{table()}\n\n{TABLE_MARKS[1]}" in text, "run: python tests/lora_writers.py"
