"""Batch jobs: strict rows, seeds that belong to pictures, a folder that survives kills and hostile rows."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import tiny_pipeline
from typer.testing import CliRunner

import mm.cli
from mm import TextToImagePipeline
from mm.adapters.patch import Entry, Patch
from mm.adapters.tokens import token_tables
from mm.batch import read_jobs, run_jobs
from mm.batch.jobs import BadRow, Generate, Row
from mm.batch.plan import Plan, picture_seed
from mm.core.errors import UserError
from mm.core.png_settings import read_settings
from mm.engine.loading import load
from mm.pipelines.self_reader import Shortfall


def row(custom_id="a", **body):
    return {"custom_id": custom_id, "task": "generate", "body": {"prompt": "two red cats", "steps": 1, **body}}


def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


class Counting:
    """An engine of the tiny pipeline, counting pictures; raises for a word in the prompt."""

    def __init__(self, folder):
        self.engine, self.pipe, self.drawn, self.loads, self.calls = load(folder), tiny_pipeline(), 0, 0, 0
        self.run_all, self.engine.run_all = self.engine.run_all, self.counted

    def load(self, model):
        self.loads += 1
        return self.engine

    def counted(self, requests, *args, **kwargs):
        self.calls += 1
        if any("wolf" in request.prompt for request in requests):
            raise RuntimeError("out of\nmemory")
        self.drawn += len(requests)
        return self.run_all(requests, *args, **kwargs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def _pipe(folder):
    return Counting(folder)


@pytest.fixture
def counting(_pipe):
    _pipe.drawn = _pipe.loads = _pipe.calls = 0
    return _pipe


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "no JSON at column"),
        ("[1]", "a row is an object"),
        ('{"custom_id": "a", "custom_id": "b"}', '"custom_id" twice'),
        (row() | {"task": "fetch"}, 'task is "fetch"'),
        (row() | {"url": "http://x"}, 'unknown field "url"'),
        (row(prompts="x"), 'unknown field "prompts"'),
        (row(prompt=" "), "say in words"),
        (row(prompt="a\ud800"), "do not print"),
        (row(n=0), "n is 0"),
        (row(n=True), "n is true"),
        (row(seed=-1), "seed is -1"),
        (row(mode=7), "mode is 7"),
        (row(size="big"), 'size is "big"'),
        (row(size=[64]), "size is [64]"),
        (row(size=[64, -1]), "height is -1"),
        (row(lora=7), "lora is 7"),
        (row(mask="m.png"), "mask is given without image"),
        (row(strength=0.5), "strength is given without image"),
        (row(negative=[]), "negative is []"),
        (row(guidance="4"), 'guidance is "4"'),
        ('{"custom_id": "a", "task": "generate", "body": {"prompt": "x", "guidance": NaN}}', "NaN"),
        ("[" * 100_000, "nested too deeply"),
        ('{"custom_id": ' + "9" * 5000 + "}", "cannot be read"),
        *[(row(name), "custom_id is") for name in ("../x", "/etc/x", "a/b", "a\\b", "", ".hidden", "a" * 101, 7, None)],
    ],
)
def test_a_bad_row_is_told_and_stops_no_other(tmp_path, line, says):
    bad, good = read_jobs(write(tmp_path / "jobs.jsonl", line, row("good")))
    assert isinstance(bad, BadRow)
    assert "line 1: " in bad.error and says in bad.error and bad.error.isascii() and len(bad.error) < 400
    assert isinstance(good, Row) and good.line == 2


def test_ids_are_unique_and_lines_bounded(tmp_path):
    long = json.dumps(row(prompt="cat " * 400_000))
    first, second, third, fourth = read_jobs(write(tmp_path / "j", row(), "", row(), long, row("b")))
    assert isinstance(first, Row) and "line 1's" in second.error
    assert "longer than" in third.error and fourth.line == 5


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


@pytest.mark.parametrize("asked", [1, 4, 7])
def test_a_stop_leaves_whole_pictures_and_the_next_run_goes_on(tmp_path, counting, asked):
    jobs, times = write(tmp_path / "j", *(row(str(k), seed=k) for k in range(5))), iter(range(100))
    report = run_jobs(jobs, tmp_path / "out", batch_size=2, load=counting.load, stop=lambda: next(times) >= asked)
    assert report.stopped and report.drawn < 5 and not report.failed
    kept = {kind: {p.stem for p in (tmp_path / "out").rglob(f"*.{kind}")} for kind in ("png", "json")}
    assert kept["png"] == kept["json"] and len(kept["png"]) == report.drawn
    assert not list(tmp_path.rglob(".*"))
    again = run_jobs(jobs, tmp_path / "out", load=counting.load)
    assert (again.drawn, again.skipped, again.stopped) == (5 - report.drawn, report.drawn, False)


def test_rows_of_equal_settings_share_calls_and_a_limit_takes_the_first(tmp_path, counting):
    jobs = write(tmp_path / "j", row("a"), row("b", steps=2), row("c"), row("d", steps=2), "{")
    report = run_jobs(jobs, tmp_path / "out", load=counting.load, limit=4)
    assert (report.rows, report.drawn, report.failed, counting.calls) == (4, 4, 0, 2)


def test_records_say_what_pictures_lack(tmp_path, counting, monkeypatch):
    """Of two rows of equal settings, drawn until they are right: one lacks something, one cannot be checked."""

    def checker(self, asked):
        return lambda rows, _: [asked[i] and Shortfall(wrong=3, missing=(asked[i].said,)) for i in rows]

    monkeypatch.setattr(TextToImagePipeline, "_checker", checker)
    rows = [row("a", best_of=2), row("b", best_of=2, prompt="a cat in a house"), row("c")]
    run_jobs(write(tmp_path / "j", *rows), tmp_path / "out", load=counting.load)
    kept = {found["custom_id"]: found["warnings"] for found in map(read_record, (tmp_path / "out").glob("*/*.json"))}
    assert "'two red cats': the model does not see in any of 2 tries 2 cats" in kept["a"][-1] and len(kept["a"]) == 1
    assert "'a cat in a house' is not read in full" in kept["b"][-1]
    assert not kept["c"]


def read_record(path):
    return json.loads(path.read_text())


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


def test_defaults_are_the_models(tmp_path):
    """A row without steps, mode and guidance is drawn, and recorded, with those of the model."""
    plain = write(tmp_path / "j", {"custom_id": "a", "task": "generate", "body": {"prompt": "a cat"}})
    (one,) = Plan(model="mm-tiny", seed=0, root=tmp_path).pictures(next(read_jobs(plain)))
    assert {k: one.picture.settings[k] for k in ("steps", "mode", "guidance")} == {
        "steps": 12,
        "mode": "flow",
        "guidance": 5.5,
    }
    assert all(getattr(Generate(prompt="a cat"), name) is None for name in ("steps", "mode", "guidance", "size"))


def test_a_dry_run_touches_nothing(tmp_path, counting):
    report = run_jobs(write(tmp_path / "j", row("a", n=5), "{"), tmp_path / "out", dry_run=True, load=counting.load)
    assert (report.missing, report.failed, counting.loads) == (5, 1, 0)
    assert not (tmp_path / "out").exists()


REFUSED = {
    "options": (row(options={"zzz": 1}), "takes no zzz; it takes "),
    "options of numbers": (
        row(options={"temperature": "warm"}),
        "temperature is 'warm'; TextToImagePipeline takes a number",
    ),
    "words": (row(prompt="two red zzyzx", strict=True), "is refused \\(strict\\)"),
    "no words": (row(prompt="{ | }"), "the prompt is empty"),
    "weights": (row(prompt="(red:99) cats"), "the weight 99 in the prompt is too large"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_a_dry_run_finds_what_a_real_run_refuses(tmp_path, folder, which):
    refused, says = REFUSED[which]
    good = row("good", options={"temperature": 0.5}, strict=True)
    jobs = write(tmp_path / "j", refused, good)
    reports = [run_jobs(jobs, tmp_path / "out", model=str(folder), dry_run=dry) for dry in (True, False)]
    for report in reports:
        assert (report.rows, report.total, report.failed, len(report.errors)) == (2, 2, 1, 1)
        assert re.search(says, report.errors[0]) and "line 1" in report.errors[0]
    assert (reports[0].missing, reports[0].drawn, reports[1].drawn) == (1, 0, 1)
    assert reports[0].errors == reports[1].errors


def test_a_dry_run_knows_the_words_of_a_rows_adapter(tmp_path, folder):
    pipe = load(folder).pipeline
    table = token_tables(pipe)[0]
    width = pipe.trunk.words.embedding_dim
    entry = Entry(kind="rows", tensors={"ids": torch.arange(1), "rows": torch.ones(1, width)})
    tokens = [{"token": "<mug>", "tokenizer": table.tokenizer, "embedding": table.embedding, "id": 0}]
    Patch(entries={table.embedding: entry}, settings={"tokens": tokens}).save(tmp_path / "mug.safetensors")
    save_file({"emb_params": torch.ones(width)}, tmp_path / "<cup>.safetensors")
    rows = [row(f"{k}", prompt=f"two {word}", strict=True, lora=lora) for k, (word, lora) in enumerate((
        ("<mug>", "mug.safetensors"), ("<cup>", "<cup>.safetensors"), ("<mug>", ())))]  # fmt: skip
    report = run_jobs(write(tmp_path / "j", *rows), tmp_path / "out", model=str(folder), dry_run=True)
    assert (report.missing, report.failed) == (2, 1) and "line 3" in report.errors[0], report.errors
    assert run_jobs(tmp_path / "j", tmp_path / "out", model=str(folder)).errors == report.errors


def test_paths_may_be_texts(tmp_path, folder):
    save_file({"emb_params": torch.ones(load(folder).pipeline.trunk.words.embedding_dim)}, tmp_path / "a.safetensors")
    jobs, file = write(tmp_path / "j", row()), f"{tmp_path}/a.safetensors"
    report = run_jobs(str(jobs), f"{tmp_path}/out", model=folder, root=str(tmp_path), adapters=[file])
    assert report.drawn == 1, report.errors
    assert run_jobs(jobs, tmp_path / "out", model=str(folder), adapters=(Path(file), 1.0)).skipped == 1


def test_a_planted_link_does_not_lead_out(tmp_path, counting):
    (tmp_path / "out").mkdir()
    (tmp_path / "else").mkdir()
    (tmp_path / "out/00000").symlink_to(tmp_path / "else")
    with pytest.raises(UserError, match="leads out of"):
        run_jobs(write(tmp_path / "j", row()), tmp_path / "out", load=counting.load)
    assert not list((tmp_path / "else").iterdir())


def test_seeds_are_frozen(tmp_path):
    """A change here redraws everybody's runs: it is a line in CHANGELOG.md."""
    plain, seeded = read_jobs(write(tmp_path / "j", row("a", n=2), row("b", seed=7)))
    assert [picture_seed(plain, k, 0) for k in range(2)] == SEEDS
    assert picture_seed(seeded, 3, 99) == 10


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


def test_stop_is_asked_while_rows_are_read(tmp_path, counting):
    jobs = write(tmp_path / "j", *[row(f"r{k}") for k in range(50)])
    asked = []

    def stop():
        asked.append(1)
        return len(asked) > after

    for after in (10, 60):  # while reading, while looking for what is there
        asked.clear()
        report = run_jobs(jobs, tmp_path / "out", load=counting.load, dry_run=True, stop=stop)
        assert report.stopped and len(asked) == after + 1
    assert not counting.loads and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("dry", [True, False])
def test_one_signal_ends_a_run_that_reads_rows(tmp_path, kind, code, dry):
    """A dry run of many rows, and a real one that checks what is there."""
    jobs = tmp_path / "j"
    jobs.write_text("".join(json.dumps(row(f"r{k}")) + "\n" for k in range(100_000)))
    command = [sys.executable, "-m", "mm", "batch", str(jobs), "-o", str(tmp_path / "out")]
    run = subprocess.Popen(command + ["--dry-run"] * dry, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    status = Path(f"/proc/{run.pid}/status")
    while not int(status.read_text().partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1:
        time.sleep(0.05)  # until the command handles signals
    time.sleep(0.5)
    run.send_signal(kind)
    _, errors = run.communicate(timeout=300)
    assert run.returncode == code
    assert errors.strip().splitlines()[-1] == "mm: stopped; nothing is half-written, run it again to go on"
    assert not (tmp_path / "out").exists()


SEEDS = [3079850682, 441089729]


def test_exit_codes(tmp_path, counting, monkeypatch):
    monkeypatch.setattr("mm.batch.run._load", lambda model, **_: counting.engine)
    before = signal.getsignal(signal.SIGINT)
    good, mixed = write(tmp_path / "good", row()), write(tmp_path / "mixed", row(), "{")

    def code(*arguments):
        return CliRunner().invoke(mm.cli.app, ["batch", *map(str, arguments), "-o", str(tmp_path / "out")])

    done = code(good)
    assert done.exit_code == 0 and "1 drawn" in done.stdout, done.output
    done = code(mixed)
    assert done.exit_code == 2 and "mm: line 2: it is no JSON" in done.stderr and "1 there, 1 failed" in done.stdout
    assert signal.getsignal(signal.SIGINT) is before
    assert code(tmp_path / "none").exit_code == 1
    assert code(write(tmp_path / "empty")).exit_code == 1
    assert code(good, "--batch-size", 0).exit_code == 2


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
