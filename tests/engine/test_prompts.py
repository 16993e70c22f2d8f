"""Wildcards, prompt matrices and weights."""

from __future__ import annotations

import pytest

from mm.core.errors import UserError
from mm.engine.prompts import expand, matrix, weighted
from mm.engine.requests import Draw
from mm.engine.variants import variants


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a red cat", [("a red cat", 1.0)]),
        ("a (red:1.3) cat", [("a ", 1.0), ("red", 1.3), (" cat", 1.0)]),
        ("a ((red)) [cat]", [("a ", 1.0), ("red", 1.21), (" ", 1.0), ("cat", 0.909091)]),
        ("red++ cat, dog-", [("red", 1.21), (" cat, ", 1.0), ("dog", 0.9)]),
        ("a (big (red:1.5) cat:0.5)", [("a ", 1.0), ("big ", 0.5), ("red", 0.75), (" cat", 0.5)]),
        (r"\(x\) at 10:30", [("(x) at 10:30", 1.0)]),
        ("a well-known cat", [("a well-known cat", 1.0)]),
        ("(open", [("open", 1.1)]),
        ("", [("", 1.0)]),
    ],
)
def test_weights(prompt, pieces):
    assert weighted(prompt) == pieces


def test_a_weight_out_of_range_is_named():
    with pytest.raises(UserError, match="weight 99 in the prompt"):
        weighted("(red:99)")


def test_wildcards_follow_the_seed():
    prompt = "a {cat|{dog|wolf}} in __place__"
    made = [expand(prompt, seed, lambda name: ["Rome", "Oslo"]) for seed in range(40)]
    assert made == [expand(prompt, seed, lambda name: ["Rome", "Oslo"]) for seed in range(40)]
    assert {m.split()[1] for m in made} == {"cat", "dog", "wolf"}
    assert {m.split()[-1] for m in made} == {"Rome", "Oslo"}
    assert len(expand("{2$$x|y|z}", 1).split(", ")) == 2
    with pytest.raises(UserError, match="__place__"):
        expand(prompt, 1)
    with pytest.raises(UserError, match="never end"):
        expand("__a__", 1, lambda name: ["__a__ and __a__"])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a {red|blue cat", r"a \{ that is not closed, in '\{red\|blue cat'"),
        ("a {red|{blue|green} cat", "not closed, in '{red"),
        ("a red|blue} cat", "a } that closes nothing, in 'a red|blue}'"),
        ("{a|b} and c}", "closes nothing"),
    ],
)
def test_braces_that_do_not_pair_are_named(prompt: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        expand(prompt, 1)


def test_a_brace_behind_a_backslash_is_text() -> None:
    assert expand(r"a \{red\|blue\} cat", 1) == r"a \{red\|blue\} cat"
    assert expand(r"\{ {a|a} \}", 1) == r"\{ a \}"


def test_a_matrix_has_every_subset():
    assert matrix("a cat | at night | {x|y}") == ["a cat", "a cat, at night", "a cat, {x|y}", "a cat, at night, {x|y}"]
    with pytest.raises(UserError, match="fewer parts"):
        matrix("|".join("abcdefghijklmnopqrstuvwxyz"))


@pytest.mark.parametrize("prompt", ["a cat", "a {cat|dog}"])
def test_a_matrix_of_one_part_is_refused(prompt: str) -> None:
    with pytest.raises(UserError, match=r"no part after a \|"):
        variants(Draw(prompt=prompt), matrix=True)
