"""The folder of results: it survives kills, damaged records and hostile rows."""

from __future__ import annotations

import json

import pytest
from batch_rows import row, write
from tiny import tiny_pipeline

from mm.batch import read_jobs, run_jobs
from mm.batch.plan import picture_seed
from mm.core.errors import UserError
from mm.core.png_settings import read_settings


def test_pictures_records_and_manifest(tmp_path, counting):
    jobs = write(tmp_path / "j", row("a", n=2, seed=7), "{", row("b", prompt="two red catz"))
    report = run_jobs(jobs, tmp_path / "out", load=counting.load)
    assert (report.rows, report.drawn, report.skipped, report.failed) == (3, 3, 0, 1)
    shard = tmp_path / "out/00000"
    seed = picture_seed(list(read_jobs(jobs))[2], 0, 0)
    names = ["000000001-a-0-s7", "000000001-a-1-s8", f"000000003-b-0-s{seed}"]
    assert sorted(p.name for p in shard.iterdir()) == sorted(
        [f"{n}{e}" for n in names for e in (".png", ".json")] + ["manifest.jsonl"]
    )
    record = json.loads((shard / f"{names[2]}.json").read_text())
    assert record["status"] == "done" and "catz" in record["warnings"][0]
    assert read_settings(shard / f"{names[0]}.png")["prompt"] == "two red cats"
    manifest = [json.loads(line) for line in (shard / "manifest.jsonl").read_text().splitlines()]
    assert [(m["line"], m["status"]) for m in manifest] == [(1, "done"), (1, "done"), (2, "failed"), (3, "done")]


def test_running_again_draws_only_what_is_missing_or_changed(tmp_path, counting):
    jobs, out = write(tmp_path / "j", row("a", n=3), row("b")), tmp_path / "out"
    run_jobs(jobs, out, load=counting.load)
    assert run_jobs(jobs, out, load=counting.load).skipped == 4 and counting.loads == 1
    damaged, gone = sorted((out / "00000").glob("*-a-*.png"))[:2]
    damaged.write_bytes(b"half")
    gone.unlink()
    write(jobs, row("new"), row("a", n=3), row("b", prompt="a dog"))  # moved, and one changed
    report = run_jobs(jobs, out, load=counting.load)
    assert (report.drawn, report.skipped) == (4, 1)
    assert run_jobs(jobs, out, load=counting.load).drawn == 0


def test_damaged_records_are_drawn_again(tmp_path, counting):
    jobs, out = write(tmp_path / "j", row("a")), tmp_path / "out"
    run_jobs(jobs, out, load=counting.load)
    (record,) = out.rglob("*.json")
    whole, manifest = json.loads(record.read_text()), next(out.rglob("manifest.jsonl"))
    texts = ["", "[]", "null", "{", json.dumps(whole)[:99], "[" * 9000]
    texts += [json.dumps({k: v for k, v in whole.items() if k != key}) for key in whole]
    keys = ("custom_id", "index", "line", "status", "sha256")
    texts += [json.dumps(whole | {key: value}) for key in keys for value in ({"x": 1}, ["x"], None, -3)]
    for text in texts:
        record.write_text(text)
        manifest.write_bytes(b"\xff[")
        assert run_jobs(jobs, out, load=counting.load).drawn == 1, text
        assert json.loads(record.read_text()) == whole
        assert json.loads(manifest.read_text()) == whole


def test_other_weights_under_the_same_name_draw_anew(tmp_path, counting):
    jobs, model = write(tmp_path / "j", row()), tmp_path / "model"
    counting.pipe.save_pretrained(model)
    assert run_jobs(jobs, tmp_path / "out", model=str(model), load=counting.load).drawn == 1
    assert run_jobs(jobs, tmp_path / "out", model=str(model), load=counting.load).skipped == 1
    tiny_pipeline(seed=1).save_pretrained(model)
    assert run_jobs(jobs, tmp_path / "out", model=str(model), load=counting.load).drawn == 1


def test_a_mended_file_leaves_no_old_failure_in_the_manifest(tmp_path, counting):
    jobs = write(tmp_path / "j", *[""] * 1000, "{")
    run_jobs(jobs, tmp_path / "out", load=counting.load)
    assert "line 1001" in (tmp_path / "out/00001/manifest.jsonl").read_text()
    run_jobs(write(jobs, row()), tmp_path / "out", load=counting.load)
    assert (tmp_path / "out/00001/manifest.jsonl").read_text() == ""


def test_a_planted_link_does_not_lead_out(tmp_path, counting):
    (tmp_path / "out").mkdir()
    (tmp_path / "else").mkdir()
    (tmp_path / "out/00000").symlink_to(tmp_path / "else")
    with pytest.raises(UserError, match="leads out of"):
        run_jobs(write(tmp_path / "j", row()), tmp_path / "out", load=counting.load)
    assert not list((tmp_path / "else").iterdir())


def test_pictures_whose_seeds_collide_are_both_kept(tmp_path, counting, monkeypatch):
    monkeypatch.setattr("mm.batch.plan.picture_seed", lambda row, index, run_seed: 7)
    jobs, out = write(tmp_path / "j", row("a", n=3)), tmp_path / "out"
    assert run_jobs(jobs, out, load=counting.load).drawn == 3
    assert sorted(p.name for p in (out / "00000").glob("*.png")) == [f"000000001-a-{k}-s7.png" for k in range(3)]
    again = run_jobs(jobs, out, load=counting.load)
    assert (again.drawn, again.skipped) == (0, 3)


def test_a_folder_with_the_names_of_before_goes_on(tmp_path, counting):
    """Names had no number in the row: `LINE-ID-sSEED`."""
    jobs, out = write(tmp_path / "j", row("a", n=2, seed=7), row("b", prompt="two red cats on grass")), tmp_path / "out"
    run_jobs(jobs, out, load=counting.load)
    for path in list((out / "00000").glob("0*")):
        line, name, _, seed = path.name.split("-")
        path.rename(path.with_name(f"{line}-{name}-{seed}"))
    again = run_jobs(jobs, out, load=counting.load)
    assert (again.drawn, again.skipped) == (0, 3)
    (record,) = (out / "00000").glob("000000002-b-s*.json")
    values = json.loads(record.read_text())
    record.write_text(json.dumps(values | {"status": "failed", "error": "no memory", "file": None, "sha256": None}))
    assert run_jobs(jobs, out, load=counting.load, retry_failed=True).drawn == 1
    lines = (out / "00000/manifest.jsonl").read_text().splitlines()
    assert [json.loads(line)["status"] for line in lines] == ["done"] * 3 and not record.exists()
