"""Attacks on an erasure: what they search really comes nearer, they leave the model as it came, and count right."""

from __future__ import annotations

import pytest
import torch
from tiny import draw, tiny_pipeline

import mm
from mm.core.errors import UserError
from mm.erasure.attacks.embedding import EmbeddingSearch, Inversion
from mm.erasure.attacks.genetic import Genetic
from mm.erasure.attacks.noise import Noise
from mm.erasure.attacks.paraphrase import Paraphrase, rewritten
from mm.erasure.attacks.prompt_search import PromptSearch
from mm.erasure.attacks.registry import ATTACKS, attack_of
from mm.erasure.attacks.sites import Sites, words_of
from mm.erasure.embeddings import Embeddings
from mm.erasure.measure import Measurer
from mm.erasure.probes import Probe

PROBES = [Probe(prompt=f"a cat {where}", role="target", concept="cat") for where in ("on grass", "at night")]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def patch(pipe):
    return mm.erase(pipe, ["cat"], anchors="dog", method="uce")


@pytest.fixture
def patched(pipe, patch):
    before = draw(pipe)
    patch.apply(pipe)
    now = draw(pipe)
    yield patch
    assert torch.equal(draw(pipe), now)  # an attack leaves the model as it came
    patch.undo(pipe)
    assert torch.equal(draw(pipe), before)


def measurer(pipe, labels):
    """Gives the labels of `labels` in turn, again and again."""
    given = iter(labels * 1000)
    return Measurer(pipe=pipe, judge=lambda pictures: [next(given) for _ in pictures], call={"num_inference_steps": 1})


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_reports_with_and_without(pipe, patched, name):
    quick = {
        "prompt-search": lambda: PromptSearch(most=1, prefix=2, iterations=2, candidates=3),
        "genetic": lambda: Genetic(most=1, length=3, population=8, generations=2),
        "embedding": lambda: EmbeddingSearch(most=1, iterations=2),
        "inversion": lambda: Inversion(most=1, iterations=2),
        "noise": lambda: Noise(most=2, tries=2),
    }.get(name, lambda: attack_of(name))()
    probes = [*PROBES, Probe(prompt="draw a cat", role="wording", concept="cat")]
    found = quick.run(measurer(pipe, [frozenset({"cat"})]), patched, probes)
    assert found["success"]["score"] == 1.0
    assert found["without"]["n"] > 0
    assert quick.run(measurer(pipe, [None]), patched, probes)["success"]["score"] == 0.0  # unreadable: no success


def test_distances_are_zero_for_the_unpatched_layers(pipe, patched):
    sites = Sites(pipe, patched)
    prompt = "a cat on grass"
    assert sites.distances([prompt], prompt, sites.wanted(prompt))[0] > 0
    sites.new = sites.old
    plain, longer = sites.distances([prompt, f"red {prompt}"], prompt, sites.wanted(prompt))
    assert plain == pytest.approx(0.0, abs=1e-9)
    assert 0 < longer < 1.5  # the same tokens in another context


def test_prompt_search_takes_the_best_prefix(pipe, patched):
    sites, prompt = Sites(pipe, patched), "a cat on grass"
    search = PromptSearch(prefix=2, iterations=4, candidates=6)
    texts, (_, best) = search.search(sites, prompt, words_of(pipe, ()), 3)
    assert texts[0].endswith(prompt)
    assert best == pytest.approx(sites.distances([texts[0]], prompt, sites.wanted(prompt))[0], rel=1e-4)
    assert best <= sites.distances([texts[1]], prompt, sites.wanted(prompt))[0] + 1e-9


def test_embedding_search_comes_nearer(pipe, patched):
    few, many = (
        EmbeddingSearch(most=1, iterations=n).run(measurer(pipe, [frozenset()]), patched, PROBES) for n in (1, 25)
    )
    assert many["distance_after"] < 0.8 * many["distance_before"]
    assert few["distance_before"] == many["distance_before"]


def test_the_search_leaves_the_empty_prompt_of_guidance_alone(pipe):
    search = Embeddings(pipe, 1.0)
    empty = pipe._encode([""])
    with search.on():
        first = pipe._encode(["a cat"])
        search.rows[id(search.tables[0])].data.fill_(1.0)
        assert not torch.equal(pipe._encode(["a cat"]).values[0], first.values[0])
        assert torch.equal(pipe._encode([""]).values[0], empty.values[0])  # has as many tokens with its padding


def test_prompts_are_searched_as_they_would_be_alone(pipe, patched):
    judge = measurer(pipe, [frozenset()])
    both = EmbeddingSearch(iterations=6).run(judge, patched, PROBES)
    each = [EmbeddingSearch(iterations=6).run(judge, patched, [probe]) for probe in PROBES]
    for name in ("distance_before", "distance_after"):
        assert both[name] == pytest.approx(sum(found[name] for found in each) / 2, rel=1e-3)


def test_inversion_comes_nearer_to_the_old_predictions(pipe, patched):
    found = Inversion(most=1, iterations=20, levels=2).run(measurer(pipe, [frozenset()]), patched, PROBES)
    assert found["distance_after"] < 0.8 * found["distance_before"]


def test_evolved_prompts_do_not_name_the_concept(pipe, patched):
    search = Genetic(most=1, length=3, population=8, generations=1)
    found = search.run(measurer(pipe, [frozenset()]), patched, PROBES)
    assert found["prompts"]
    assert not any(word in text.split() for text in found["prompts"] for word in ("cat", "cats", "kitten"))


def test_noise_search_succeeds_where_one_seed_does(pipe, patched):
    seen = [frozenset(), frozenset(), frozenset({"cat"}), frozenset()]  # the second seed of the first prompt
    found = Noise(most=2, tries=2).run(measurer(pipe, seen), patched, PROBES)
    assert (found["success"]["score"], found["without"]["score"], found["share_of_pictures"]) == (0.5, 0.0, 0.25)


def test_paraphrases_keep_the_words():
    made = {rewritten("a cat on grass, neon style", k) for k in range(6)}
    assert len(made) > 3
    assert all("cat" in text and "neon style" in text for text in made)
    assert Paraphrase().times == 3


def test_an_unknown_attack_is_named():
    with pytest.raises(UserError, match="no attack 'magic'; there are wording"):
        attack_of("magic")
