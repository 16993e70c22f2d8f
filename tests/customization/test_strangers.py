"""Prompts with other new words: what their rows are, that adapters leave them alone, and that nothing of them stays."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from subject_pictures import subject_folder
from tiny import tiny_pipeline
from tiny_pipelines import SIDE, tiny_pipeline_of

from mm.customization.customize import customize
from mm.customization.goals import Goal
from mm.customization.strangers import others
from mm.customization.training import Training

FAST: dict[str, Any] = {
    "steps": 12, "batch_size": 1, "preview_every": 12, "preserve_batch": 1, "preserve_every": 1, "learning_rate": 3e-2,
    "preserve": 4.0, "rank": 4, "method": "dreambooth", "samples": (),
}  # fmt: skip


def test_rows_of_other_words_have_the_norm_of_the_own_and_other_directions() -> None:
    own, mean = torch.randn(256, generator=torch.Generator().manual_seed(1)), torch.full((256,), 0.3)
    made = others(own, mean, 200, torch.Generator().manual_seed(2))
    norms = (made - mean).norm(dim=1) / (own - mean).norm()
    cosines = torch.nn.functional.cosine_similarity(made - mean, (own - mean)[None])
    assert 0.5 < float(norms.min()) < 0.8 and 1.0 < float(norms.max()) < 1.4
    assert float(cosines.max()) < 0.85 and 0.2 < float(cosines.mean()) < 0.5
    assert torch.equal(made, others(own, mean, 200, torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("family", ["stable-diffusion", "flux"])
def test_captions_under_other_names_are_held_to_the_base(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an open vocabulary: two at each time, beside one unrelated prompt, with the adapter and without."""
    held: list[tuple[str, ...]] = []
    condition = Goal.condition

    def noted(goal: Goal, words: Any, chosen: Any) -> Any:
        held.append(tuple(words))
        return condition(goal, words, chosen)

    monkeypatch.setattr(Goal, "condition", noted)
    fast: dict[str, Any] = FAST | {"size": SIDE, "steps": 3, "preview_every": 3}
    folder = subject_folder(tmp_path / "data")
    customize(tiny_pipeline_of(family), folder, name="sks", preserved=("grass", "snow"), strangers=2, **fast)
    preserved = [words for words in held if len(words) == 3]
    assert len(preserved) == 2 * 3 and preserved[::2] == preserved[1::2]
    others = {prompt for words in preserved for prompt in words[1:]}
    assert len(others) > 3 and not any("sks" in prompt for prompt in others)
    assert all(re.fullmatch(r"a photo of a [a-z]+ on grass", prompt) for prompt in others)


def test_a_closed_vocabulary_has_a_word_for_them_while_it_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Training, "score", lambda run: (1.0 - 0.01 * run.progress.step, 0.0))  # the last step is best
    pipe = tiny_pipeline(codes=False)
    words = len(pipe.text_tokenizer)
    fast: dict[str, Any] = FAST | {"steps": 2, "preview_every": 2, "size": 128, "companions": 0}
    one, two = (
        customize(pipe, subject_folder(tmp_path / "data"), name="<mug>", strangers=count, **fast) for count in (1, 1)
    )
    assert len(pipe.text_tokenizer) == words
    assert [item["token"] for item in one.settings["tokens"]] == ["<mug>"]
    none = customize(pipe, subject_folder(tmp_path / "data"), name="<mug>", strangers=0, **fast)
    assert any(not torch.equal(one.entries[path].tensors["up"], none.entries[path].tensors["up"])
               for path in one.entries if "up" in one.entries[path].tensors)  # fmt: skip
    assert all(torch.equal(one.entries[path].tensors[key], two.entries[path].tensors[key])
               for path in one.entries for key in one.entries[path].tensors)  # fmt: skip


@pytest.mark.parametrize("method", ["textual-inversion"])
def test_rows_alone_need_none(method: str, tmp_path: Path) -> None:
    pipe, folder = tiny_pipeline_of("stable-diffusion"), subject_folder(tmp_path / "data")
    kept = {key: value for key, value in FAST.items() if key not in ("rank", "method")}
    fast: dict[str, Any] = kept | {"steps": 2, "size": SIDE}
    each = [customize(pipe, folder, name="<mug>", method=method, strangers=n, **fast) for n in (0, 2)]
    for path, entry in each[0].entries.items():
        assert torch.equal(entry.tensors["rows"], each[1].entries[path].tensors["rows"])
