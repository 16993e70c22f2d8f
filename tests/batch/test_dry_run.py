"""A dry run reports what the real run would refuse, and touches nothing."""

from __future__ import annotations

import os
import re

import pytest
import torch
from batch_rows import row, write
from safetensors.torch import save_file
from subject_adapters import adapter_of
from subject_pictures import WORDS
from tiny_pipelines import tiny_pipeline_of

from mm.adapters.patch import Entry, Patch
from mm.adapters.tokens import token_tables
from mm.batch import run_jobs
from mm.engine.loading import load


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


def test_rows_name_folders_of_adapters_and_what_is_no_file(tmp_path, folder):
    """A folder of diffusers is an adapter; other folders, pipes and links that lead out are their row's own failure."""
    pipe = load(folder).pipeline
    path, layer = next((n, m) for n, m in pipe.trunk.named_modules() if isinstance(m, torch.nn.Linear))
    halves = {"lora_A": torch.ones(1, layer.in_features), "lora_B": torch.ones(layer.out_features, 1)}
    jobs = tmp_path / "jobs"
    for name in ("saved", "empty", "out"):
        (jobs / name).mkdir(parents=True)
    save_file({f"{path}.{k}.weight": t for k, t in halves.items()}, jobs / "saved" / "adapter_model.safetensors")
    save_file({f"{path}.{k}.weight": t for k, t in halves.items()}, tmp_path / "secret.safetensors")
    (jobs / "out" / "adapter_model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    os.mkfifo(jobs / "pipe")
    rows = [row(name, lora=name) for name in ("saved", "empty", "out", "pipe")]
    report = run_jobs(write(jobs / "j", *rows), tmp_path / "made", model=str(folder))
    assert (report.drawn, report.failed) == (1, 3), report.errors
    says = ("no adapter in the folder", "leads out of", "no adapter file")
    assert all(text in error for text, error in zip(says, report.errors, strict=True)), report.errors


def subjects(folder, pipe):
    """Adapters of a tiny model, by file name: two with words of their own, one with the same word, one without."""
    width = pipe.trunk.words.embedding_dim
    path = next(name for name, m in pipe.trunk.named_modules() if isinstance(m, torch.nn.Linear))
    layer = pipe.trunk.get_submodule(path)
    for name, word in (("mug", "<mug>"), ("robot", "<robot>"), ("again", "<mug>"), ("style", "")):
        tensors = {"down": torch.zeros(1, layer.in_features), "up": torch.zeros(layer.out_features, 1)}
        entries = {f"trunk.{path}": Entry(kind="lowrank", tensors=tensors)}
        settings = {"name": word} if word else {}
        if name in ("mug", "robot"):
            table = token_tables(pipe)[0]
            entries[table.embedding] = Entry(
                kind="rows", tensors={"ids": torch.arange(1), "rows": torch.ones(1, width)}
            )
            token = {"token": word, "tokenizer": table.tokenizer, "embedding": table.embedding, "id": 0}
            settings |= {"tokens": [token]}
        Patch(entries=entries, name=name, settings=settings).save(folder / f"{name}.safetensors")


BOTH = ["mug.safetensors", "robot.safetensors"]
PROMPT = "a <mug> and a <robot>"
NOT_APART = {
    "a word that is not there": ({"prompt": "two red cats", "lora": BOTH}, "no adapter's word is in the prompt"),
    "no word": ({"prompt": "a cat", "lora": ["style.safetensors"]}, "words: none"),
    "no adapters": ({"prompt": "a cat"}, "words: none"),
    "a word twice": ({"prompt": "a <mug> and a <mug>", "lora": BOTH}, "<mug> is in the prompt .* more than once"),
    "one word of two": (
        {"prompt": PROMPT, "lora": ["mug.safetensors", "again.safetensors"]},
        "the adapters 'mug' and 'again' have the same word <mug>",
    ),
    "a scale of 0": (
        {"prompt": PROMPT, "lora": ["mug.safetensors:0", "robot.safetensors"]},
        "the adapter 'mug' has a scale of 0",
    ),
    "a stand-in of none": (
        {"prompt": PROMPT, "lora": BOTH, "apart": {"<cup>": "dog"}},
        "'dog' is to stand in for '<cup>', which is no word of an adapter in the prompt",
    ),
    "an option": ({"prompt": PROMPT, "lora": BOTH, "options": {"best_of": 2}}, "best_of is of no use"),
}


@pytest.mark.filterwarnings("ignore:patch .* does not say")
@pytest.mark.parametrize("which", NOT_APART)
def test_a_dry_run_finds_what_cannot_be_drawn_apart(tmp_path, folder, which):
    body, says = NOT_APART[which]
    subjects(tmp_path, load(folder).pipeline)
    jobs = write(tmp_path / "j", row(**{"apart": True} | body))
    reports = [run_jobs(jobs, tmp_path / "out", model=str(folder), dry_run=dry) for dry in (True, False)]
    assert re.search(says, reports[0].errors[0]), reports[0].errors
    assert reports[0].errors == reports[1].errors and reports[0].failed == 1


@pytest.mark.filterwarnings("ignore:patch .* does not say", "ignore:not seen in a place")
def test_a_dry_run_lets_what_can_be_drawn_apart_pass(tmp_path, folder):
    subjects(tmp_path, load(folder).pipeline)
    stands = {"<MUG>": "dog"}
    rows = [
        row("both", prompt=PROMPT, lora=BOTH, apart=stands),
        row("one", prompt="a <mug>", lora=BOTH[:1], apart=True),
    ]
    for dry in (True, False):
        report = run_jobs(write(tmp_path / "j", *rows), tmp_path / "out", model=str(folder), dry_run=dry)
        assert (report.missing, report.failed) == (2, 0), report.errors


def test_a_dry_run_knows_schedulers_that_cannot_keep_adapters_apart(tmp_path):
    """EDM's has no noise levels of the kind that the model was trained with."""
    pipe = tiny_pipeline_of("stable-diffusion")
    pipe.save_pretrained(tmp_path / "sd")
    for k, word in enumerate(WORDS):
        adapter_of(pipe, word, k).save(tmp_path / f"{k}.safetensors")
    body = {"prompt": f"a {WORDS[0]} and a {WORDS[1]}", "lora": ["0.safetensors", "1.safetensors"], "apart": True}
    rows = [row("edm", scheduler="EDMEulerScheduler", **body), row("own", **body)]
    report = run_jobs(write(tmp_path / "j", *rows), tmp_path / "out", model=str(tmp_path / "sd"), dry_run=True)
    assert (report.missing, report.failed) == (1, 1)
    assert "an EDMEulerScheduler has no noise levels" in report.errors[0]
