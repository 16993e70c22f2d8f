"""`best_of` draws again until the counter reads the numbers that the prompt asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import STEPS, seeded, tiny_pipeline, tiny_reader

from mm import ImageEditPipeline, TextToImagePipeline
from mm.core.errors import UserError
from mm.models.connectors import Connector
from mm.models.understanding_encoder import LatentStem, UnderstandingEncoder
from mm.pipelines.best_of import draw_best, seed_of_try
from mm.pipelines.run_state import Run
from mm.pipelines.self_reader import SelfReader, Shortfall, wrongness
from mm.world.asked import Asked, Fact, asked_of_change


def test_tries_go_on_until_right_and_the_least_wrong_stays() -> None:
    wrong = {7: 0, 8: 1, 9: 11}
    known = {seed_of_try(seed, k): 100 * seed + k for seed in (7, 8, 9, 10) for k in range(1, 3)}
    # Seed 8 is right at its second try; 9 never, and its third try is nearer than its first; 10 has nothing to check.
    wrong |= {801: 0, 901: 20, 902: 1}
    drawn: list[tuple[int, int]] = []

    def draw(rows: Sequence[int], generators: Sequence[torch.Generator]) -> torch.Tensor:
        marks = [known.get(g.initial_seed(), g.initial_seed()) for g in generators]
        drawn.extend(zip(rows, marks, strict=True))
        return torch.tensor(marks).float().view(-1, 1, 1, 1)

    def check(rows: Sequence[int], latents: torch.Tensor) -> list[Shortfall | None]:
        marks = [int(x) for x in latents.flatten()]
        return [
            None if row == 3 else Shortfall(wrong=wrong[mark], missing=("a cat",) * bool(wrong[mark]))
            for row, mark in zip(rows, marks, strict=True)
        ]

    best = draw_best(draw, check, seeded(7, 8, 9, 10), 3, Run(guidance_scale=1))
    assert best.latents.flatten().tolist() == [7, 801, 902, 10]
    assert best.tries == [1, 2, 3, 1]
    assert drawn[4:] == [(1, 801), (2, 901), (2, 902)]
    output = best.output(["four", "pictures", "as", "they are"], [3] * 4)
    assert output.right == [True, True, False, None]
    assert output.missing == [[], [], ["a cat"], []] and output.steps == [3] * 4


def test_wrongness() -> None:
    assert wrongness([1, 2, 2], (1, 2, 2)) == 0
    assert 0 < wrongness([2, 2, 2], (1, 2, 2)) < wrongness([2, 2], (1, 2, 2))
    assert wrongness([], (1,)) > 0


def test_a_seed_has_its_own_tries() -> None:
    seeds = {seed_of_try(seed, k) for seed in (0, 1, 7) for k in range(5)}
    assert len(seeds) == 15
    assert seed_of_try(7, 0) == 7


@pytest.fixture(scope="module")
def reader() -> SelfReader:
    torch.manual_seed(0)
    encoder = UnderstandingEncoder(width=32, depth=1, heads=2, text_width=16, text_depth=1)
    return SelfReader(
        encoder, LatentStem(width=32, depth=1), Connector(in_channels=32, width=16, hidden=16, counter_keys=8)
    )


def test_the_reader_sums_kin_of_each_centre(reader: SelfReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the counter's matrix, read by hand."""
    counter = reader.connector.counter
    assert counter is not None
    same = torch.zeros(1, 16, 16)
    for a, b in ((1, 1), (4, 4), (9, 9), (1, 9), (9, 1)):
        same[0, a, b] = 0.9
    same[0, 2, 2] = 0.4  # no centre
    monkeypatch.setattr(counter, "forward", lambda merged: same.to(merged.dtype))
    assert reader.numbers(reader.encoded(torch.randn(1, 16, 8, 8))) == [[1, 2, 2]]


def test_what_a_picture_lacks(reader: SelfReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that differ, and answers that are not the right ones, in words; each picture is asked about alone."""
    seen = iter([[1, 1], [2, 2, 2]])
    monkeypatch.setattr(reader, "numbers", lambda tokens: [next(seen)])
    red = Fact(question="what colour is the cat?", answer="red", said="a red cat")
    night = Fact(question="what is the background?", answer="night", said="at night")
    asked = [
        Asked(numbers=(1, 1), facts=(red, night), said="1 cat and 1 dog"),
        Asked(numbers=(2, 2), said="2 cats"),
        None,
    ]
    heard: list[tuple[tuple[int, ...], list[str]]] = []

    def believe(tokens: torch.Tensor, facts: Sequence[Fact]) -> list[float]:
        heard.append((tuple(tokens.shape), [fact.question for fact in facts]))
        return [0.25, 0.99]

    first, second, third = reader.shortfalls(torch.randn(3, 16, 8, 8), asked, believe)
    assert first is not None and first.missing == ("a red cat",) and first.wrong == 7.5
    assert second is not None and second.missing == ("only 2 cats",) and second.wrong == wrongness([2, 2, 2], (2, 2))
    assert third is None
    assert [(shape[0], questions) for shape, questions in heard] == [(1, [red.question, night.question])]


def test_the_pipeline_keeps_its_first_try_where_that_is_right(
    reader: SelfReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    plain = pipe("a cat", generator=seeded(7)[0], num_inference_steps=STEPS, output_type="pt").images
    options: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "pt"}
    pipe.self_reader = reader
    unsaid = pipe("a cat in a house", generator=seeded(7)[0], best_of=3, **options)
    assert (unsaid.tries, unsaid.right, unsaid.missing) == ([1], [None], [[]])
    # A reader that is never content: three tries, the first one kept since none is nearer.
    monkeypatch.setattr(reader, "shortfalls", lambda latents, asked, believe: [Shortfall(wrong=3, missing=("1 cat",))])
    never = pipe("a cat", generator=seeded(7)[0], best_of=3, **options)
    assert (never.tries, never.right, never.missing) == ([3], [False], [["1 cat"]])
    torch.testing.assert_close(never.images, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("encoded", [False, True])
def test_a_try_keeps_the_negative_prompt_of_its_picture(
    reader: SelfReader, monkeypatch: pytest.MonkeyPatch, encoded: bool
) -> None:
    """Of two prompts, each with a negative prompt of its own and two pictures, the last picture is drawn again."""
    pipe = tiny_pipeline()
    pipe.self_reader = reader
    options: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 3.0}
    negatives = ["a tree", "a car"]
    given = {"negative_prompt_embeds": pipe.encode_prompt(negatives)[0]} if encoded else {"negative_prompt": negatives}
    wanted = pipe("a dog", negative_prompt="a car", generator=seeded(seed_of_try(4, 1))[0], **options).images
    found = iter([[Shortfall(), Shortfall(), Shortfall(), Shortfall(wrong=5, missing=("a dog",))], [Shortfall()]])
    monkeypatch.setattr(reader, "shortfalls", lambda latents, asked, believe: next(found))
    made = pipe(
        ["a cat", "a dog"], num_images_per_prompt=2, generator=seeded(1, 2, 3, 4), best_of=3, **given, **options
    )
    assert made.tries == [1, 1, 1, 2]
    torch.testing.assert_close(made.images[3:], wanted, atol=1e-4, rtol=0)


def test_a_change_is_made_again_where_the_picture_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two changes the second is right at its second try, which is a call of its own from that seed."""
    pipe = ImageEditPipeline(**{k: v for k, v in tiny_reader().items() if k != "latent_stem"})
    pipe.set_progress_bar_config(disable=True)
    sources = [Image.new("RGB", (128, 128), colour) for colour in ("red", "green")]
    words = ["make the cat blue", "remove the dog"]
    options: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "pt", "strict": False}
    first = pipe(sources[0], words[0], generator=seeded(1)[0], **options).images
    again = pipe(sources[1], words[1], generator=seeded(seed_of_try(2, 1))[0], **options).images
    asked: list[Any] = []
    found = iter([[Shortfall(), Shortfall(wrong=5, missing=("no dog",))], [Shortfall()]])
    monkeypatch.setattr(pipe, "_checker", lambda wanted: asked.append(wanted) or (lambda rows, latents: next(found)))
    made = pipe(sources, words, generator=seeded(1, 2), best_of=3, **options)
    assert (made.tries, made.right, made.missing) == ([1, 2], [True, True], [[], []])
    torch.testing.assert_close(made.images, torch.cat([first, again]), atol=1e-4, rtol=0)
    assert asked == [[asked_of_change(each) for each in words]]


def test_pictures_of_rounded_activations_are_decoded_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a call without `best_of`, so that the last bits are those of any batch size."""
    pipe: Any = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr("mm.pipelines.batch_parts.rounds_activations", lambda _: True)
    monkeypatch.setattr(pipe, "_checker", lambda asked: lambda rows, drawn: [Shortfall() for _ in rows])
    decode, seen = pipe._decode, []

    def watched(latents: torch.Tensor, *options: Any) -> Any:
        seen.append(len(latents))
        return decode(latents, *options)

    monkeypatch.setattr(pipe, "_decode", watched)
    made = pipe(["a cat", "a dog"], best_of=2, generator=seeded(1, 2), num_inference_steps=1, output_type="pt")
    assert seen == [1, 1] and len(made.images) == 2


@pytest.mark.parametrize("edits", [False, True])
@pytest.mark.parametrize("last", [1, 2 * STEPS])
def test_an_interrupted_try_is_the_last(edits: bool, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first try what was drawn so far is given; later the try before stays."""
    pipe: Any = tiny_pipeline()
    if edits:
        pipe = ImageEditPipeline(**{k: v for k, v in tiny_reader().items() if k != "latent_stem"})
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(pipe, "_checker", lambda asked: lambda rows, drawn: [Shortfall(wrong=1, missing=("a cat",))])
    steps: list[int] = []

    def stop(which: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        which._interrupt = len(steps) == last
        return {}

    given = (Image.new("RGB", (128, 128), "red"), "make the cat blue") if edits else ("a cat",)
    options: dict[str, Any] = {"num_inference_steps": STEPS, "strict": False, "output_type": "latent"}
    made = pipe(*given, best_of=5, generator=seeded(7)[0], callback_on_step_end=stop, **options)
    assert len(steps) == last
    assert (made.tries, made.right) == ([1], [False])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"best_of": 0}, "best_of is 0"), ({"best_of": 2, "latents": torch.zeros(1, 16, 8, 8)}, "leave one of them out")],
)
def test_wrong_tries(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_pipeline()("a cat", **options)


def test_a_model_that_cannot_count_says_so(tmp_path: Path) -> None:
    pipe: TextToImagePipeline = tiny_pipeline()
    with pytest.raises(UserError, match="self_reader"):
        pipe("a cat", best_of=2, num_inference_steps=1)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds no understanding_encoder"):
        TextToImagePipeline.from_pretrained(tmp_path)("a cat", best_of=2, num_inference_steps=1)
