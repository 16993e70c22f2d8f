"""Concepts, and the prompts in which they are erased and others are kept.

Design choices
- A concept is erased in contexts: the same prompts with the target and with the anchor in its place. Text encoders
  spread a word over its neighbours, so an edit from the word alone leaves traces.
- A family may bring contexts of its own (mm-tiny knows its own grammar only); others get templates of plain English.

Legend: prompts are texts; `{}` in a template stands for the concept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from mm.core.errors import UserError
from mm.erasure.names import COMMON_NAMES
from mm.families import Family, family_of
from mm.families.family import resolve

Kind = Literal["object", "style", "attribute"]
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
    """What is erased: "wolf"; a style; an attribute, or with `of` an attribute of one concept ("red" of "apple")."""

    name: str
    kind: Kind = "object"
    of: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise UserError(f"a target is {self.name!r}; name the concept that is to be erased")
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


def parse(target: str | Concept) -> Concept:
    """A concept from a text: "wolf", "style: van gogh", "red of apple"."""
    if isinstance(target, Concept):
        return target
    text = target.strip()
    head, found, rest = text.partition(":")
    if found and head.strip() in ("object", "style", "attribute"):
        name, _, of = rest.strip().partition(" of ") if head.strip() == "attribute" else (rest.strip(), "", "")
        return Concept(name=name.strip(), kind=head.strip(), of=of.strip() or None)  # type: ignore[arg-type]
    return Concept(name=text)


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
