"""Rows as pictures: calls that they share, failures, warnings."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from batch_rows import row, write
from PIL import Image
from safetensors.torch import save_file

from mm import TextToImagePipeline
from mm.batch import run_jobs
from mm.core.png_settings import read_settings
from mm.engine.loading import load
from mm.pipelines.self_reader import Shortfall


def test_a_picture_is_the_same_in_any_batch(tmp_path, counting):
    rows = [row("a", n=3), row("b", seed=5), row("c", mode="codes", steps=2)]
    for size, order in ((1, rows), (8, rows[::-1])):
        run_jobs(write(tmp_path / "j", *order), tmp_path / str(size), batch_size=size, load=counting.load)
    for path in (tmp_path / "1").rglob("*.png"):
        (other,) = (tmp_path / "8").rglob("*-" + path.name.split("-", 1)[1])
        a, b = (torch.tensor(list(Image.open(p).tobytes())) for p in (path, other))
        assert (a - b).abs().max() <= 2
    (alone,) = (tmp_path / "1").rglob("*-b-*.png")
    direct = counting.pipe("two red cats", num_inference_steps=1, generator=torch.Generator().manual_seed(5)).images[0]
    assert direct.tobytes() == Image.open(alone).tobytes()


def test_a_failure_costs_only_itself_and_waits_for_retry(tmp_path, counting):
    jobs = write(tmp_path / "j", row("a"), row("b", prompt="a wolf"), row("c"), row("d", prompt="cat " * 80))
    report = run_jobs(jobs, tmp_path / "out", load=counting.load)
    assert (report.drawn, report.failed) == (3, 1)
    assert "line 2, b, picture 0: RuntimeError: out of memory" in report.errors
    calls = counting.calls
    assert run_jobs(jobs, tmp_path / "out", load=counting.load).failed == 1 and counting.calls == calls
    report = run_jobs(jobs, tmp_path / "out", load=counting.load, retry_failed=True)
    assert (report.missing, report.failed, counting.calls) == (1, 1, calls + 1)


def test_rows_of_equal_settings_share_calls_and_a_limit_takes_the_first(tmp_path, counting):
    jobs = write(tmp_path / "j", row("a"), row("b", steps=2), row("c"), row("d", steps=2), "{")
    report = run_jobs(jobs, tmp_path / "out", load=counting.load, limit=4)
    assert (report.rows, report.drawn, report.failed, counting.calls) == (4, 4, 0, 2)


def test_records_say_what_pictures_lack(tmp_path, counting, monkeypatch):
    """Of rows of equal settings, drawn until they are right: some lack something, others cannot be checked."""

    def checker(self, asked):
        return lambda rows, _: [asked[i] and Shortfall(wrong=3, missing=(asked[i].said,)) for i in rows]

    monkeypatch.setattr(TextToImagePipeline, "_checker", checker)
    monkeypatch.setattr(TextToImagePipeline, "_can_read", lambda self: True)
    less = {"mode": "codes", "fast": {"steps": 2, "unchecked_steps": 3, "tries": 2}, "steps": None}
    rows = [row("a", best_of=2), row("b", best_of=2, prompt="a cat in a house"), row("c")]
    rows += [row("d", **less), row("e", **less | {"prompt": "a cat in a house"}), row("f", **less)]
    run_jobs(write(tmp_path / "j", *rows), tmp_path / "out", load=counting.load)
    kept = {found["custom_id"]: found["warnings"] for found in map(read_record, (tmp_path / "out").glob("*/*.json"))}
    assert "'two red cats': the model does not see in any of 2 tries 2 cats" in kept["a"][-1] and len(kept["a"]) == 1
    assert "'a cat in a house' is not read in full" in kept["b"][-1]
    assert not kept["c"] and "best_of" not in str(kept["e"])  # `fast` alone asks for no check
    assert all("in any of 2 tries 2 cats (seed" in kept[one][-1] and len(kept[one]) == 1 for one in "df")
    steps = {file.name.split("-")[1]: read_settings(file)["steps"] for file in (tmp_path / "out").glob("*/*.png")}
    assert steps == {"a": 1, "b": 1, "c": 1, "d": 2, "e": 3, "f": 2}


def read_record(path):
    return json.loads(path.read_text())


def test_paths_may_be_texts(tmp_path, folder):
    save_file({"emb_params": torch.ones(load(folder).pipeline.trunk.words.embedding_dim)}, tmp_path / "a.safetensors")
    jobs, file = write(tmp_path / "j", row()), f"{tmp_path}/a.safetensors"
    report = run_jobs(str(jobs), f"{tmp_path}/out", model=folder, root=str(tmp_path), adapters=[file])
    assert report.drawn == 1, report.errors
    assert run_jobs(jobs, tmp_path / "out", model=str(folder), adapters=(Path(file), 1.0)).skipped == 1


def test_loading_shows_no_bars_of_the_libraries(monkeypatch):
    import diffusers
    import transformers

    from mm.batch.run import _load

    logs = (diffusers.utils.logging, transformers.utils.logging)
    for one in logs:
        one.enable_progress_bar()
    found = []
    monkeypatch.setattr(
        "mm.engine.loading.load", lambda *_, **__: found.extend(x.is_progress_bar_enabled() for x in logs)
    )
    try:
        _load("mm-tiny", bases={})
        assert found == [False, False]
    finally:
        for one in logs:
            one.enable_progress_bar()
