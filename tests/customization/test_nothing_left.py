"""Runs that are refused leave nothing: no layer on the model, no word, no lock; settings without effect are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from subject_pictures import subject_folder
from tiny import tiny_pipeline
from tiny_pipelines import SIDE, tiny_pipeline_of

from mm.core.errors import UserError
from mm.customization.checks import check_names_read, warn_of_long
from mm.customization.customize import customize
from mm.customization.data import read_folder
from mm.customization.effects import check_effects
from mm.customization.learned import LAYOUTS, check_layout
from mm.customization.methods import through_peft
from mm.customization.objectives.protocol import objective_of
from mm.customization.only_run import LOCK, only_run
from mm.customization.sliders import SliderPrompts
from mm.layers.linear import BranchedLinear

FAST: dict[str, Any] = {"steps": 1, "preview_every": 1, "batch_size": 1, "size": SIDE, "preserved": ()}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline_of("stable-diffusion")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return subject_folder(tmp_path_factory.mktemp("photos") / "p", 2)


def _traces(pipe: Any) -> tuple[Any, ...]:
    kinds = [type(m).__module__ for m in pipe.unet.modules()]
    hooks = sum(len(m._forward_hooks) for m in pipe.text_encoder.modules())
    branches = [m for m in pipe.unet.modules() if isinstance(m, BranchedLinear)]
    return kinds, hooks, branches, len(pipe.tokenizer), vars(pipe.unet).get("peft_config")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["custom-diffusion", "class-diffusion", "textual-inversion", "detex"])
def test_a_name_that_the_tokenizer_has(method: str, pipe: Any, photos: Path) -> None:
    """ "a" is a token here; a method that gives the name a row finds that out with its layers on the model."""
    before = _traces(pipe)
    with pytest.raises(UserError, match="is a word of tokenizer already"):
        customize(pipe, photos, name="a", noun="fox", method=method, **FAST)
    assert _traces(pipe) == before


def test_a_tuner_that_fails_midway(pipe: Any, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _traces(pipe)
    with pytest.raises(UserError, match=r"shira takes rank x .* give at most \d+"):
        customize(pipe, photos, name="<mug>", method="shira", rank=60, **FAST)
    assert _traces(pipe) == before

    def fails(*given: Any) -> Any:
        raise RuntimeError("midway")

    monkeypatch.setattr(through_peft, "config_of", fails)
    with pytest.raises(RuntimeError, match="midway"):
        customize(pipe, photos, name="<mug>", method="dora", **FAST)
    assert _traces(pipe) == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guard_weight": 2.0}, "guard_weight is 2.0, and no concept is guarded"),
        ({"regularize": 2.0}, "regularize is 2.0, and there are no regularization pictures"),
        ({"slider_pictures": 4}, "slider_pictures is 4, and no pictures are drawn"),
        ({"preserve": 0, "guard": ("wolf",)}, "guarded concepts are held"),
        ({"preserve": 0, "strangers": 1}, "strangers is 1, and other names are held"),
        ({"method": "oft", "rank": 4}, "oft has no setting 'rank'"),
        ({"method": "oft", "block": 1}, "block is 1"),
        ({"alpha": 0}, "alpha is 0"),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, dict) else "",
)
def test_settings_without_effect(given: dict[str, Any], message: str, pipe: Any, photos: Path) -> None:
    with pytest.raises(UserError) as error:
        customize(pipe, photos, name="<mug>", **(FAST | given))
    assert message in str(error.value)


def test_settings_without_effect_on_a_slider(pipe: Any) -> None:
    prompts = SliderPrompts(positive="a red cat", negative="a blue cat")
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"caption_dropout": 0.5}, "captions are never left out"), ({"strangers": 2}, "other names are held"),
        ({"companions": 3}, "companions is 3, and subjects are shown beside other things"),
        ({"noun": "cat"}, "noun is 'cat'"),
    )  # fmt: skip
    for given, message in cases:
        with pytest.raises(UserError, match=message):
            customize(pipe, kind="slider", prompts=prompts, **(FAST | given))


def test_captions_that_are_cut_off_before_the_name(pipe: Any, tmp_path: Path) -> None:
    """CLIP reads 77 tokens, here letters; a name behind them is never read."""
    folder = subject_folder(tmp_path, 2)
    (folder / "0.txt").write_text("a long word " * 9 + "and a [trigger]")
    with pytest.raises(UserError, match="behind the 77 tokens that the model reads"):
        customize(pipe, folder, name="<mug>", **FAST)
    (folder / "0.txt").write_text("a [trigger] and " + "a long word " * 9)
    objective = objective_of(pipe, SIDE)
    captions = [example.caption for example in read_folder(folder, name="<mug>")]
    check_names_read(objective, "<mug>", captions)
    with pytest.warns(UserWarning, match='the caption "a <mug> and a long .* is longer than the 77 tokens') as caught:
        warn_of_long(objective, captions)
    assert len(caught) == 1


def test_long_captions_of_ours_are_cut_as_prompts_are(tmp_path: Path) -> None:
    """The trunk reads 128 tokens and prompts 64; a caption of more ended in an error of the trunk."""
    ours, folder = tiny_pipeline(), subject_folder(tmp_path, 2)
    (folder / "0.txt").write_text("a [trigger] on grass " + "and a red cat " * 60)
    with pytest.warns(UserWarning, match="is longer than the 64 tokens that the model reads"):
        customize(ours, folder, name="<mug>", steps=1, batch_size=1, companions=0)
    (folder / "0.txt").write_text("and a red cat " * 60 + "beside a [trigger]")
    with pytest.raises(UserError, match="behind the 64 tokens that the model reads"):
        customize(ours, folder, name="<mug>", steps=1, batch_size=1, companions=0)


def test_what_a_run_warns_of(pipe: Any, tmp_path: Path) -> None:
    folder = subject_folder(tmp_path, 2)
    with pytest.warns(UserWarning, match="learning_rate is 0.001, and textual-inversion trains a word alone"):
        check_effects("textual-inversion", "subject", {"learning_rate": 1e-3})
    Image.new("RGB", (1, 5)).save(folder / "1.png")
    with pytest.warns(UserWarning) as caught:
        learned = customize(pipe, folder, name="<mug>", **(FAST | {"learning_rate": 1e-9}))
    said = " ".join(str(one.message) for one in caught)
    assert "1.png is 1 x 5 pixels" in said and learned.report["best_step"] in (0, 1)
    assert (learned.report["best_step"] == 0) == ("no preview was better than the start" in said)


def test_one_run_at_a_time_in_a_folder(pipe: Any, photos: Path, tmp_path: Path) -> None:
    work = tmp_path / "runs" / "work"
    with only_run(work):
        with pytest.raises(UserError, match="another run works in"):
            customize(pipe, photos, name="<mug>", work=work, samples=(), **FAST)
        assert (work / LOCK).exists()
    assert not work.exists() and not work.parent.exists()  # made for the lock alone
    learned = customize(pipe, photos, name="<mug>", work=work, samples=(), **FAST)
    assert learned.report["steps"] == 1 and not (work / LOCK).exists()
    again = customize(pipe, photos, name="<mug>", work=work, samples=(), **FAST)  # from the state of a finished run
    assert all(torch.equal(e.tensors["up"], again.entries[k].tensors["up"]) for k, e in learned.entries.items())


def test_a_layout_that_does_not_hold_what_will_be_learned() -> None:
    """It is refused before the run, and not when the run has ended."""
    for method, layout, message in (
        ("detex", "kohya", "holds no new word, and detex brings one"),
        ("loha", "diffusers", "does not hold what loha learns"),
        ("shira", "peft", "does not hold what shira learns"), ("dora", "magic", "there are auto"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            check_layout(layout, method)
    with pytest.raises(UserError, match="dreambooth brings one here"):
        check_layout("diffusers", "dreambooth", word=True)
    for layout in LAYOUTS:
        check_layout(layout, "dreambooth")
    check_layout("diffusers", "dora")
