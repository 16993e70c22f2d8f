"""What a turn of a conversation wants: a new picture, a change, an answer, or a short reply.

Design choices
- The words alone decide, not the turns before: "draw ..." draws something new at any length of a conversation. What a
  turn needs of earlier ones is in `Seen` (what the picture shows, what "it" stands for).
- What is none of these gets an honest reply. Nothing is drawn on a guess.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from mm.world.asking.edit_words import is_edit
from mm.world.asking.parse import parse_question
from mm.world.asking.phrases import NOUNS, clause_of
from mm.world.asking.query import Unread
from mm.world.asking.small_talk import NO_PICTURE, UNCLEAR, small_talk, without_greeting

_FIRST = (
    r"^(?:please|kindly|now|then|next|also|and|but|so|ok|okay|well|just|actually|instead|maybe|great|this time"
    r"|for once|hey|(?:oh |no,? )?wait(?: a (?:moment|minute|second))?|hold on|hang on|oh|ah|hm+|um+|uh|oops|whoops"
    r"|(?:no|nope|yes|yeah|sorry|my mistake|wrong|scratch (?:it|that)|never ?mind|forget (?:it|that)"
    r"|(?:much |a lot )?(?:better|closer)|nice|good|cool|perfect|lovely)(?=,)"
    r"|(?:no,? )?i (?:meant?|said|asked for|wanted)|rather|not (?:an? )?[^,]{1,40}(?=,)"
    r"|(?:can|could|would|will) you(?: please| kindly| now| also)*|i (?:would like|want|need) you to|let us"
    r"|let's|try to|go on and|you can"
    r"|would you mind|do|after that|finally|first)[\s,:]+"
)
_LAST = (
    r"[\s,]+(?:please|now|thanks|thank you|for me|then|too|as well|if you can|will you|would you|again please"
    r"|right now)$"
)
_DRAW = r"^(?:draw|sketch|illustrate|generate|create|produce|design|imagine)\b(?: (?:me|us|now))*\s*"
_SHOW = (
    r"^(?:paint|make|show|give|render|do)(?: me| us)?\s+(?={new})|^(?:i(?: would|'d)? (?:want|like|need"
    r"|wish)(?: to (?:see|have))?"
    r"|let me see|let me have|how about|what about|show me|give me|can i (?:have|see|get)|could i (?:have|see"
    r"|get)|may i (?:have|see))\s+(?={new})"
)
_NEW = (
    r"(?:(?:an?|one|two|three|four|five|six|some|several|many|[1-9]\d*|another) (?=[a-z0-9<])"
    r"(?!look|question|hint|moment|more)|(?:pixel art|watercolou?r|neon lights) of )"
)
_SHOW = _SHOW.replace("{new}", _NEW)
_AGAIN = (
    r"(?:draw |make |show |give |do |try |paint )?(?:me )?(?:(?:it|that|this|the same|them)? ?(?:again"
    r"|once more|one more time|anew)"
    r"|another(?: one| picture| version| try)?|one more|(?:a )?(?:different|new) one|redo(?: it| that)?"
    r"|the same(?: again)?|more|try again"
    r"|(?:an)?other one|draw the .+ again)"
)
_UNDO = (
    r"undo(?: (?:it|that|this|the (?:last|previous)(?: (?:one|change|edit|step))?|last))*|(?:go|step|take (?:it"
    r"|that|me)|bring it|change it)"
    r" back(?: (?:to|one) .*)?|revert(?: (?:it|that))?|back|restore (?:it|the (?:last|previous|old).*)"
    r"|cancel (?:that|it|the last.*)"
    r"|(?:(?:show|give)(?: me)? )?(?:the )?(?:previous|last|old) (?:one|picture|image)(?: again)?"
)
_ASKS = (
    r"^(?:what|which|where|how|who|why|when|whose|is|are|was|were|do|does|did|has|have|can|could|will|would|am"
    r"|isn't|aren't|doesn't|don't"
    r"|can't|describe|count|name|list|tell|say|explain|any|caption|identify|find|whats|hows)\b"
)
_NO_EDIT = r"(?:is|are|does|do|did|was|were|has|have|what|which|how|why|who|where|when)\b"
_EDITED = r"\b(?:in|to|into) (?:the |this )?(?:picture|image|scene|drawing)\b|\bhere\b|\bthe (?:{})\b"


@dataclass(frozen=True, kw_only=True, slots=True)
class Intent:
    """What a turn wants.

    Attributes:
        kind: "draw", "edit", "ask", "again" (the last new picture once more), "undo", or "say".
        words: What to draw, change or ask.
        reply: Of "say".
    """

    kind: Literal["draw", "edit", "ask", "again", "undo", "say"]
    words: str = ""
    reply: str = ""


def plain_line(text: str) -> str:
    """Lower case, single spaces, without marks at the end."""
    line = re.sub(r"[\u2018\u2019`\u00b4]", "'", " ".join(text.lower().split()))
    line = re.sub(r"\bi'd\b", "i would", line)
    return re.sub(r"[\s.!?,;:]+$", "", line.strip(" \"'"))


def intent_of(text: str, has_picture: bool, extra: frozenset[str] = frozenset()) -> Intent:
    """What a turn wants.

    Args:
        text: What the user says.
        has_picture: Whether there is a picture, drawn or given.
        extra: Names that the model was given after its training.
    """
    whole = plain_line(text)
    for line in dict.fromkeys((whole, without_greeting(whole))):
        bare = re.sub(
            r"[,.!?;:]+(?=\s|$)",
            "",
            line.replace("what's", "what is").replace("that's", "that is").replace("it's", "it is"),
        )
        bare = bare.replace("i'm", "i am").replace("don't", "do not").replace("how's", "how is")
        if (reply := small_talk(bare)) is not None:
            return Intent(kind="say", reply=reply)
    line = _stripped(without_greeting(whole))
    if (reply := small_talk(line)) is not None:
        return Intent(kind="say", reply=reply)
    line = (
        re.sub(rf"^(?:how|what) about (?!{_NEW})(?=(?:in |at |on )?(?:the )?(?:\w+ )?\w+$)", "", line)
        if has_picture
        else line
    )
    if re.fullmatch(_UNDO, line):
        return Intent(kind="undo")
    if re.fullmatch(_AGAIN, line):
        return Intent(kind="again")
    return _request(line, text, has_picture, extra)


def _stripped(line: str) -> str:
    """The line without polite words before and after it."""
    before = None
    while before != line:
        before = line
        line = re.sub(_LAST, "", re.sub(_FIRST, "", line)).strip(" ,.!;:")
    return line


def _request(line: str, text: str, has_picture: bool, extra: frozenset[str]) -> Intent:
    if has_picture:  # without a picture, "no cats" asks for one that the model cannot draw, which the lexicon says
        line = re.sub(rf"^no (?:more )?(?:the )?(?=(?:{'|'.join(map(re.escape, NOUNS))})$)", "remove the ", line)
    wanted = _to_draw(line, has_picture)
    if wanted is not None:
        return Intent(kind="draw", words=wanted)
    question = bool(re.match(_ASKS, line)) or text.rstrip().endswith("?")
    if is_edit(line) and not re.match(_NO_EDIT, line):
        return Intent(kind="edit", words=line) if has_picture else _no_picture()
    if question or not isinstance(parse_question(line, extra), Unread):
        if not question and (re.match(_NEW, line) or _is_phrase(line, extra)):
            return Intent(kind="draw", words=line)
        return Intent(kind="ask", words=_asked(line, text, extra)) if has_picture else _no_picture()
    if re.match(_NEW, line) or _is_phrase(line, extra):
        return Intent(kind="draw", words=line)
    return Intent(kind="say", reply=UNCLEAR)


def _no_picture() -> Intent:
    return Intent(kind="say", reply=NO_PICTURE)


def _asked(line: str, text: str, extra: frozenset[str]) -> str:
    """The question as it was typed; without the words before it ("wait, ...") where it is only read without them."""
    typed = text.strip()
    with_them, without = parse_question(typed, extra), parse_question(line, extra)
    return line if isinstance(with_them, Unread) and not isinstance(without, Unread) else typed


def _to_draw(line: str, has_picture: bool) -> str | None:
    """What is to be drawn anew; None where nothing is."""
    found = re.match(_DRAW, line) or re.match(_SHOW, line)
    if not found:
        return None
    wanted = line[found.end() :].strip(" ,:")
    wanted = re.sub(
        r"^(?:an?|another) (?:new|different|other|nice|completely new) ", "a ", re.sub(r"^another ", "a ", wanted)
    )
    names = "|".join(re.escape(word) for word in (*NOUNS, *_PRONOUNS))
    if re.match(r"(?:it|them|this|that|these|those)\b", wanted):
        return None
    if has_picture and re.search(_EDITED.format(names), wanted):
        return None
    return wanted or None


_PRONOUNS = ("picture", "image")


def _is_phrase(line: str, extra: frozenset[str]) -> bool:
    """Whether a line is nothing but a noun phrase with what belongs to it, such as "cats on grass, pixel art"."""
    found = clause_of(line, extra)
    allowed = {
        "N",
        "R",
        "S",
        "G",
        "P",
        "#",
        "and",
        "with",
        "on",
        "in",
        "at",
        "the",
        "a",
        "an",
        "of",
        "style",
        "background",
        "by",
        "to",
    }
    return bool(found.things) and not found.unknown and set(found.words) <= allowed
