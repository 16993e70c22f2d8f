"""How targets, anchors and retained concepts are read: kinds, synonyms and "X of Y" of a closed vocabulary."""

from __future__ import annotations

from typing import Any

import pytest

from mm.core.errors import UserError
from mm.erasure.checks import Call, check_call
from mm.erasure.concepts import COMMON_NAMES, Concept, PlainContexts, parse
from mm.world import lexicon
from mm.world.concepts import WorldContexts

CLOSED, OPEN = WorldContexts(), PlainContexts(COMMON_NAMES)


def checked(targets: Any, contexts: Any = CLOSED, **given: Any) -> Call:
    usual: dict[str, Any] = {"anchors": None, "retain": "auto", "method": "uce", "strength": 1.0, "scope": "draw"}
    return check_call(targets, settings={}, contexts=contexts, **(usual | given))


@pytest.mark.parametrize(
    ("text", "kind", "name", "of"),
    [
        ("kitty", "object", "cat", None), ("kittens", "object", "cat", None), ("The Wolf", "object", "wolf", None),
        ("object: puppy", "object", "dog", None), ("STYLE: Watercolour", "style", "watercolor", None),
        ("watercolor", "style", "watercolor", None), ("8-bit", "style", "pixel art", None),
        ("crimson", "attribute", "red", None), ("attribute: red of kitty", "attribute", "red", "cat"),
        ("scarlet of apples", "attribute", "red", "apple"), ("seaside", "object", "beach", None),
        ("object: night", "object", "night", None),
    ],
)  # fmt: skip
def test_words_are_read_as_prompts_read_them(text: str, kind: str, name: str, of: str | None) -> None:
    [concept] = checked([text]).concepts
    assert (concept.kind, concept.name, concept.of) == (kind, name, of)
    assert parse(concept.text, CLOSED) == concept  # what a report holds is read as the same


def test_every_synonym_of_the_lexicon_is_the_concept_that_prompts_take_it_for() -> None:
    from mm.world.lexicon_tables import tables
    from mm.world.vocabulary import OBJECTS

    table = tables("draw")
    words = [w for w, other in table.synonyms.items() if table.nouns.get(other) in OBJECTS and w.isascii()]
    assert len(words) > 100
    for word in words:
        [concept] = checked([word]).concepts
        assert concept.name in lexicon.read(word).text or concept.name == table.nouns[table.synonyms[word]], word


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("style: wolf", "'wolf' is an object, not a style; give 'wolf'"),
        ("style: kitty", "'kitty' is an object, not a style; give 'cat'"),
        ("object: watercolor", "'watercolor' is a style, not an object; give 'style: watercolor'"),
        ("attribute: neon", "'neon' is a style, not an attribute; give 'style: neon'"),
        ("style: red", "'red' is a colour, not a style; give 'attribute: red'"),
        ("object: red", "'red' is a colour, not an object; give 'attribute: red'"),
        ("style: night", "'night' is a background, not a style; give 'night'"),
        ("background: night", "'background' in 'background: night' is no kind of target; give 'night'"),
        ("colour: red of apple", "is no kind of target; give 'attribute: red of apple'"),
        ("artist: neon", "'artist' in 'artist: neon' is no kind of target .*; give 'style: neon'"),
        ("attribute: wolf of apple", "'wolf' is an object, not an attribute; give 'wolf'"),
        ("attribute: red of zzz", "'red of zzz': the model does not know 'zzz'"),
        ("red of zzz", "'red of zzz': the model does not know 'zzz'"),
        ("attribute: zzz of apple", "the model does not know 'zzz'"),
        ("attribute: red of neon", "'red of neon': 'neon' is a style; an attribute is one of an object"),
        ("attribute: red of ", "name the object whose red is erased"),
        ("zzz of apple", "the model does not know 'zzz"),
        ("mice", "the model does not know 'mice', so it cannot be erased; did you mean fox or rabbit"),
        ("catt", "did you mean cat"),
        ("two cats", "the model does not know 'two cats'"),
        ("a red cat", "the model does not know 'a red cat'"),
        (Concept(name="wolf", kind="style"), "'wolf' is an object, not a style"),
        (3, "holds 3; give texts alone"),
    ],
)
def test_what_does_not_fit_is_named(text: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        checked([text])


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match="the kind of 'wolf' is 'colour'; give object, style, attribute"):
        Concept(name="wolf", kind="colour")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("targets", "given", "said"),
    [
        (["cat", "kitty"], {}, "the target 'cat' is given twice"),
        (["cat"], {"retain": ["kittens"]}, "'kittens' is a target and retained"),
        (["cat"], {"retain": ["style: dog"]}, "'dog' is an object, not a style"),
        (["cat"], {"retain": ["zzz"]}, "the retained concept is 'zzz', and the model does not know 'zzz'"),
        (["cat"], {"anchors": "kitty"}, "'cat' is target and anchor"),
        (["cat", "dog"], {"anchors": ["puppy", "fox"]}, "the anchor 'dog' is a target itself"),
        (["cat"], {"anchors": "a zzz"}, "the anchor is 'a zzz', and the model does not know 'zzz'"),
    ],
)
def test_anchors_and_retained_concepts_are_read_alike(targets: list[str], given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        checked(targets, **given)


def test_anchors_and_retained_concepts_take_their_known_names() -> None:
    call = checked(["wolf", "kitty"], anchors=["puppy", ""], retain=["object: foxes", "<mug>", "a red dog"])
    assert call.anchors == {"wolf": "dog", "cat": ""}
    assert call.retained == ["fox", "<mug>", "a red dog"]
    assert checked("wolf").retained is None


def test_an_open_vocabulary_takes_any_word_in_any_kind() -> None:
    concepts = checked(["style: wolf", "Statue of Liberty", "attribute: red of zzz", "kitty"], OPEN).concepts
    assert [c.text for c in concepts] == ["style: wolf", "Statue of Liberty", "attribute: red of zzz", "kitty"]
    assert checked(["wolf"], OPEN, retain=["object: dog"]).retained == ["dog"]


def test_a_colour_of_an_open_vocabulary_is_no_object_of_that_text() -> None:
    with pytest.raises(UserError, match="'color' in 'color: red' is no kind of target; give 'attribute: red'"):
        checked(["color: red"], OPEN)
    assert checked(["Star Wars: A New Hope"], OPEN).concepts[0].kind == "object"
