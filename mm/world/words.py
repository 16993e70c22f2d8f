"""Every word that prompts, questions, answers, edits and conversations can use: the closed vocabulary of the models.

Design choices
- Fixed at the start, so that reading, editing and conversation can be added later without changing a token's number.
  New words go into the spare rows of the tokenizer.
- Order matters (it numbers the embedding rows): append, never insert.
"""

from __future__ import annotations

import re

from mm.world import captions as c
from mm.world import vocabulary as v

_QUESTIONS_AND_ANSWERS = """
is are there any how many what which where colour color style background of in on the this that it picture image does do
have has can you see yes no none natural zero nothing something both left right top bottom middle centre center side
thing things object objects animal animals fruit food vehicle vehicles building plant instrument count number kind
following than more fewer same different not unknown readable show shows shown
"""
_EDITS = """
make turn change recolour recolor paint into to remove delete erase take away add put place insert draw give replace
swap with for another move shift up down restyle set let keep only all everything every each bigger smaller instead
from off out back here one ones them its their new a an and now also then again
"""
_CHAT = """
hello hi please thanks thank welcome okay ok sure here is your i me my we us great good nice done describe tell about
caption look at first second third last previous next show me can could would like want need another more less so but
or if be was were will cannot sorry do n't don't that's it's i'm outside world know understand ask question answer help
drew drawn made removed added changed moved turned replaced
"""
_SPARE_WORDS = """
big small large tiny huge little photo picture drawing painting illustration icon emoji sticker scene view day sunny
bright dark light beautiful simple white black gray grey colourful colorful ocean water sea lake river mountain forest
field garden street city room table floor wall sand ground cloud clouds sun rain wind winter summer spring autumn
five six
seven eight nine ten several some few group row line corner edge between around near behind front inside
"""
_MARKS = ", . ? ! ' : ; - ( )"
_WORD = re.compile(r"[a-z0-9]+(?:['-][a-z0-9]+)*|[^\sa-z0-9]")


def split(text: str) -> list[str]:
    """Lower-cased words and marks of `text`, as the tokenizer sees them."""
    return _WORD.findall(text.lower())


def _collect() -> tuple[str, ...]:
    phrases: list[str] = [_MARKS, *v.ALL_OBJECTS, *v.PLURALS.values(), *v.COLOURS, *v.BACKGROUNDS, *v.STYLES]
    phrases += [word for pair in v.SYNONYMS.values() for word in pair]
    for table in (c.COUNT_WORDS, c.BACKGROUND_PHRASES, c.STYLE_BEFORE, c.RELATION_PHRASES):
        phrases += [phrase for choices in table.values() for phrase in choices]
    phrases += ["in style with next to beside and an", _QUESTIONS_AND_ANSWERS, _EDITS, _CHAT, _SPARE_WORDS]
    return tuple(dict.fromkeys(word for phrase in phrases for word in split(phrase)))


WORDS: tuple[str, ...] = _collect()
