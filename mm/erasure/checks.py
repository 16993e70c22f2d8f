"""What is checked before an erasure is made: the call, the method's settings, and the words of closed vocabularies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mm.core.checks import number, texts, whole
from mm.core.errors import UserError
from mm.core.nouns import counted
from mm.erasure.concepts import ClosedContexts, Concept, Contexts, hint, parse
from mm.erasure.methods.protocol import Method
from mm.erasure.methods.registry import method_of

Scope = Literal["draw", "read"]
COUNTS = ("rank", "picture_rank", "steps", "batch", "prompts")  # settings that are 1 or more
MAX_SETTING = 10**6


@dataclass(frozen=True, kw_only=True)
class Call:
    """A checked call.

    Attributes:
        maker: the method.
        settings: of it, defaults filled in.
        concepts: the targets, as the model names them.
        anchors: of each target, if given.
        retained: what stays; None for the targets' neighbours.
    """

    maker: Method
    settings: Mapping[str, Any]
    concepts: Sequence[Concept]
    anchors: Mapping[str, str] | None
    retained: Sequence[str] | None


def check_call(
    targets: str | Concept | Sequence[str | Concept], *, anchors: str | Sequence[str] | None,
    retain: str | Sequence[str], method: str, strength: float, scope: str, settings: Mapping[str, Any],
    contexts: Contexts | None,
) -> Call:  # fmt: skip
    """Checks a call; no model is needed.

    Args:
        targets: and the others as in `mm.erase`.
        contexts: of the model's family, as far as it is known; where its world is closed, each word must be known.

    Raises:
        UserError: for the first thing that does not fit.
    """
    maker = method_of(method)
    if unknown := sorted(set(settings) - set(maker.defaults)):
        raise UserError(f"{method} has no setting {unknown[0]!r}; it has {', '.join(maker.defaults)}")
    for name, value in settings.items():
        _check_setting(name, maker.defaults[name], value)
    number("strength", strength, -MAX_SETTING, MAX_SETTING)
    if not 0 < strength <= 2:
        raise UserError(f"strength is {strength}; give a number above 0, at most 2 (1 erases)")
    if scope not in get_args(Scope):
        raise UserError(f"scope is {scope!r}; give {' or '.join(get_args(Scope))}")
    concepts = _concepts(targets, contexts)
    placed = None if anchors is None else _placed(concepts, anchors, contexts)
    kept = None if retain == "auto" else _retained(concepts, retain, contexts)
    return Call(maker=maker, settings=maker.defaults | dict(settings), concepts=concepts, anchors=placed, retained=kept)


def _check_setting(name: str, default: Any, value: Any) -> None:
    """Raises UserError where a setting is not of its default's type, or below what has an effect."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UserError(f"{name} is {value!r}; give true or false")
    elif isinstance(default, int):
        whole(name, value, 1 if name in COUNTS else 0, MAX_SETTING)
    elif isinstance(default, float):
        number(name, value, 0, MAX_SETTING)


def _concepts(targets: str | Concept | Sequence[str | Concept], contexts: Contexts | None) -> list[Concept]:
    given = [targets] if isinstance(targets, Concept) else _each_target(targets)
    if not given:
        raise UserError("there is no target; name at least one concept to erase")
    concepts = [parse(target, contexts) for target in given]
    names = [(str(c).casefold(), c.kind) for c in concepts]
    twice = [str(c) for i, c in enumerate(concepts) if names[i] in names[:i]]
    if twice:
        raise UserError(f"the target {twice[0]!r} is given twice")
    return concepts


def _each_target(targets: str | Sequence[str | Concept]) -> list[str | Concept]:
    if isinstance(targets, Sequence) and any(isinstance(one, Concept) for one in targets):
        return list(targets)
    return list(texts("targets", targets))


def _placed(
    concepts: Sequence[Concept], given: str | Sequence[str], contexts: Contexts | None
) -> dict[str, str]:  # fmt: skip
    """The given anchor of each target, as the model names it."""
    words = [given] * len(concepts) if isinstance(given, str) else texts("anchors", given)
    if len(words) != len(concepts):
        raise UserError(
            f"{counted(len(concepts), 'target')} and {counted(len(words), 'anchor')}; give one anchor, or one for each "
            "target"
        )
    each = [_named(text, "anchor", contexts) for text in words]
    for concept, anchor in zip(concepts, each, strict=True):
        if str(concept).casefold() == anchor.casefold():
            raise UserError(f"{str(concept)!r} is target and anchor; choose another anchor")
    targeted = {c.name.casefold() for c in concepts if c.of is None}
    if erased := [anchor for anchor in each if anchor.casefold() in targeted]:
        raise UserError(f"the anchor {erased[0]!r} is a target itself, and would be erased; choose another anchor")
    return dict(zip(map(str, concepts), each, strict=True))


def _retained(concepts: Sequence[Concept], given: str | Sequence[str], contexts: Contexts | None) -> list[str]:
    """The given concepts that stay, as the model names them."""
    words = texts("retain", given)
    if any(not text.strip() for text in words):
        raise UserError("a retained concept is empty; give words such as 'dog'")
    kept = [_named(text, "retained concept", contexts) for text in words]
    targets = {c.name.casefold() for c in concepts}
    if both := [text for text, name in zip(words, kept, strict=True) if name.casefold() in targets]:
        raise UserError(f"{both[0]!r} is a target and retained; it can only be one of them")
    return kept


def _named(text: str, what: str, contexts: Contexts | None) -> str:
    """The name of an anchor or of a concept that stays; a closed vocabulary takes other texts of its own words, too."""
    if not text.strip():
        return ""
    if not isinstance(contexts, ClosedContexts):
        return str(parse(text))
    plain = parse(text).name
    if contexts.concept(plain) is not None:
        return str(parse(text, contexts))
    if lost := contexts.unknown(plain):
        raise UserError(f"the {what} is {text!r}, and the model does not know {lost[0]!r}{hint(lost[0], contexts)}")
    return plain
