"""The claims of customization: the cells' order and keeping, the measure of styles, and the table of made-up cells."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mm.core.errors import UserError
from mm.evaluation import customize_claims as claims_module
from mm.evaluation.customize_bench import GROUND, SUBJECTS, Bench
from mm.evaluation.customize_cells import Cell, plan
from mm.evaluation.customize_claims import fill, main
from mm.evaluation.customize_measures import ground
from mm.evaluation.customize_pages import claims
from mm.evaluation.customize_styles import (
    ASKED,
    TAUGHT,
    UNSEEN,
    StyleReader,
    in_style,
    scenes_of_objects,
    style_prompts,
    undone,
    write_style,
)
from mm.world import vocabulary as v
from mm.world.render import render

YES, NO = [True] * 10, [False] * 10
REPORTS: dict[str, dict[str, Any]] = {
    **{f"alone/{m}/{s}": {"seen": YES} for m in ("dreambooth", "orthogonal") for s in SUBJECTS},
    "merged/orthogonal/eight/regmean": {"seen": YES * 7 + YES[:5] + NO[:5], "subjects": dict.fromkeys(SUBJECTS)},
    "merged/dreambooth/eight/sum": {"seen": YES * 4 + NO * 4, "subjects": dict.fromkeys(SUBJECTS)},
    "merged/dreambooth/four/sum": {"seen": YES * 3 + NO, "subjects": dict.fromkeys(SUBJECTS[:4])},
    "pairs/base/known": {"both": YES},
    "compose/base/none": {"right": YES[:8] + NO[:2]},
    **{f"compose/dreambooth/{s}": {"right": YES[:7] + NO[:3]} for s in SUBJECTS},
    "beside/base/known": {"both": YES},
    "beside/dreambooth/panda": {"both": YES[:7] + NO[:3]},
    "pairs/dreambooth/eight/apart": {"both": YES[:8] + NO[:2]},
    "pairs/orthogonal/four/regmean": {"both": YES[:9] + NO[:1]},
    "four/applied/panda": {"seen": YES[:9] + NO[:1]},
    "four/trained/robot": {"seen": YES, "bytes": 2**20, "bytes_sixteen": 4 * 2**20},
    "ground/textual-inversion/panda": {"free": YES[:8] + NO[:2], "other": YES, "seen": YES},
    "ground/detex/panda": {"free": YES[:2] + NO[:8], "other": NO, "seen": YES},
    "class/base/known": {"composed": YES},
    "class/class-diffusion/panda": {"composed": YES[:8] + NO[:2]},
    "erased/alone": {"back": NO},
    "erased/unrelated": {"back": YES[:1] + NO[:9]},
    "erased/on": {"back": NO, "learned": YES, "guard_drift": 0.08},
    "erased/on, guarded": {"back": NO, "learned": YES, "guard_drift": 0.02},
    "style/dreambooth/negative": {
        "style": YES[:6] + NO[:4], "style_ceiling": YES, "object": YES, "object_ceiling": YES,
    },
}  # fmt: skip


def test_the_table_pools_cells_and_holds_them_against_what_is_wanted() -> None:
    text = claims(REPORTS)
    rows = {row.split(" | ")[0].strip("| "): row for row in text.splitlines()}
    eight = rows["eight `orthogonal` adapters merged by `regmean`"]
    assert "0.938" in eight and "(n 80)" in eight
    assert "0.750 of it" in rows["four `dreambooth` adapters merged by `sum`"]
    assert "0.500 of it" in rows["eight `dreambooth` adapters merged by `sum`"]
    together = "two learned subjects in one picture"
    assert "0.900 of it" in rows[f"{together}, `orthogonal`, merged by `regmean`, pairs of four"]
    assert "0.800 of it" in rows[f"{together}, `dreambooth`, drawn apart, pairs of eight"]
    assert "0.700 of it" in rows["a learned subject beside a known object, `dreambooth`"]
    unrelated = rows["compose prompts without the subject, 8 adapters: right"]
    assert "0.700" in unrelated and "-10.0 points [" in unrelated
    assert "(n 80)" in rows["8 subjects alone, `dreambooth`: seen"]
    assert "-10.0 points" in rows["16-bit adapter on the 4-bit model, 1 subject"]
    assert "0.25 of it" in rows["weights that its steps read"]
    assert "0.250 of it" in rows["`detex`: the pictures' one background, where none is asked for"]
    assert "0.800 of it" in rows["`class-diffusion` under NAME NOUN: background, style or companion as asked"]
    assert "0.100 [0.018, 0.404] (n 10)" in rows["an erased concept under an unrelated adapter: seen"]
    assert "0.25 of that without" in rows["drift of its prompts with the guard"]
    assert "0.600 of the ceiling" in rows["1 unseen style, `dreambooth`: style"]


def test_what_is_not_measured_has_no_row() -> None:
    assert claims({}).count("\n") == 1
    some = {name: report for name, report in REPORTS.items() if name.startswith("merged/") or "gift" in name}
    assert "merged" not in claims(some)  # the single figures of seven subjects are missing


def test_the_plan_begins_with_the_default_and_names_each_cell_once() -> None:
    names = [cell.name for cell in plan()]
    assert len(set(names)) == len(names)
    assert names[:8] == [f"alone/dreambooth/{subject}" for subject in v.HELD_OUT_OBJECTS]
    assert len({cell.file for cell in plan()}) == len(names)


def test_cells_are_kept_and_failures_made_again(tmp_path: Path) -> None:
    calls: list[str] = []

    def made(name: str) -> dict[str, Any]:
        calls.append(name)
        if name == "b" and calls.count("b") == 1:
            raise UserError("too small")
        return {"seen": [True]}

    cells = [Cell(name=name, make=lambda bench, name=name: made(name)) for name in ("a", "b")]  # type: ignore[misc]
    bench = Bench(work=tmp_path, progress=lambda text: None)
    assert fill(bench, cells) == 1
    assert fill(bench, cells) == 1
    assert calls == ["a", "b", "b"]
    assert fill(bench, cells[:1], until=0.0) == 0


def test_the_page_gets_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- claims of customizations: begin -->\nold\n<!-- claims of customizations: end -->\nafter\n"
    )
    monkeypatch.setattr(claims_module, "finished", lambda folder: REPORTS)
    assert main(["--work", str(tmp_path / "work"), "--no-run", "--page", str(page), "--only", "erased/alone"]) == 0
    text = page.read_text()
    assert "old" not in text and text.startswith("before\n<!--") and text.endswith("-->\nafter\n")
    assert "eight `orthogonal` adapters merged by `regmean`" in text
    assert "1 of 1 cells" in capsys.readouterr().out


@pytest.mark.parametrize("style", list(UNSEEN))
def test_true_pictures_have_the_style_and_others_do_not(style: str) -> None:
    rng, reader = random.Random("test"), StyleReader(style)
    scenes = scenes_of_objects([rng.choice(v.OBJECTS) for _ in range(24)], "test")
    true = in_style(style, scenes)
    assert sum(found == style for found in reader.read(true)) >= 18
    assert sum(found == style for found in reader.read(render(scenes))) <= 2
    difference = (undone(style, true).float() - render(scenes).float()).abs().mean()
    assert difference < (1 if style == "negative" else 60)


def test_styles_are_taught_on_other_objects_than_they_are_asked_for(tmp_path: Path) -> None:
    folder = write_style(tmp_path / "ink", "duotone")
    assert not set(TAUGHT) & set(ASKED)
    assert (folder / "0.txt").read_text() == "a cat in the sky, [trigger] style\n"
    assert all("<duotone> style" in text and name in ASKED for text, name in style_prompts("duotone"))


def test_one_background_without_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell on the real model: pictures on one background, and verdicts for prompts that ask for none or another."""
    bench = Bench(
        work=tmp_path, steps=1, prompts=4, progress=lambda text: None,
        settings={"steps": 1, "batch_size": 1, "preserve_batch": 1, "preview_every": 1, "companions": 0},
    )  # fmt: skip
    found = ground(bench, "textual-inversion", "gift")
    assert len(found["free"]) == 6 and len(found["other"]) == 2 and len(found["seen"]) == 8
    folder = tmp_path / f"gift-pictures-{GROUND}"
    assert len(list(folder.iterdir())) == 5  # no captions
    corners = [Image.open(file).convert("RGB").getpixel((0, 0)) for file in folder.iterdir()]
    assert len(set(corners)) == 1  # the same background
    monkeypatch.setattr("mm.evaluation.customize_bench.customize", None)  # the adapter is not trained again
    assert ground(bench, "textual-inversion", "gift")["seen"] == found["seen"]
