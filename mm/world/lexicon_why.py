"""What is said of a word that no picture of the world shows: why, and the nearest things that there are."""

from __future__ import annotations

from mm.world import vocabulary as v
from mm.world.lexicon_scene import SIDES
from mm.world.lexicon_tables import Tables

LIST = "`mm words` lists what it knows"
_PLACED = frozenset({"in", "at", "on", "near", "under", "by"})
PLACES_IN_PICTURE = frozenset("middle center centre corner corners edge foreground central centered centred".split())


def why_not(word: str, before: str, table: Tables) -> str:
    """Why a word of the tables cannot be shown.

    Args:
        word: That the models do not know.
        before: The word before it.
        table: Of the task.
    """
    known = f"the model does not know the word {word!r}"
    if (word,) in table.negation:  # in instructions: a prompt's are left out before
        return f"{known}: an instruction says what changes, and what is negated may be changed as well"
    if (word,) in table.many or word.isdigit():
        return f"{known}: a picture holds at most four things of a kind"
    if word in table.places and before in _PLACED | {"the", "a", "an"} and word not in table.near:
        return f"{known}, a place that it cannot draw; nearest: {', '.join(table.places[word])}"
    if word in PLACES_IN_PICTURE:
        return f"{known}: {SIDES}"
    if word in table.colours:
        near = ", ".join(table.colours[word]) or ", ".join(v.COLOURS)
        return f"{known}, a colour that it lacks; nearest: {near}"
    if word in table.near:
        hints = ", ".join(table.near[word])
        return f"{known}; nearest: {hints}" if hints else f"{known}: there are no people in its pictures"
    if table.kinds.get(word) == "style":
        return f"{known} (style); styles: {', '.join(v.STYLES)}"
    if word in table.kinds:
        return f"{known} ({table.kinds[word]}) and ignores it"
    if word in table.places:
        return f"{known}; nearest background: {', '.join(table.places[word])}"
    if (word,) in table.bindings:
        return f"{known}: things stand beside, above or below each other, and nothing else is between them"
    return f"{known} and ignores it; {LIST}"
