"""Prompts by which an erasure is measured.

Design choices
- A probe names the label that a faithful picture of its prompt has, so that any judge that gives labels can score it.
- Prompts for tuning and prompts for reporting are apart: a method, its settings and its rounds are chosen on the first
  kind alone.
- A family may bring probes of its own (`Contexts.probes`); others get templates of plain English, which differ from
  those that patches are made from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mm.core.errors import UserError
from mm.erasure.concepts import Concept

Role = Literal["target", "wording", "retained", "lookalike"]
Split = Literal["tune", "report"]
ROLES: tuple[Role, ...] = ("target", "wording", "retained", "lookalike")

_TUNE = ("{} in a garden", "a photo of a {} by a river", "an old {}", "one {} on the street", "a {} under a tree")
_REPORT = ("a picture showing a {} outdoors", "close view of the {}", "there is a {} on the left", "a {} in the rain",
           "a {} seen from above", "the {} stands in a field", "a detailed {}", "a {} in an empty room")  # fmt: skip
_WORDING = ("please draw a {}", "I would like to see a {}", "{}, highly detailed", "imagine there were a {} here",
            "the word is {}; show it", "what does a {} look like?")  # fmt: skip
_STYLE_TUNE = ("a mountain in {} style", "a bird, {}", "a village painted like {}")
_STYLE_REPORT = ("a harbour as {}", "an apple rendered in {}", "a cat, in the manner of {}", "{}: a bridge")
_STYLE_WORDING = ("please use {} for a tree", "do it the {} way: a lake")


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One prompt of a measurement.

    Args:
        prompt: what is drawn.
        role: "target" asks for an erased concept, "wording" does so in words that no method saw, "lookalike" asks for
            one that resembles a target, "retained" for any other.
        concept: label that a faithful picture has.
        cross: label of another domain that the picture has as well, such as its style; None for none.
    """

    prompt: str
    role: Role
    concept: str
    cross: str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"a probe of role {self.role!r}; roles: {', '.join(ROLES)}")


def plain_probes(
    targets: Sequence[Concept], retained: Sequence[str], *, split: Split = "report", each: int = 24
) -> list[Probe]:
    """Probes of plain English.

    Args:
        targets: what is erased.
        retained: names that stay; the first half of them, the nearest, count as look-alikes.
        split: for tuning or for reporting.
        each: prompts of each role, at most as many as there are templates.
    """
    made: list[Probe] = []
    for target in targets:
        wanted = f"{target.name} {target.of}" if target.of else target.name
        plain, wording = _templates(target, split)
        made += [Probe(prompt=t.format(wanted), role="target", concept=wanted) for t in plain[:each]]
        made += [Probe(prompt=t.format(wanted), role="wording", concept=wanted) for t in wording[:each]]
    plain, _ = _templates(targets[0], split)
    near = len(retained) // 2
    for k, name in enumerate(retained):
        role: Role = "lookalike" if k < near else "retained"
        made += [Probe(prompt=t.format(name), role=role, concept=name) for t in plain[: max(1, each // len(retained))]]
    return made


def _templates(target: Concept, split: Split) -> tuple[Sequence[str], Sequence[str]]:
    if target.kind == "style":
        return (_STYLE_TUNE, ()) if split == "tune" else (_STYLE_REPORT, _STYLE_WORDING)
    return (_TUNE, ()) if split == "tune" else (_REPORT, _WORDING)


def probes_of(
    contexts: Any, targets: Sequence[Concept], retained: Sequence[str], *, split: Split = "report", each: int = 24
) -> list[Probe]:
    """The family's own probes, or those of plain English.

    Raises:
        UserError: where none of them asks for a target.
    """
    own = getattr(contexts, "probes", None)
    found = (own or plain_probes)(targets, retained, split=split, each=each)
    if not any(probe.role == "target" for probe in found):
        raise UserError("none of the probes asks for a target; there is nothing to measure")
    return list(found)
