"""The certificate of an erasure: rates by hand, what is restored and kept, probes, the grid, and the command."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from PIL import Image
from tiny import draw, tiny_pipeline
from typer.testing import CliRunner

import mm
from mm.adapters import Patch
from mm.cli.evaluate import app
from mm.core.errors import UserError
from mm.erasure.certificate import harmonic, rates_of
from mm.erasure.concepts import parse
from mm.erasure.probes import Probe, plain_probes
from mm.evaluation.erase import EraseConfig, evaluate_erase, same_bits
from mm.evaluation.quantizers import quantizer
from mm.models.text import unknown_words
from mm.world.concept_labels import label_judge
from mm.world.concept_probes import world_probes
from mm.world.concepts import WorldContexts, holds
from mm.world.judge import Judge


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def patch(pipe):
    return mm.erase(pipe, ["cat"], anchors="dog", method="uce")


def seen(*labels: str) -> frozenset[str]:
    return frozenset(labels)


def test_rates_by_hand():
    probes = [
        Probe(prompt="a", role="target", concept="cat", cross="neon"),
        Probe(prompt="b", role="target", concept="cat", cross="neon"),
        Probe(prompt="c", role="target", concept="cat"),
        Probe(prompt="d", role="retained", concept="dog", cross="neon"),
        Probe(prompt="e", role="retained", concept="dog", cross="sepia"),
        Probe(prompt="f", role="wording", concept="cat"),
        Probe(prompt="g", role="lookalike", concept="tiger"),
    ]
    labels = [seen("dog"), seen("cat", "neon"), None, seen("dog"), seen("sepia"), seen(), None]
    rates = {name: (rate["score"], rate["n"]) for name, rate in rates_of(probes, labels).items()}
    assert rates == {
        "UA": (pytest.approx(1 / 3, abs=1e-4), 3),  # the unreadable picture is no success
        "IRA": (0.5, 2),
        "CRA": (0.5, 2),
        "wording": (1.0, 1),
        "lookalike": (0.0, 1),
        "target cross": (0.5, 2),
        "invalid": (pytest.approx(2 / 7, abs=1e-4), 7),
    }
    assert harmonic([1.0, 0.5]) == pytest.approx(2 / 3)
    assert harmonic([1.0, None]) == 0.0


@pytest.mark.parametrize("applied", [False, True])
def test_a_measurement_leaves_the_model_as_it_came(pipe, patch, applied, tmp_path):
    """Judged by a fixed rule, so that base and patched pictures get different labels."""
    base = draw(pipe)
    if applied:
        patch.apply(pipe, 0.5)
    before, calls = draw(pipe), []

    def judge(pictures):
        calls.append(len(pictures))
        return [seen("cat", "cartoon") for _ in pictures]

    found = patch.verify(pipe, judge=judge, each=2, num_inference_steps=1, attacks=["wording"], pictures=False)
    assert torch.equal(draw(pipe), before)
    assert found.rates["UA"]["score"] == 0.0
    assert found.base["UA"]["n"] == found.rates["UA"]["n"] == 2
    assert found.attacks["wording"]["success"]["score"] == 1.0
    assert patch.report["certificate"] == found.to_dict()
    assert "wording" in found.card()
    patch.save(tmp_path / "p.safetensors")
    assert Patch.load(tmp_path / "p.safetensors").report["certificate"] == json.loads(json.dumps(found.to_dict()))
    if applied:
        patch.undo(pipe)
    assert torch.equal(draw(pipe), base)


def test_a_judge_that_fails_leaves_the_model_as_it_came(pipe, patch):
    before = draw(pipe)

    def judge(pictures):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        patch.verify(pipe, judge=judge, each=1, num_inference_steps=1)
    assert torch.equal(draw(pipe), before)


def test_quantized_copies_are_measured_and_the_model_is_not_changed(pipe, patch):
    before, got = draw(pipe), []

    def halve(copy):
        got.append(copy)
        for parameter in copy.trunk.parameters():
            parameter.data = parameter.data.bfloat16().float()

    judge = lambda pictures: [seen("cat") for _ in pictures]  # noqa: E731
    found = patch.verify(pipe, judge=judge, each=1, num_inference_steps=1, quantization={"bf16": halve}, pictures=False)
    assert got[0] is not pipe
    assert set(found.quantized["bf16"]) == {"base", "rates", "baked"}
    assert found.quantized["bf16"]["rates"]["UA"]["score"] == 0.0
    assert torch.equal(draw(pipe), before)


def test_a_patch_that_does_not_say_what_it_erases(pipe):
    patch = Patch(entries={}, name="p")
    with pytest.raises(UserError, match="does not say what it erases"):
        patch.verify(pipe, judge=lambda pictures: [None for _ in pictures])


@pytest.mark.parametrize("target", ["cat", "style: neon", "attribute: red", "attribute: red of car", "snow"])
def test_probes_for_tuning_and_reporting_are_apart(target):
    concept = parse(target)
    tune, report = (world_probes([concept], [], split=split, each=16) for split in ("tune", "report"))
    made = {p for p, _ in WorldContexts().pairs(concept, WorldContexts().known()[1])}
    asked = {p.prompt for p in report if p.role in ("target", "wording")}
    worded = {p.prompt for p in report if p.role == "wording"}
    assert not worded & ({p.prompt for p in tune} | made)
    assert len(asked & {p.prompt for p in tune}) < 0.4 * len(asked)  # single objects cannot be kept out
    for probe in (*tune, *report):
        assert not unknown_words(probe.prompt), probe
        if probe.role in ("retained", "lookalike"):
            assert not holds(probe.prompt, concept.name) or concept.of, probe
    assert sum(p.role == "target" for p in report) == 16
    assert sum(p.role == "retained" for p in report) == 32


def test_probes_of_plain_english():
    probes = plain_probes([parse("wolf"), parse("style: cubism")], ["dog", "fox"], each=4)
    assert {p.role for p in probes} == {"target", "wording", "lookalike", "retained"}
    tune = plain_probes([parse("wolf")], ["dog"], split="tune")
    assert not {p.prompt for p in tune} & {p.prompt for p in probes}


def test_unreadable_pictures_have_no_labels():
    noise = Image.fromarray(torch.randint(0, 256, (128, 128, 3), dtype=torch.uint8).numpy())
    assert label_judge()([noise]) == [None]


@pytest.mark.parametrize("how", ["alone", "together", "stacked"])
def test_an_evaluation_reports_and_restores(pipe, how, tmp_path):
    before = draw(pipe)
    config = EraseConfig(targets=("cat", "style: neon"), how=how, method="uce", each=2, steps=1, composition=0)
    report = evaluate_erase(pipe, Judge.from_pretrained(), config, json_file=tmp_path / "r.json")
    assert torch.equal(draw(pipe), before)
    together = {"cat, style: neon"}
    assert set(report["concepts"]) == {"alone": {"cat", "style: neon"}, "together": together}.get(how, {"cat", "neon"})
    assert json.loads((tmp_path / "r.json").read_text())["tasks"]["UA"]["n"] == report["tasks"]["UA"]["n"] > 0
    assert Image.open(tmp_path / "r.png").size[0] > 0
    assert {"overall", "ceiling", "n", "tasks", "settings"} <= set(report)
    if how == "stacked":
        assert {name: found["equal"] for name, found in report["undone"].items()} == {"cat": True, "neon": True}
        assert report["undone"]["cat"]["shown"] == report["undone"]["cat"]["base"]
        assert report["undone"]["cat"]["base"]["n"] == 2


def test_the_bits_of_a_stack_are_compared(pipe, patch):
    one = copy.deepcopy(pipe)
    assert same_bits(one, pipe)
    patch.apply(one)
    assert not same_bits(one, pipe)
    patch.undo(one)
    assert same_bits(one, pipe)
    one.trunk.words.weight.data[0, 0] += 1e-6
    assert not same_bits(one, pipe)


def test_the_command_measures_a_patch_file(pipe, patch, tmp_path):
    file = tmp_path / "no-cat.safetensors"
    pipe.save_pretrained(tmp_path / "model")
    Patch(**{**patch.__dict__, "report": {**patch.report, "certificate": {}}}).save(file)
    arguments = ["erase", "--model", str(tmp_path / "model"), "--patch", str(file), "--limit", "1", "--steps", "1"]
    result = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "r.json")])
    assert result.exit_code == 0, result.output
    assert "cat: UA" in result.output
    assert Patch.load(file).report["certificate"]["targets"] == ["cat"]
    with pytest.raises(UserError, match="exclude each other"):
        CliRunner().invoke(app, [*arguments, "wolf"], catch_exceptions=False)
    with pytest.raises(UserError, match="give name=value"):
        CliRunner().invoke(app, ["erase", "cat", "--setting", "rank"], catch_exceptions=False)


@pytest.mark.parametrize("method", ["oce", "salun"])
def test_a_method_whose_changes_no_quantized_layer_takes_is_truncated_there(method, capsys):
    pipe = tiny_pipeline(codes=False)
    steps = {"steps": 1} if method == "salun" else {}
    patch = mm.erase(pipe, ["cat"], method=method, **steps)
    judge = lambda pictures: [seen("cat") for _ in pictures]  # noqa: E731
    found = patch.verify(
        pipe, judge=judge, each=1, num_inference_steps=1, pictures=False, quantization={"int4": quantizer("int4")}
    )
    cut = found.quantized["int4"]["truncated"]
    assert cut["rank"] == 32 and 0 <= cut["lost"] < 1
    assert f"truncated to rank 32, {cut['lost']:.1%} lost" in found.card()
    assert "baked" in found.quantized["int4"]
