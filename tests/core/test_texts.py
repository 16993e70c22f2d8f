"""One text where several are wanted is a list of one, and not its letters; objects of a wrong class are named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import tiny_pipeline
from tiny_public import unet

import mm
from mm.adapters.patch import Patch
from mm.batch import run_jobs
from mm.core.checks import texts
from mm.core.errors import UserError
from mm.engine.attaching import listed
from mm.evaluation.customize import CustomizeConfig
from mm.evaluation.erase import EraseConfig
from mm.families.family import Family
from mm.families.rules import at_bits, keep
from mm.families.sites import quantizable_parts
from mm.provenance.fingerprint import FingerprintConfig
from mm.quantization.folders import quantize_folder
from mm.training.tokenizer_stage import TokenizerConfig


def test_texts() -> None:
    assert texts("sites", "to_q") == ("to_q",)
    assert texts("sites", ["to_q", "to_k"]) == texts("sites", iter(("to_q", "to_k"))) == ("to_q", "to_k")
    for value, said in ((3, "sites is 3"), (None, "sites is None"), (b"ab", "sites is b'ab'"), ({"a": 1}, "sites is")):
        with pytest.raises(UserError, match=f"{said}.*; give a text, or a list of texts"):
            texts("sites", value)
    with pytest.raises(UserError, match="sites holds 3; give texts alone"):
        texts("sites", ["to_q", 3])


def _family(**more: Any) -> Family:
    return Family(name="x", pipelines={"text_to_image": "X"}, no_preview="none", **more)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (mm.SVDQuantConfig(keep="proj_out"), "keep"),
        (_family(text_sites=".*to_k"), "text_sites"),
        (_family(edit_sites=".*to_k"), "edit_sites"),
        (_family(more_pipelines="Y"), "more_pipelines"),
        (_family(model_types="y"), "model_types"),
        (EraseConfig(targets="wolf"), "targets"),
        (EraseConfig(attacks="genetic"), "attacks"),
        (EraseConfig(quantize="w4a8"), "quantize"),
        (CustomizeConfig(subjects="panda"), "subjects"),
        (FingerprintConfig(layers="up.0"), "layers"),
        (TokenizerConfig(favour="neon"), "favour"),
        (mm.SliderPrompts(positive="a red {}", negative="a blue {}", subjects="cat"), "subjects"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_text_alone_is_one_of_a_config_s_list(config: Any, name: str) -> None:
    [one] = getattr(config, name)
    assert len(one) > 1 or name in ("more_pipelines", "model_types")


def test_a_text_alone_is_one_in_calls() -> None:
    pipe = tiny_pipeline(codes=False)
    assert list(quantizable_parts(pipe, "trunk")) == ["trunk"]
    assert at_bits(8, *keep("a"), roles="qkv")[0].bits is None
    with pytest.raises(UserError, match="no linear layer of TextToImagePipeline has a path that matches to_q, so"):
        mm.erase(pipe, "cat", sites="to_q")
    assert listed("a.safetensors") == ["a.safetensors"]
    assert listed(("a.safetensors", 0.5)) == [("a.safetensors", 0.5)]
    assert listed([Path("a"), ("b", 1)]) == [Path("a"), ("b", 1)]
    with pytest.raises(UserError, match=r"an adapter is 0\.5; give a file, or \(file, scale\)"):
        listed([0.5])  # type: ignore[list-item]


PATCH = Patch(entries={})
ENGINE = SimpleNamespace(pipeline=None)
CALLS: dict[str, tuple[Any, str]] = {
    "erase a part": (lambda: mm.erase(unet(), "cat"), "a UNet2DConditionModel is one part of a pipeline"),
    "erase a name": (lambda: mm.erase("mm-tiny", "cat"), r"'mm-tiny' is no model; .* mm\.load\('mm-tiny'\)\.pipeline"),
    "erase a class": (lambda: mm.erase(mm.TextToImagePipeline, "cat"), "the class TextToImagePipeline is no model"),
    "erase an engine": (lambda: mm.erase(ENGINE, "cat"), r"a SimpleNamespace is no model; give its pipeline"),
    "quantize a name": (lambda: mm.quantize("mm-tiny"), "'mm-tiny' is no model"),
    "quantize none": (lambda: mm.quantize(None), "None is no model; give a pipeline of diffusers, or a module"),
    "quantize with a dict": (lambda: mm.quantize(unet(), {"rank": 4}), "config is a dict; give mm.SVDQuantConfig"),
    "customize none": (lambda: mm.customize(None, "x", name="<mug>"), "None is no model"),
    "customize a part": (lambda: mm.customize(unet(), "x", name="<mug>"), "one part of a pipeline, and customization"),
    "customize a number": (lambda: mm.customize(_pipe(), 3, name="<mug>"), "folder is 3; give the path"),
    "customize nameless": (lambda: mm.customize(_pipe(), "x", name=None), "name is None; give a text"),
    "customize pairs": (
        lambda: mm.customize(_pipe(), kind="slider", prompts=("a", "b")),
        "prompts is a tuple; give mm",
    ),
    "apply": (lambda: PATCH.apply(None), "None is no model"),
    "scale": (lambda: PATCH.scale("x", 1.0), "'x' is no model"),
    "undo": (lambda: PATCH.undo(3), "3 is no model"),
    "bake": (lambda: PATCH.bake(None), "None is no model"),
    "verify": (lambda: PATCH.verify(None), "None is no model"),
    "truncated": (lambda: PATCH.truncated("4"), "rank is '4'; give a whole number from 1"),
    "save": (lambda: PATCH.save(None), "the patch's file is None; give the path"),
    "load a patch": (lambda: Patch.load(3), "the patch's file is 3; give the path"),
    "read_lora nothing": (lambda: mm.read_lora(None, unet()), "the LoRA is None; give the path"),
    "read_lora for nothing": (lambda: mm.read_lora({}, None), "has no tensors|None is no model"),
    "write_lora": (lambda: mm.write_lora({}, "x"), "patch is a dict; give a patch"),
    "write_lora nowhere": (lambda: mm.write_lora(PATCH, None), "path is None; give the path"),
    "merge one": (lambda: mm.merge(PATCH), "patches is a Patch; give a list of two"),
    "merge names": (lambda: mm.merge(["a", "b"]), "a patch is 'a'; give patches"),
    "load nothing": (lambda: mm.load(None), "the model is None; give the path"),
    "from_pretrained": (lambda: mm.TextToImagePipeline.from_pretrained(None), "the model is None; give"),
    "load_nunchaku": (lambda: mm.load_nunchaku(None), "the Nunchaku file is None; give the path"),
    "quantize_folder": (lambda: quantize_folder("x", None, None), "the folder of the copy is None; give the path"),
    "run_jobs": (lambda: run_jobs("x", None), "the folder of results is None; give the path"),
    "load with adapters by name": (lambda: mm.load("mm-tiny", adapters={"a": 0.5}), "the adapters are .* give a list"),  # type: ignore
    "run_jobs with an adapter": (lambda: run_jobs("x", "y", adapters="none"), "there is no adapter file none"),
    "read_nunchaku": (lambda: mm.read_nunchaku("x", None), "model is None; give the model of diffusers"),
    "config rank": (lambda: mm.SVDQuantConfig(rank="32"), "rank is '32'; give a whole number"),
    "config keep": (lambda: mm.SVDQuantConfig(keep="a("), r"keep holds 'a\(', which is no regular expression"),
    "slider": (lambda: mm.SliderPrompts(positive=None, negative="a"), "positive is None; give a text"),  # type: ignore
}


def _pipe() -> Any:
    return tiny_pipeline(codes=False)


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_object_is_one_clear_line(name: str) -> None:
    call, said = CALLS[name]
    with pytest.raises(UserError, match=said):
        call()
