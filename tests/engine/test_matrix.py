"""The cells of docs/matrix.md: a few families always, all of them with -m slow; and the page says what the cells do."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from engine_matrix import CELLS as DRAWING
from engine_matrix import Model
from engine_matrix_patches import CELLS as PATCHES
from tiny_pipelines import PIPELINES

CELLS = DRAWING | PATCHES
PAGE = Path(__file__).resolve().parents[2] / "docs" / "matrix.md"
QUICK = ("stable-diffusion", "flux", "flux-fill", "qwen-image")
FAMILIES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PIPELINES]
_MODELS: dict[str, Model] = {}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    yield tmp_path_factory.mktemp("matrix")
    _MODELS.clear()


@pytest.fixture
def model(request, root):
    name = request.getfixturevalue("name")
    if name not in _MODELS:
        _MODELS.clear()  # one at a time in memory
        (root / name).mkdir()
        _MODELS[name] = Model(name, root / name)
    return _MODELS[name]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_cell_works_or_says_why_not(name, cell, model):
    reason = CELLS[cell](model)
    assert (reason is None) == said(name, cell)


def test_the_page_has_all_families_and_cells():
    assert len(PIPELINES) >= 14
    assert all(said(name, cell) in (True, False) for name in PIPELINES for cell in CELLS)
    reasons = re.findall(r"^([0-9]+)\. \S.*\.$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    asked = set(re.findall(r"no \(([0-9]+)\)", PAGE.read_text(encoding="utf-8")))
    assert asked == set(reasons)


def test_rows_that_are_kept_are_written_as_they_were(tmp_path):
    spec = importlib.util.spec_from_file_location("matrix", PAGE.parents[1] / "benchmarks" / "matrix.py")
    matrix = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(matrix)
    assert matrix.page(matrix.written(PAGE, list(CELLS)), list(CELLS)) == PAGE.read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="has other cells than generate; write all of it, without --only"):
        matrix.written(PAGE, ["generate"])


def said(name: str, cell: str) -> bool:
    """What the page says of a cell."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [[part.strip(" `") for part in line.strip("|").split("|")] for line in lines]
    (row,) = [row for row in rows if row[0] == name]
    text = row[rows[0].index(cell)]
    assert text == "yes" or re.fullmatch(r"no \([0-9]+\)", text)
    return text == "yes"
