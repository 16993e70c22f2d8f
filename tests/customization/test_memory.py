"""What makes large models trainable: prompts are encoded once, and blocks are computed again for the gradient."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from subject_pictures import subject_folder
from tiny_pipelines import SIDE, tiny_pipeline_of

from mm.core.errors import UserError
from mm.customization.customize import customize
from mm.customization.estimate import Estimate
from mm.customization.objectives.protocol import objective_of
from mm.customization.sliders import SliderPrompts
from mm.layers.checkpointing import Inputs, checkpointed, is_wanted

FAMILIES = (
    "stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3", "flux", "qwen-image", "sana", "z-image",
)  # fmt: skip
FAST: dict[str, Any] = {
    "steps": 3, "batch_size": 2, "size": SIDE, "preview_every": 3, "learning_rate": 1e-2, "rank": 4, "samples": (),
}  # fmt: skip
PROMPTS = ["a red fox", "a photo of a very small dog on the green grass", "", "a red fox"]


@contextmanager
def counted(pipe: Any) -> Iterator[list[Any]]:
    """The prompts that the pipeline encodes within the context."""
    calls: list[Any] = []
    before = pipe.encode_prompt

    def encode(*args: Any, **kwargs: Any) -> Any:
        calls.append(list(kwargs.get("prompt", args[0] if args else ())))  # a copy: Z-Image's changes its list
        return before(*args, **kwargs)

    pipe.encode_prompt = encode
    try:
        yield calls
    finally:
        del pipe.encode_prompt


@pytest.mark.parametrize("name", FAMILIES)
def test_remembered_prompts_are_read_as_a_batch_of_them_is(name: str) -> None:
    pipe = tiny_pipeline_of(name)
    objective = objective_of(pipe, SIDE)
    noise = torch.randn(1, *objective.encode_pictures(torch.zeros(1, 3, SIDE, SIDE)).shape[1:])
    noisy, level = noise.expand(4, *noise.shape[1:]), objective.fixed_levels(4)
    with torch.no_grad():
        wanted = objective.predict(noisy, level, objective.encode_prompts(PROMPTS))
        with objective.remembering(), counted(pipe) as calls:
            for _ in range(2):
                given = objective.predict(noisy, level, objective.conditions(PROMPTS))
    assert calls == [[prompt] for prompt in PROMPTS[:3]]
    assert torch.allclose(given, wanted, atol=1e-4 * float(wanted.abs().max()))
    assert not objective.remembers


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_encodes_each_prompt_once(name: str, tmp_path: Path) -> None:
    folder = subject_folder(tmp_path / "data")
    pipe = tiny_pipeline_of(name)
    with counted(pipe) as calls:
        customize(pipe, folder, name="sks thing", **FAST | {"steps": 9})
    texts = [tuple(call) for call in calls]
    assert texts and len(texts) == len(set(texts))


def test_where_a_word_is_learned_prompts_are_encoded_at_each_step(tmp_path: Path) -> None:
    folder = subject_folder(tmp_path / "data")
    pipe = tiny_pipeline_of("stable-diffusion")
    chosen = {k: v for k, v in FAST.items() if k not in ("rank", "learning_rate")}
    with counted(pipe) as calls:
        customize(pipe, folder, name="<sks>", method="textual-inversion", **chosen | {"steps": 9})
    assert len(calls) >= 9


def test_edits_are_remembered_with_their_sources(tmp_path: Path) -> None:
    pipe = tiny_pipeline_of("qwen-image-edit")
    objective = objective_of(pipe, SIDE, edit=True)
    pictures = torch.stack([torch.full((3, SIDE, SIDE), value) for value in (-0.5, 0.7)])
    words = ["make it red", "make it red"]
    with torch.no_grad():
        latents = objective.encode_pictures(pictures)
        noisy, level = torch.randn(latents.shape), objective.fixed_levels(2)
        wanted = objective.predict(noisy, level, objective.encode_edits(words, pictures, latents))
        with objective.remembering(), counted(pipe) as calls:
            for order in ([0, 1], [1, 0]):
                given = objective.predict(
                    noisy[order], level[order], objective.edit_conditions(words, pictures[order], latents[order], order)
                )
    assert len(calls) == 2
    assert torch.allclose(given[[1, 0]], wanted, atol=1e-4 * float(wanted.abs().max()))


def _learned(pipe: Any, folder: Path | None, **more: Any) -> tuple[Any, Estimate]:
    made: list[Estimate] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch = customize(pipe, folder, estimated=made.append, **FAST | more)
    return patch, made[0]


def _same(one: Any, other: Any, place: Path) -> None:
    one.save(place / "one.safetensors")
    other.save(place / "other.safetensors")
    first, second = load_file(place / "one.safetensors"), load_file(place / "other.safetensors")
    assert set(first) == set(second) and first
    for key, value in first.items():
        assert torch.allclose(value.float(), second[key].float(), atol=1e-3), key


@pytest.mark.parametrize("name", (*FAMILIES, "mm-tiny"))
def test_blocks_that_are_computed_again_learn_the_same_in_less_memory(name: str, tmp_path: Path) -> None:
    folder = subject_folder(tmp_path / "data")
    pipe = _mm_tiny() if name == "mm-tiny" else tiny_pipeline_of(name)
    size = {"size": 128, "companions": 0} if name == "mm-tiny" else {}
    word = "<sks>" if name == "mm-tiny" else "sks thing"
    plain, kept = _learned(pipe, folder, name=word, checkpointing=False, **size)
    again, less = _learned(pipe, folder, name=word, checkpointing=True, **size)
    _same(plain, again, tmp_path)
    assert less.memory < kept.memory
    assert not any(getattr(m, "gradient_checkpointing", False) for m in objective_of(pipe).modules().values())


def _mm_tiny() -> Any:
    import mm

    pipe = mm.TextToImagePipeline.from_pretrained("mm-tiny")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_slider_is_computed_again_at_its_own_scale(tmp_path: Path) -> None:
    pipe = tiny_pipeline_of("flux")
    prompts = SliderPrompts(positive="a red {}", negative="a blue {}", subjects=("cat", "dog"))
    given = {"kind": "slider", "prompts": prompts, "slider_pictures": 2, "sample_steps": 2}
    plain, again = (_learned(pipe, None, checkpointing=way, **given)[0] for way in (False, True))
    _same(plain, again, tmp_path)


def test_large_models_are_computed_again_and_what_was_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline_of("flux")
    denoisers = [pipe.transformer]
    assert not is_wanted(denoisers, None)
    monkeypatch.setattr("mm.layers.checkpointing.LARGE", 10)
    assert is_wanted(denoisers, None) and not is_wanted(denoisers, False)
    pipe.transformer.enable_gradient_checkpointing()
    with checkpointed(denoisers) as inputs:
        assert isinstance(inputs, Inputs)
    assert pipe.transformer.is_gradient_checkpointing
    monkeypatch.setattr(type(pipe.transformer), "_supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match=r"FluxTransformer2DModel cannot compute its blocks again"):
        is_wanted(denoisers, True)


def test_a_setting_of_another_kind_is_refused(tmp_path: Path) -> None:
    pipe = tiny_pipeline_of("flux")
    with pytest.raises(UserError, match=r"checkpointing is 'on'; give True, False or None"):
        customize(pipe, subject_folder(tmp_path), name="sks", **FAST, checkpointing="on")
