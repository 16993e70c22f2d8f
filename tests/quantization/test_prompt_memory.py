"""Prompts are encoded once while a pipeline is calibrated, unless a part that is quantized encodes them."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_pipeline
from tiny_pipelines import tiny_pipeline_of

import mm
from mm.quantization.prompt_memory import prompts_remembered

PROMPTS = ["a cat", "two red dogs", "a house by night", "a boat"]


def test_each_prompt_is_encoded_once() -> None:
    pipe = tiny_pipeline_of("sana-sprint")
    calls: list[int] = []
    pipe.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    report = mm.quantize(pipe, mm.SVDQuantConfig(size=32), calibration=PROMPTS, progress=False)
    assert any(row.bits == 4 for row in report.layers)
    assert len(calls) == len(PROMPTS)
    assert "encode_prompt" not in vars(pipe)


def test_what_is_kept_equals_a_new_call_and_cannot_be_changed_in_place() -> None:
    pipe = tiny_pipeline_of("stable-diffusion-xl")
    fresh = pipe.encode_prompt("a cat", device=torch.device("cpu"))
    with prompts_remembered(pipe, [pipe.unet]):
        first = pipe.encode_prompt("a cat", device=torch.device("cpu"))
        first[0].zero_()
        again = pipe.encode_prompt("a cat", device=torch.device("cpu"))
        other = pipe.encode_prompt("a dog", device=torch.device("cpu"))
    assert all(torch.equal(x, y) for x, y in zip(fresh, again, strict=True) if x is not None)
    assert not torch.equal(other[0], again[0])


@pytest.mark.parametrize("part", ["text_encoder", "unet"])
def test_a_part_that_encodes_prompts_is_run_each_time(part: str) -> None:
    pipe = tiny_pipeline_of("stable-diffusion-xl")
    calls: list[int] = []
    pipe.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    with prompts_remembered(pipe, [getattr(pipe, part)]):
        for _ in range(3):
            pipe.encode_prompt("a cat", device=torch.device("cpu"), do_classifier_free_guidance=False)
    assert len(calls) == (3 if part == "text_encoder" else 1)


def test_our_trunk_encodes_its_prompts_in_every_pass() -> None:
    pipe = tiny_pipeline()
    with prompts_remembered(pipe, [pipe.trunk]):
        pipe.encode_prompt("a cat")
        assert pipe.encode_prompt.changes is True
    assert "encode_prompt" not in vars(pipe)
