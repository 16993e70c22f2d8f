"""What `mm.customize` and `mm.quantize` refuse before any work: sizes, words, ranks and settings; merges likewise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from subject_pictures import subject_folder
from tiny import tiny_pipeline
from tiny_pipelines import SIDE, tiny_pipeline_of

import mm
from mm.adapters.entry import Entry
from mm.adapters.patch import Patch
from mm.core.errors import UserError
from mm.customization.checks import check_name, warn_of_captions
from mm.customization.customize import customize
from mm.customization.merging.merge import merge
from mm.customization.objectives.protocol import objective_of
from mm.customization.sliders import SliderPrompts
from mm.engine.prompts import expand, weighted


@pytest.fixture(scope="module")
def ours() -> Any:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return subject_folder(tmp_path_factory.mktemp("photos") / "p", 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 64}, "size is 64 x 64; TextToImagePipeline draws 128 x 128 only"),
        ({"size": 4}, "size is 4 x 4"),
        ({"noun": "xyzzy"}, "noun is \"xyzzy\": the model does not know the word 'xyzzy'"),
        ({"noun": "kitty"}, "does not know the word 'kitty', and knows cat"),
        ({"guard": ["a wolf", "a xyzzy"]}, 'guard is "a xyzzy"'),
        ({"preserved": ["a xyzzy"]}, 'preserved is "a xyzzy"'),
        ({"samples": ["a <mug>", " "]}, "a sample prompt is empty"),
        ({"samples": ["a <mug> on a xyzzy"]}, 'the sample prompt "a <mug> on a xyzzy" is not understood'),
        ({"rank": 100_000}, "rank is 100000, and no layer that is trained has more than 128 inputs"),
        ({"rank": "8"}, "rank is '8'"),
        ({"rank": True}, "rank is True"),
        ({"layers": 3}, "layers is 3"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"learning_rate": "high"}, "learning_rate is 'high'"),
        ({"companions": 2.5}, "companions is 2.5"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_it_is_refused_before_work(
    given: dict[str, Any], message: str, ours: Any, photos: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    with pytest.raises(UserError) as error:
        customize(ours, photos, name="<mug>", work=work, **{"steps": 1, **given})
    assert message in str(error.value)
    assert not work.exists()


ODD = (
    "!!!",
    ",",
    "<>",
    "_",
    "a\tb",
    "\x1b[31m",
    "a\u200bb",
    "(mug)",
    "[trigger]",
    "{mug}",
    "a|b",
    "__mug__",
    "mug+",
    "my mug--",
)
FINE = ("sks", "<mug>", "My Mug", "it's", "snow-man", "a/b", "\u732b", "\u2615", "m\u00e4g", "sks_dog", "mug 2.0")


@pytest.mark.parametrize("name", [*ODD, *FINE])
def test_a_name_is_read_in_prompts_as_it_is(name: str) -> None:
    """Prompts have weights, alternatives and wildcards: what was learned under such a name would never be asked for."""
    objective = objective_of(tiny_pipeline_of("stable-diffusion-xl"))
    if name in ODD:
        with pytest.raises(UserError, match="the name "):
            check_name(name, objective)
        return
    check_name(name, objective)
    prompt = f"a {name}, on grass"
    assert expand(prompt, 0) == prompt and weighted(prompt) == [(prompt, 1.0)]


@pytest.mark.parametrize("noun", [" ", "a\nb", "(mug:1.2)", "!"])
def test_a_class_that_prompts_do_not_read(noun: str, ours: Any, photos: Path) -> None:
    with pytest.raises(UserError, match="noun"):
        customize(ours, photos, name="<mug>", noun=noun, steps=1)


def test_a_run_does_not_work_among_the_pictures(ours: Any, tmp_path: Path) -> None:
    """Its plot would be learned when the run goes on, or with the next one."""
    photos = subject_folder(tmp_path / "p", 2)
    for work in (photos, photos / "10_mug.work", tmp_path / "p" / ".." / "p"):
        with pytest.raises(UserError, match="the run's own would be among them; give another folder"):
            customize(ours, photos, name="<mug>", steps=1, work=work)
    with pytest.raises(UserError, match=r"regularization is .*, the folder of what is learned"):
        customize(ours, photos, name="<mug>", noun="cat", regularization=tmp_path / "p" / "." / "", steps=1)
    assert sorted(path.name for path in photos.iterdir()) == ["0.png", "0.txt", "1.png", "1.txt"]


def test_a_slider_and_a_file_for_a_folder(ours: Any, photos: Path, tmp_path: Path) -> None:
    prompts = SliderPrompts(positive="a big xyzzy", negative="a small xyzzy")
    with pytest.raises(UserError, match=r"the slider's prompt is .* does not know the word 'xyzzy'"):
        customize(ours, kind="slider", prompts=prompts, steps=1)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file is a file"):
        customize(ours, photos, name="<mug>", work=tmp_path / "file" / "work", steps=1)


def test_unknown_words_of_captions_are_named_once(ours: Any) -> None:
    with pytest.warns(UserWarning, match=r"captions: .*'xyzzy'.*1 more word like it") as found:
        warn_of_captions(objective_of(ours), "<mug>", ["a <mug> on a xyzzy and a plugh", "a <mug> on a xyzzy"])
    assert len(found) == 1


@pytest.mark.parametrize(("family", "size"), [("stable-diffusion", 36), ("flux", 40), ("sana", 48)])
def test_sizes_of_public_families(family: str, size: int) -> None:
    pipe = tiny_pipeline_of(family)
    with pytest.raises(UserError, match=rf"size is {size} x {size}; \w+ takes multiples of \d+, for example"):
        objective_of(pipe, size)
    assert objective_of(pipe, SIDE).side == SIDE


def test_quantization_checks_the_size_and_the_calibration_first(ours: Any) -> None:
    with pytest.raises(UserError, match="draws 128 x 128 only"):
        mm.quantize(ours, mm.SVDQuantConfig(rank=4, size=64), calibration=["a cat"], progress=False)
    with pytest.raises(UserError, match="data_free=True quantizes without calibration"):
        mm.quantize(ours, mm.SVDQuantConfig(rank=4, data_free=True), calibration=["a cat"], progress=False)


@pytest.mark.parametrize("given", [{"height": 64}, {"width": "128"}, {"height": True}])
def test_a_size_that_is_not_drawn(given: dict[str, Any], ours: Any) -> None:
    with pytest.raises(UserError, match=r"this model draws 128 x 128 pictures, not .*; leave the size out"):
        ours("a cat", num_inference_steps=1, **given)


def _patch(seed: int) -> Patch:
    made = torch.Generator().manual_seed(seed)
    tensors = {"down": torch.randn(2, 16, generator=made), "up": torch.randn(12, 2, generator=made)}
    return Patch(entries={"unet.a": Entry(kind="lowrank", tensors=tensors)}, name=f"p{seed}", base="x")


@pytest.mark.parametrize(
    ("patches", "given", "message"),
    [
        ((1, 2), {"weights": [float("nan"), 1.0]}, "weight is nan"),
        ((1, 2), {"weights": [1.0, float("inf")]}, "weight is inf"),
        ((1, 2), {"weights": ["1", 1.0]}, "weight is '1'"),
        ((1, 2), {"density": 0.3}, "density is 0.3, which sum does not use"),
        ((1, 2), {"density": 0.3, "method": "do"}, "density is 0.3, which do does not use"),
        ((1, 2), {"density": float("nan"), "method": "ties"}, "density is nan"),
        ((1, 2), {"rank": 2}, "rank is 2, which sum does not use"),
        ((1, 2), {"rank": 13, "method": "do"}, "rank is 13, and no layer of the adapters can have more than 12"),
        ((1, 1), {}, "'p1' and 'p1' are the same adapter"),
        ((1, 2), {"method": "dare", "seed": -1}, "seed is -1"),
    ],
)
def test_what_a_merge_refuses(patches: tuple[int, ...], given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        merge([_patch(seed) for seed in patches], **given)
    assert message in str(error.value)
