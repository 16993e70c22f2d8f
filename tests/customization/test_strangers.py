"""Prompts with other new words: what their rows are, that adapters leave them alone, and that nothing of them stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from subject_pictures import subject_folder
from tiny import tiny_pipeline
from tiny_pipelines import SIDE, tiny_pipeline_of

from mm.customization.customize import customize
from mm.customization.objectives.protocol import objective_of
from mm.customization.strangers import others

FAST: dict[str, Any] = {
    "steps": 40, "batch_size": 2, "preview_every": 40, "preserve_batch": 1, "preserve_every": 1, "learning_rate": 1e-2,
    "preserve": 8.0, "rank": 4, "method": "dreambooth", "samples": (),
}  # fmt: skip


def test_rows_of_other_words_have_the_norm_of_the_own_and_other_directions() -> None:
    own, mean = torch.randn(256, generator=torch.Generator().manual_seed(1)), torch.full((256,), 0.3)
    made = others(own, mean, 200, torch.Generator().manual_seed(2))
    norms = (made - mean).norm(dim=1) / (own - mean).norm()
    alike = torch.nn.functional.cosine_similarity(made - mean, (own - mean)[None])
    assert 0.5 < float(norms.min()) < 0.8 and 1.0 < float(norms.max()) < 1.4
    assert float(alike.max()) < 0.85 and 0.2 < float(alike.mean()) < 0.5
    assert torch.equal(made, others(own, mean, 200, torch.Generator().manual_seed(2)))


def _moved_by(learned: Any, pipe: Any, prompts: list[str]) -> float:
    """How far the adapter moves the predictions for some prompts."""
    objective = objective_of(pipe, None)
    generator = torch.Generator().manual_seed(3)
    side = objective.encode_pictures(torch.zeros(1, 3, objective.side, objective.side)).shape[1:]
    noise, level = torch.randn(len(prompts), *side, generator=generator), objective.fixed_levels(8)[-1:]
    with torch.no_grad():
        before = objective.predict(noise, level.expand(len(prompts)), objective.encode_prompts(prompts))
        learned.apply(pipe)
        after = objective.predict(noise, level.expand(len(prompts)), objective.encode_prompts(prompts))
        learned.undo(pipe)
    return float((after - before).norm() / before.norm())


@pytest.mark.parametrize("family", ["stable-diffusion", "flux"])
def test_an_adapter_moves_other_names_less(family: str, tmp_path: Path) -> None:
    """In an open vocabulary; the same run without them moves other names about as far as its own."""
    folder, moved = subject_folder(tmp_path / "data"), {}
    for count in (0, 2):
        pipe = tiny_pipeline_of(family)
        learned = customize(
            pipe, folder, name="sks", preserved=("", "grass"), strangers=count, **FAST | {"size": SIDE}
        )
        moved[count] = _moved_by(learned, pipe, ["a photo of moka", "a vigu on grass", "a photo of teru"])
    assert moved[2] < 0.8 * moved[0]


def test_a_closed_vocabulary_has_a_word_for_them_while_it_is_trained(tmp_path: Path) -> None:
    pipe = tiny_pipeline(codes=False)
    words = len(pipe.text_tokenizer)
    fast = FAST | {"steps": 2, "preview_every": 2, "size": 128}
    one, two = (
        customize(pipe, subject_folder(tmp_path / "data"), name="<mug>", strangers=count, **fast) for count in (1, 1)
    )
    assert len(pipe.text_tokenizer) == words
    assert [item["token"] for item in one.settings["tokens"]] == ["<mug>"]
    assert all(torch.equal(one.entries[path].tensors[key], two.entries[path].tensors[key])
               for path in one.entries for key in one.entries[path].tensors)  # fmt: skip


@pytest.mark.parametrize("method", ["textual-inversion"])
def test_rows_alone_need_none(method: str, tmp_path: Path) -> None:
    pipe, folder = tiny_pipeline_of("stable-diffusion"), subject_folder(tmp_path / "data")
    fast = {key: value for key, value in FAST.items() if key not in ("rank", "method")} | {"steps": 2, "size": SIDE}
    each = [customize(pipe, folder, name="<mug>", method=method, strangers=n, **fast) for n in (0, 2)]
    for path, entry in each[0].entries.items():
        assert torch.equal(entry.tensors["rows"], each[1].entries[path].tensors["rows"])
