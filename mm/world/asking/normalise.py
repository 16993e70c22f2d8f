"""Brings a question into one spelling: no contractions, no polite openings, no tags at the end.

Design choices
- "isn't there a cat?" asks whether there is one, "there isn't a cat?" and "is there no cat?" whether there is none. So
  a contracted negation at the beginning is marked (`soft`) and removed; any other becomes the word "not".
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_APART = re.compile(r"\b(what|where|who|how|that|there|it|here|which|when|why|one|everything)'?s\b(?! of\b)")
_WORD_ONLY = re.compile(r"\b(is|are|do|does|has|have|ca|did|was|would|could|should)n'?t\b")
_ENDINGS = (("'re", " are"), ("'m", " am"), ("'ve", " have"), ("'d", " would"), ("'ll", " will"), ("'s", ""))
_AUX = r"(?:is|are|was|were|do|does|did|has|have|can|could|would|will|isn't|aren't|don't|doesn't|hasn't|haven't|can't)"
_TAG = re.compile(
    rf"[,;]\s*(?:{_AUX}\s+(?:it|they|there|he|she|you|we|i)(?:\s+not)?|right|correct|true|yes|no|ok|okay|huh|or not"
    r"|or no|am i right|is that (?:right|correct|true|so)|please|thanks|thank you)\s*$|\s+(?:or not|please|at all)\s*$"
)
_OPENINGS = re.compile(
    r"^(?:please|kindly|hey|hi|hello|ok|okay|well|so|now|and|but|then|also|tell me|let me know|say|do you know"
    r"|(?:can|could|would|will) you (?:please |kindly |also )*(?=(?:tell|show|say|name|list|count|describe|check"
    r"|explain|give|let|caption|mention|identify|find out)\b)"
    r"|(?:do|would) you (?:think|say|agree)(?: that)?|i(?:'d| would|) (?:like|want|need|wish)(?: to (?:know|see|hear))"
    r"|i(?: am|) (?:wonder|wondering|curious)|(?:is|isn't) it (?:true|right|correct|so|the case) that|am i right that"
    r"|i (?:think|believe|guess)(?: that)?|check|find out|(?:if|whether)(?= )|that(?= the| there))\b[\s,:]*"
)


@dataclass(frozen=True, kw_only=True)
class Plain:
    """A normalized question.

    Attributes:
        text: Lower case, without marks other than commas and hyphens, single spaces.
        soft: It began with a contracted negation ("isn't there ...").
    """

    text: str
    soft: bool


def normalise(text: str) -> Plain:
    """A question in one spelling."""
    line = re.sub(r"[\u2018\u2019`\u00b4]", "'", text.lower())
    line = re.sub(r"[.?!\s]+$", "", " ".join(line.split()))
    before = None
    while before != line:
        before = line
        line = re.sub(r"[.?!,;:\s]+$", "", _OPENINGS.sub("", _TAG.sub("", line))).strip(" ,;:\"'")
    soft = bool(re.match(r"(?:is|are|do|does|has|have|ca|was)n'?t\b", line))
    line = _APART.sub(r"\1 is", line)
    line = _WORD_ONLY.sub(
        lambda m: ("can" if m[1] == "ca" else m[1]) + (" " if soft and not m.start() else " not"), line
    )
    line = re.sub(r"\bcannot\b", "can not", line)
    for ending, whole in _ENDINGS:
        line = re.sub(rf"(?<=\w){ending}\b", whole, line)
    line = re.sub(r"[^a-z0-9<>,_\s'-]", " ", line)
    return Plain(text=" ".join(line.split()), soft=soft)
