"""The cells of the erasure table: claimed once, kept one by one, resumed, and written as tables."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny import tiny_pipeline

from mm.adapters.patch import Patch
from mm.core.safe_json import read_object
from mm.evaluation import erase_cells, erase_pages, erase_table
from mm.evaluation.erase import EraseConfig
from mm.evaluation.erase_attacks import NAMES, world_attack
from mm.evaluation.erase_cells import Cell, Worker, finished, plan, tuning
from mm.world.judge import Judge

CONFIG = EraseConfig(targets=("cat",), method="uce", each=1, steps=1, options={"rank": 8})


@pytest.fixture
def parts(monkeypatch):
    made = tiny_pipeline(codes=False), Judge.from_pretrained()
    monkeypatch.setattr(erase_cells, "loaded", lambda model: made)
    return made


def cells(*names: str) -> list[Cell]:
    return [Cell(name=name, config=CONFIG, seconds=1e-3) for name in names]


def rate(hits: int, n: int) -> dict[str, float]:
    return {"score": hits / n, "n": n, "low": 0.0, "high": 1.0}


def certificate(success: int = 1, **more: object) -> dict[str, object]:
    rates = {name: rate(9, 10) for name in ("UA", "IRA", "CRA", "wording", "lookalike")}
    attack = {"success": rate(success, 4), "without": rate(0, 4)}
    return {
        "rates": rates, "base": {**rates, "IRA": rate(10, 10)}, "composition": {"change": -0.1, "n": 20},
        "attacks": {"noise": attack}, "quantized": {"int4": {"rates": rates, "base": rates}}, "seconds": {"make": 2.0},
        **more,
    }  # fmt: skip


REPORTS = {
    "attacks/uce/wolf/quick": {"concepts": {"wolf": certificate(3)}},
    "attacks/robust/wolf/quick": {"concepts": {"wolf": certificate(0)}},
    "attacks/robust/car/quick": {"concepts": {"car": certificate(1)}},
    "alone/uce/wolf": {"concepts": {"wolf": certificate()}},
    "quantized/int4": {"concepts": {"wolf": certificate()}},
    "stacked": {"concepts": {}, "undone": {"wolf": {"shown": rate(3, 4), "base": rate(4, 4), "equal": True}}},
    "never/panda": {"relearn-5": {"success": rate(1, 4)}, "relearn-20": {"success": rate(2, 4)}},
    "methods/oce/wolf": {"concepts": {"wolf": certificate()}},
    "tuning/preset/tiger": {"concepts": {"tiger": certificate()}},
}


def test_a_cell_is_made_once_and_kept(parts, tmp_path):
    Worker(tmp_path, progress=lambda text: None).run(cells("alone/uce/cat"))
    before = read_object(tmp_path / "alone--uce--cat.json")
    assert before["concepts"]["cat"]["rates"]["UA"]["n"] == 1
    assert Worker(tmp_path).run(cells("alone/uce/cat")) == 0  # another process has it
    assert set(finished(tmp_path)) == {"alone/uce/cat"}


def test_a_patch_of_several_cells_is_made_once(parts, tmp_path, monkeypatch):
    both = [replace(cell, config=replace(CONFIG, options={})) for cell in cells("one", "other")]
    Worker(tmp_path, progress=lambda text: None).run(both[:1])
    monkeypatch.setattr(erase_cells, "erase", None)
    Worker(tmp_path, progress=lambda text: None).run(both[1:])
    assert set(finished(tmp_path)) == {"one", "other"}


def test_a_cell_whose_patch_another_process_makes_comes_later(parts, tmp_path, monkeypatch):
    file = tmp_path / "uce-cat.safetensors"
    file.with_suffix(".claim").touch()  # of the other process
    made = []

    def one(self, cell):
        made.append(cell.name)
        if cell.name == "free":  # meanwhile the other process ends
            Patch(entries={}, name="cat").save(file)

    monkeypatch.setattr(Worker, "one", one)
    shared = replace(cells("waiting")[0], config=replace(CONFIG, targets=("cat",), options={}))
    free = replace(cells("free")[0], config=replace(CONFIG, targets=("dog",), options={}))
    assert Worker(tmp_path, progress=lambda text: None).run([shared, free]) == 2
    assert made == ["free", "waiting"]


def test_a_patch_that_cannot_be_made_holds_up_no_other_process(parts, tmp_path):
    bad = replace(cells("bad")[0], config=replace(CONFIG, targets=("unicorn",), options={}))
    assert Worker(tmp_path, progress=lambda text: None).run([bad, replace(bad, name="worse")]) == 2
    assert not list(tmp_path.glob("uce-unicorn*"))


def test_a_failure_is_written_and_the_next_cell_follows(parts, tmp_path):
    bad = replace(cells("bad")[0], config=replace(CONFIG, targets=("unicorn",)))
    assert Worker(tmp_path, progress=lambda text: None).run([bad, *cells("good")]) == 2
    assert "does not know 'unicorn'" in read_object(tmp_path / "bad.json")["error"]
    assert set(finished(tmp_path)) == {"good"}


def test_no_cell_begins_that_would_not_end_in_time(parts, tmp_path):
    late = replace(cells("late")[0], seconds=100.0)
    assert Worker(tmp_path, seconds=50).run([late]) == 0
    assert not list(tmp_path.glob("late*"))


@pytest.mark.parametrize("made", [plan, tuning])
def test_every_planned_cell_is_complete(made):
    found = made(0.1)
    assert len({cell.file for cell in found}) == len(found) > 10
    for cell in found:
        assert cell.config is not None or cell.name.startswith("never/")
        assert cell.config is None or set(cell.config.attacks) <= set(NAMES)
        assert cell.config is None or cell.config.split == ("tune" if made is tuning else "report")


def test_tuned_concepts_are_not_those_that_are_attacked():
    assert not set(erase_cells.TUNED_ON) & {*erase_cells.ATTACKED, *erase_cells.COMPARED}


@pytest.mark.parametrize("name", NAMES)
def test_every_attack_takes_the_number_of_its_prompts(name):
    assert name == "wording" or world_attack(name, 3).most == 3


def test_tables_pool_what_the_cells_found():
    table = erase_pages.attacks(REPORTS)
    assert "| noise | 0.750 [0.301, 0.954] (n 4) | 0.125 [0.022, 0.471] (n 8) | 0.000 / 0.000 |" in table
    assert "| relearn-20 of objects that the model never saw | 0.500 [0.150, 0.850] (n 4) | | |" in table
    assert "| wolf | 0.750 (1.000; n 4) | yes |" in erase_pages.undone(REPORTS)
    assert "-0.100 (n 20)" in erase_pages.results(REPORTS)
    assert "| int4 | 0.900 (n 10) | 0.900 (n 10) |" in erase_pages.quantized(REPORTS)
    assert "| attack: noise | 0.25 |" in erase_pages.methods(REPORTS)
    assert "| preset |" in erase_pages.variants(REPORTS)


def test_the_command_writes_the_page_from_several_folders(tmp_path, capsys):
    from mm.core.files import write_json

    for k, (name, report) in enumerate(REPORTS.items()):
        folder = tmp_path / str(k % 2)
        folder.mkdir(exist_ok=True)
        write_json(folder / f"{k}.json", report | {"cell": name})
    page = tmp_path / "page.md"
    marks = [erase_pages.MARK.format("stack", side) for side in ("begin", "end")]
    page.write_text(f"before\n{marks[0]}\nold\n{marks[1]}\nafter\n")
    given = ["--folder", str(tmp_path / "0"), "--also", str(tmp_path / "1"), "--no-run", "--page", str(page)]
    assert erase_table.main([*given, "--only", "stacked"]) == 0
    assert "1 of 1 cells" in capsys.readouterr().out
    assert page.read_text().startswith("before\n") and page.read_text().endswith("after\n")
    assert "| wolf |" in page.read_text() and "old" not in page.read_text()
    assert erase_table.main([*given, "--only", "never"]) == 1  # three of four are missing


def test_an_unfinished_run_goes_on(parts, tmp_path):
    (tmp_path / "stacked.claim").touch()
    erase_table._free(tmp_path, plan(0.1))
    assert not list(tmp_path.glob("*.claim"))
