"""What is checked before an erasure is made: the call, the method's settings, and the words of closed vocabularies."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mm.core.checks import number, whole
from mm.core.errors import UserError
from mm.core.nouns import counted
from mm.erasure.concepts import Concept, Contexts, parse
from mm.erasure.methods.protocol import Method
from mm.erasure.methods.registry import method_of

Scope = Literal["draw", "read"]
COUNTS = ("rank", "picture_rank", "steps", "batch", "prompts")  # settings that are 1 or more
MAX_SETTING = 10**6


@dataclass(frozen=True, kw_only=True)
class Call:
    """A checked call: the method, its settings with defaults filled in, the targets, and their anchors if given."""

    maker: Method
    settings: Mapping[str, Any]
    concepts: Sequence[Concept]
    anchors: Mapping[str, str] | None


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
    concepts = _concepts(targets)
    placed = None if anchors is None else _placed(concepts, anchors)
    kept = [] if retain == "auto" else [retain] if isinstance(retain, str) else list(retain)
    if any(not name.strip() for name in kept):
        raise UserError("a retained concept is empty; give words such as 'dog'")
    targeted = {c.name.casefold() for c in concepts if c.of is None}
    if both := [name for name in kept if parse(name).name.casefold() in {c.name.casefold() for c in concepts}]:
        raise UserError(f"{both[0]!r} is a target and retained; it can only be one of them")
    if erased := [name for name in (placed or {}).values() if parse(name or "nothing").name.casefold() in targeted]:
        raise UserError(f"the anchor {erased[0]!r} is a target itself, and would be erased; choose another anchor")
    if contexts is not None:
        _check_known(contexts, concepts, {"anchor": list((placed or {}).values()), "retained concept": kept})
    return Call(maker=maker, settings=maker.defaults | dict(settings), concepts=concepts, anchors=placed)


def _check_setting(name: str, default: Any, value: Any) -> None:
    """Raises UserError where a setting is not of its default's type, or below what has an effect."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UserError(f"{name} is {value!r}; give true or false")
    elif isinstance(default, int):
        whole(name, value, 1 if name in COUNTS else 0, MAX_SETTING)
    elif isinstance(default, float):
        number(name, value, 0, MAX_SETTING)


def _concepts(targets: str | Concept | Sequence[str | Concept]) -> list[Concept]:
    given = [targets] if isinstance(targets, str | Concept) else list(targets)
    if not given:
        raise UserError("there is no target; name at least one concept to erase")
    concepts = [parse(target) for target in given]
    names = [(str(c).casefold(), c.kind) for c in concepts]
    twice = [str(c) for i, c in enumerate(concepts) if names[i] in names[:i]]
    if twice:
        raise UserError(f"the target {twice[0]!r} is given twice")
    return concepts


def _placed(concepts: Sequence[Concept], given: str | Sequence[str]) -> dict[str, str]:
    """The given anchor of each target."""
    each = [given] * len(concepts) if isinstance(given, str) else list(given)
    if len(each) != len(concepts):
        raise UserError(
            f"{counted(len(concepts), 'target')} and {counted(len(each), 'anchor')}; give one anchor, or one for each "
            "target"
        )
    pairs = dict(zip(map(str, concepts), each, strict=True))
    if same := [target for target, anchor in pairs.items() if target.casefold() == anchor.casefold()]:
        raise UserError(f"{same[0]!r} is target and anchor; choose another anchor")
    return pairs


def _check_known(contexts: Any, concepts: Sequence[Concept], words: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError for a concept that a closed world lacks; an open one reads any word."""
    if not getattr(contexts, "closed", False):
        return
    known = contexts.known()
    for concept in concepts:
        if concept.name not in known:
            hint = _hint(concept.name, known)
            raise UserError(f"the model does not know {concept.name!r}, so it cannot be erased{hint}")
    unknown = getattr(contexts, "unknown", None)
    for what, texts in words.items():
        for text in texts:
            if unknown is not None and text not in known and (lost := unknown(text)):
                word = lost[0]
                raise UserError(f"the {what} is {text!r}, and the model does not know {word!r}{_hint(word, known)}")


def _hint(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, 3)
    return f"; did you mean {' or '.join(close)}?" if close else "; `mm words` lists what it knows"
