"""Prompt weights and long prompts: hidden states times weights, on views that share the encoders' weights."""

from __future__ import annotations

import pytest
import torch
from tiny_pipelines import arguments_of, tiny_pipeline_of

from mm.engine.views import view_of
from mm.engine.weighting import plain_text, prepare, weighed

PROMPT = "a (red:1.5) fox, [big] tree++"
WEIGHTS = {"a": 1, "red": 1.5, "fox,": 1, "big": 1 / 1.1, "tree": 1.21}


def encoded(pipe, prompt, **options):
    """Hidden states (1, L, D) that Stable Diffusion's pipeline gets for a prompt."""
    return pipe.encode_prompt(prompt, "cpu", 1, False, **options)[0]


def test_hidden_states_are_multiplied_by_their_words_weight():
    pipe = tiny_pipeline_of("stable-diffusion")
    view = view_of(pipe)
    texts = prepare(view, [PROMPT])
    assert texts == {PROMPT: "a red fox, big tree"}
    plain_BLD, got_BLD = encoded(pipe, texts[PROMPT]), encoded(view, texts[PROMPT])
    # the tiny tokenizer has one token a byte, between start and end
    letters = [weight for word, weight in WEIGHTS.items() for _ in word]
    wanted_L = torch.tensor([1.0, *letters, *[1.0] * (77 - 1 - len(letters))])
    torch.testing.assert_close(got_BLD, plain_BLD * wanted_L[:, None])


def test_the_pipeline_itself_is_not_changed():
    pipe = tiny_pipeline_of("stable-diffusion")
    before = encoded(pipe, "a red fox, big tree")
    view = view_of(pipe)
    prepare(view, [PROMPT])
    assert torch.equal(encoded(pipe, "a red fox, big tree"), before)
    assert {id(p) for p in view.text_encoder.parameters()} == {id(p) for p in pipe.text_encoder.parameters()}
    assert type(pipe.tokenizer).__call__ is not type(view.tokenizer).__call__


@pytest.mark.parametrize(
    "name", ["stable-diffusion-xl", "stable-diffusion-3", "flux", "pixart-sigma", "sana", "chroma", "flux-2"]
)
def test_families_draw_another_picture_by_weight(name):
    pipe = tiny_pipeline_of(name)

    def latents(prompt):
        view = view_of(pipe)
        arguments = arguments_of(name, output_type="latent")
        arguments |= weighed(view, arguments | {"prompt": prompt})
        return view(**arguments).images

    plain, one, ten = (latents(p) for p in ("a red fox", "a (red:1.0) fox", "a (red:10) fox"))
    assert torch.equal(plain, one)
    assert not torch.equal(plain, ten)


@pytest.mark.parametrize("name", ["qwen-image", "z-image", "lumina-2"])
def test_families_that_normalize_tokens_warn(name):
    view = view_of(tiny_pipeline_of(name))
    before = view.text_encoder
    with pytest.warns(UserWarning, match="normalizes the length of every token"):
        assert prepare(view, ["a (red:1.5) fox"]) == {"a (red:1.5) fox": "a red fox"}
    assert view.text_encoder is before


@pytest.mark.parametrize("name", ["stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3"])
def test_long_prompts_are_read_in_chunks(name):
    """What stands after CLIP's 75 tokens changes the picture; a negative prompt of another length fits as well."""
    pipe = tiny_pipeline_of(name)
    long = "word " * 30

    def latents(prompt):
        view = view_of(pipe)
        arguments = arguments_of(name, output_type="latent", negative_prompt="bad")
        arguments |= weighed(view, arguments | {"prompt": prompt})
        return view(**arguments).images

    assert not torch.equal(latents(f"{long}fox"), latents(f"{long}cat"))


def test_a_chunk_is_read_as_a_prompt_of_its_own():
    pipe = tiny_pipeline_of("stable-diffusion")
    first, second = "a" * 75, "b" * 20  # one token a letter
    view = view_of(pipe)
    prepare(view, [first + second])
    got = encoded(view, first + second)
    assert got.shape[1] == 2 * 77
    # within a word, letters are other tokens than at its end
    ids = view.tokenizer([first + second], padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    parts = [pipe.text_encoder(part)[0] for part in ids.input_ids.chunk(2, dim=1)]
    torch.testing.assert_close(got, torch.cat(parts, dim=1))
    start, end = pipe.tokenizer.bos_token_id, pipe.tokenizer.eos_token_id
    assert all(part[0, 0] == start and end in part[0] for part in ids.input_ids.chunk(2, dim=1))


def test_plain_text_keeps_what_is_no_weight():
    assert plain_text("at 10:30, a well-known cat") == "at 10:30, a well-known cat"
    assert plain_text(r"\(x\) (y:1.2)") == "(x) y"
