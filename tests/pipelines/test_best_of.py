"""`best_of` draws again until the counter reads the numbers that the prompt asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import STEPS, seeded, tiny_pipeline

from mm import TextToImagePipeline
from mm.core.errors import UserError
from mm.models.connectors import Connector
from mm.models.understanding_encoder import LatentStem, UnderstandingEncoder
from mm.pipelines.best_of import CountReader, draw_best, seed_of_try, wrongness


class Scripted(CountReader):
    """Reads the numbers that a list gives to the seeds which made the latents."""

    def __init__(self, of_seed: dict[int, list[int]]) -> None:
        self.of_seed = of_seed

    def numbers(self, latents_BCHW: torch.Tensor) -> list[list[int]]:
        return [self.of_seed[int(x)] for x in latents_BCHW[:, 0, 0, 0]]


def test_tries_go_on_until_right_and_the_least_wrong_stays() -> None:
    numbers = {7: [3, 3, 3], 8: [2, 2], 9: [4, 4, 4, 4], 10: [1]}
    drawn: list[tuple[str, int]] = []
    known = {seed_of_try(seed, k): 100 * seed + k for seed in numbers for k in range(1, 3)}
    # Seed 8 is right at its second try; 9 never, and its third try is nearer than its first; 10 has nothing to check.
    numbers |= {801: [3, 3, 3], 901: [1], 902: [2, 2]}

    def draw(prompts: Sequence[str], generators: Sequence[torch.Generator]) -> torch.Tensor:
        marks = [known.get(g.initial_seed(), g.initial_seed()) for g in generators]
        drawn.extend(zip(prompts, marks, strict=True))
        return torch.tensor(marks).float().view(-1, 1, 1, 1)

    prompts = ["three stars", "three cats", "three dogs", "a cat in a house"]
    best, tries, right = draw_best(draw, Scripted(numbers), prompts, seeded(7, 8, 9, 10), 3)
    assert best.flatten().tolist() == [7, 801, 902, 10]
    assert (tries, right) == ([1, 2, 3, 1], [True, True, False, None])
    assert drawn[4:] == [("three cats", 801), ("three dogs", 901), ("three dogs", 902)]


def test_wrongness() -> None:
    assert wrongness([1, 2, 2], (2, 1)) == 0
    assert 0 < wrongness([2, 2, 2], (2, 1)) < wrongness([2, 2], (2, 1))
    assert wrongness([], (1,)) > 0


def test_a_seed_has_its_own_tries() -> None:
    seeds = {seed_of_try(seed, k) for seed in (0, 1, 7) for k in range(5)}
    assert len(seeds) == 15
    assert seed_of_try(7, 0) == 7


@pytest.fixture(scope="module")
def reader() -> CountReader:
    torch.manual_seed(0)
    encoder = UnderstandingEncoder(width=32, depth=1, heads=2, text_width=16, text_depth=1)
    return CountReader(
        encoder, LatentStem(width=32, depth=1), Connector(in_channels=32, width=16, hidden=16, counter_keys=8)
    )


def test_the_reader_sums_kin_of_each_centre(reader: CountReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the counter's matrix, read by hand."""
    counter = reader.connector.counter
    assert counter is not None
    same = torch.zeros(1, 16, 16)
    for a, b in ((1, 1), (4, 4), (9, 9), (1, 9), (9, 1)):
        same[0, a, b] = 0.9
    same[0, 2, 2] = 0.4  # no centre
    monkeypatch.setattr(counter, "forward", lambda merged: same.to(merged.dtype))
    assert reader.numbers(torch.randn(1, 16, 8, 8)) == [[1, 2, 2]]


def test_the_pipeline_keeps_its_first_try_where_that_is_right(
    reader: CountReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    plain = pipe("a cat", generator=seeded(7)[0], num_inference_steps=STEPS, output_type="pt").images
    options: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "pt"}
    pipe.count_reader = reader
    unsaid = pipe("a cat in a house", generator=seeded(7)[0], best_of=3, **options)
    assert (unsaid.tries, unsaid.right) == ([1], [None])
    # A reader that is never content: three tries, the first one kept since none is nearer.
    monkeypatch.setattr(reader, "numbers", lambda latents: [[4, 4, 4, 4] for _ in latents])
    never = pipe("a cat", generator=seeded(7)[0], best_of=3, **options)
    assert (never.tries, never.right) == ([3], [False])
    torch.testing.assert_close(never.images, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"best_of": 0}, "best_of is 0"), ({"best_of": 2, "latents": torch.zeros(1, 16, 8, 8)}, "leave one of them out")],
)
def test_wrong_tries(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_pipeline()("a cat", **options)


def test_a_model_that_cannot_count_says_so(tmp_path: Path) -> None:
    pipe: TextToImagePipeline = tiny_pipeline()
    with pytest.raises(UserError, match="count_reader"):
        pipe("a cat", best_of=2, num_inference_steps=1)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds no understanding_encoder"):
        TextToImagePipeline.from_pretrained(tmp_path)("a cat", best_of=2, num_inference_steps=1)
