"""Concepts, and the prompts in which they are erased and others are kept.

Design choices
- A concept is erased in contexts: the same prompts with the target and with the anchor in its place. Text encoders
  spread a word over its neighbours, so an edit from the word alone leaves traces.
- A family may bring contexts of its own (mm-tiny knows its own grammar only); others get templates of plain English.
- In a closed vocabulary the contexts say which concept a text names, with the synonyms that prompts know, and of which
  kind it is (`ClosedContexts`): a kind that the user gives is checked against theirs.

Legend: prompts are texts; `{}` in a template stands for the concept.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from mm.core.errors import UserError
from mm.core.nouns import with_article
from mm.erasure.names import COMMON_NAMES
from mm.families import Family, family_of
from mm.families.family import resolve

Kind = Literal["object", "style", "attribute"]
_NO_KINDS = {"background": "{}", "color": "attribute: {}", "colour": "attribute: {}"}  # what is given for each
OBJECTS: tuple[str, ...] = (
    "{}", "a {}", "a photo of a {}", "a picture of a {}", "a painting of a {}", "a {} on a table", "a {} in the snow",
    "a {} at night", "a close-up of a {}", "two people looking at a {}", "a {} and a chair", "a red {}", "a small {}",
    "a {} in front of a house", "a drawing of a {}", "many {}", "the {}", "an image with a {} in the background",
)  # fmt: skip
STYLES: tuple[str, ...] = (
    "{}", "a picture in the style of {}", "a house in the style of {}", "a landscape, {}", "a portrait, {} style",
    "a dog in {} style", "a city street in the style of {}", "flowers in a vase, {}", "art by {}", "a painting, {}",
)  # fmt: skip
ATTRIBUTES: tuple[str, ...] = (
    "{}", "a {} car", "a {} house", "a {} dress", "a {} ball on grass", "a photo of a {} chair", "two {} birds",
    "a {} flower in a vase", "a cat next to a {} box",
)  # fmt: skip
GENERAL: tuple[str, ...] = (
    "", "a photo", "a house by the sea", "a busy street at night", "a portrait of a woman", "a man riding a bicycle",
    "a bowl of fruit on a wooden table", "mountains at sunrise", "a child playing in a garden", "an old book",
    "a forest path", "a train in the snow", "abstract painting", "a city skyline", "flowers in a vase",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Concept:
    """What is erased.

    Attributes:
        name: "wolf".
        kind: "object", "style" or "attribute". A closed vocabulary, which knows what its words are, puts the right kind
            in the place of "object", the default, and refuses another one that does not fit.
        of: of an attribute: the one object whose attribute is erased ("red" of "apple"); None for that of all.
    """

    name: str
    kind: Kind = "object"
    of: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise UserError(f"a target is {self.name!r}; name the concept that is to be erased")
        if self.kind not in get_args(Kind):
            raise UserError(f"the kind of {self.name!r} is {self.kind!r}; give {', '.join(get_args(Kind))}")
        if self.of is not None and self.kind != "attribute":
            raise UserError(f"{self.name!r} of {self.of!r}: only an attribute can be one of a concept")

    def __str__(self) -> str:
        return self.name if self.of is None else f"{self.name} of {self.of}"

    @property
    def text(self) -> str:
        """The text that `parse` reads as this concept."""
        return str(self) if self.kind == "object" else f"{self.kind}: {self}"


class Contexts(Protocol):
    """Prompts of a family for erasure."""

    def pairs(self, target: Concept, anchor: str, count: int) -> Sequence[tuple[str, str]]:
        """At most `count` prompts with the target, each with the same prompt that has the anchor in its place."""
        ...

    def retained(self, names: Sequence[str], targets: Sequence[Concept]) -> Sequence[str]:
        """Prompts with the names, and general ones, none of which holds a target."""
        ...

    def candidates(self) -> Sequence[str]:
        """Concepts among which neighbours and anchors are searched."""
        ...


@runtime_checkable
class ClosedContexts(Protocol):
    """What contexts of a closed vocabulary say of its words."""

    def concept(self, text: str) -> tuple[Concept, str] | None:
        """The concept that a text names, in any word for it, and what it is ("object", "colour"); else None."""
        ...

    def known(self) -> Sequence[str]:
        """The name of everything that can be erased."""
        ...

    def unknown(self, text: str) -> Sequence[str]:
        """Words of a text that the model does not know."""
        ...

    def nearest(self, word: str) -> Sequence[str]:
        """Concepts that are nearest to one that the model does not know; empty where none is."""
        ...


def parse(target: str | Concept, contexts: Contexts | None = None) -> Concept:
    """A concept from a text.

    Args:
        target: "wolf", "style: van gogh", "attribute: red of apple", or a concept.
        contexts: of the model. In a closed vocabulary they say which concept the words name ("kitty" is a cat), and
            "red of apple" is an attribute without saying so. In an open one a text without a kind is an object.

    Raises:
        UserError: for an empty text, and in a closed vocabulary for a word that it lacks or a kind that does not fit.
    """
    made = target if isinstance(target, Concept) else _split(target)
    if not isinstance(contexts, ClosedContexts):
        return made
    stated = made.kind != "object" or (isinstance(target, str) and _kind_of(target) is not None)
    return _known(made, stated, contexts)


def _kind_of(text: str) -> Kind | None:
    """The kind that a text states before a colon."""
    head, found, _ = text.partition(":")
    head = head.strip().casefold()
    return next((kind for kind in get_args(Kind) if found and head == kind), None)


def _split(target: str) -> Concept:
    """A concept from a text by its form alone."""
    if not isinstance(target, str):
        raise UserError(f"a target is {with_article(type(target).__name__)}; give a text such as 'wolf', or a Concept")
    text, kind = target.strip(), _kind_of(target)
    if kind is None:
        head, _, named = text.partition(":")
        if head.strip().casefold() in _NO_KINDS and named.strip():
            right = _NO_KINDS[head.strip().casefold()].format(named.strip())
            raise UserError(f"{head.strip()!r} in {text!r} is no kind of target; give {right!r}")
        return Concept(name=text)
    rest = text.partition(":")[2].strip()
    name, of, owner = f"{rest} ".partition(" of ") if kind == "attribute" else (rest, "", "")
    if of and not owner.strip():
        raise UserError(f"the target is {text!r}; name the object whose {name.strip()} is erased, or leave 'of' out")
    return Concept(name=name.strip(), kind=kind, of=owner.strip() or None)


def _known(made: Concept, stated: bool, contexts: ClosedContexts) -> Concept:
    """A concept as a closed vocabulary names it, with its kind there."""
    found = contexts.concept(made.name)
    name, of, owner = made.name.partition(" of ")
    if found is None and of and not stated:
        found, made = contexts.concept(name), replace(made, name=name, kind="attribute", of=owner)
        stated = True
    if found is None:
        _refuse_kind(made.name, contexts)
        raise UserError(f"the model does not know {made.name!r}, so it cannot be erased{hint(made.name, contexts)}")
    concept, what = found
    if stated and made.kind != concept.kind:
        raise UserError(f"{made.name!r} is {with_article(what)}, not {with_article(made.kind)}; give {concept.text!r}")
    return concept if made.of is None else replace(concept, of=_owner(made, contexts))


def _refuse_kind(text: str, contexts: ClosedContexts) -> None:
    """Raises UserError for a known concept behind a kind that there is not."""
    head, colon, named = text.partition(":")
    found = contexts.concept(named.strip()) if colon else None
    if found is not None:
        kinds = ", ".join(get_args(Kind))
        raise UserError(f"{head.strip()!r} in {text!r} is no kind of target ({kinds}); give {found[0].text!r}")


def _owner(made: Concept, contexts: ClosedContexts) -> str:
    """The object whose attribute is erased, as a closed vocabulary names it."""
    assert made.of is not None
    found = contexts.concept(made.of)
    if found is None:
        raise UserError(f"{str(made)!r}: the model does not know {made.of!r}{hint(made.of, contexts)}")
    if found[1] != "object":
        raise UserError(f"{str(made)!r}: {made.of!r} is {with_article(found[1])}; an attribute is one of an object")
    return found[0].name


def hint(word: str, contexts: ClosedContexts) -> str:
    """The end of a message of an unknown word: what it may have meant."""
    known = contexts.known()
    close = [*contexts.nearest(word)] or difflib.get_close_matches(word.casefold(), known, 3)
    return f"; did you mean {' or '.join(close)}?" if close else "; `mm words` lists what it knows"


class PlainContexts:
    """Templates of plain English."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def pairs(self, target: Concept, anchor: str, count: int) -> list[tuple[str, str]]:
        """Templates of the concept's kind."""
        if target.of is not None:
            whole = [t.replace("{}", f"{{}} {target.of}") for t in OBJECTS]
            return [(t.format(target.name), " ".join(t.format(anchor).split())) for t in whole[:count]]
        templates = {"object": OBJECTS, "style": STYLES, "attribute": ATTRIBUTES}[target.kind]
        return [(t.format(target.name), " ".join(t.format(anchor).split())) for t in templates[:count]]

    def retained(self, names: Sequence[str], targets: Sequence[Concept]) -> list[str]:
        """Some templates for each name, and general prompts."""
        made = [template.format(name) for name in names for template in OBJECTS[:6]]
        return [*GENERAL, *made]

    def candidates(self) -> tuple[str, ...]:
        """The names given."""
        return self.names


def contexts_of(pipe: Any) -> Contexts:
    """The contexts that a pipeline's family brings, or plain English."""
    return contexts_for(family_of(pipe))


def contexts_for(family: Family | None) -> Contexts:
    """The contexts that a family brings, or plain English."""
    return resolve(family.contexts)() if family is not None and family.contexts else PlainContexts(COMMON_NAMES)
