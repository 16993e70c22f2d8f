"""Misspelled words: the one known word that is clearly nearest.

Design choices
- The distance is Damerau and Levenshtein's (optimal string alignment), in which a letter written twice, or once instead
  of twice, counts half, and two letters in the wrong order three quarters: these are what fingers do by mistake.
- A short word may be off by one letter, a word of six letters and more by two. The first letter is rarely wrong, so it
  must be right, but for two letters in the wrong order and for long words.
- A real English word is never corrected (`lexicon_real_words.txt`): "hat" is no cat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

_DOUBLED, _SWAPPED = 0.5, 0.75
_SHORTEST = 0.75  # in words of three letters
_LONG = 6  # letters from which two may be wrong
_CLEAR = 0.25  # how much farther the next word has to be


def distance(a: str, b: str, most: float = 9.0) -> float:
    """The edit distance of two words; anything above `most` where it is larger than that."""
    if abs(len(a) - len(b)) > 2 * most:
        return most + 1
    rows = [[float(j) for j in range(len(b) + 1)]]
    for i, letter in enumerate(a, 1):
        row = [rows[-1][0] + 1.0]
        for j, other in enumerate(b, 1):
            removed = rows[-1][j] + (_DOUBLED if i > 1 and a[i - 2] == letter else 1.0)
            added = row[j - 1] + (_DOUBLED if j > 1 and b[j - 2] == other else 1.0)
            best = min(removed, added, rows[-1][j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other and letter != other:
                best = min(best, rows[-2][j - 2] + _SWAPPED)
            row.append(best)
        if min(*row, *rows[-1]) > most:  # letters in the wrong order refer to the row before
            return most + 1
        rows.append(row)
    return rows[-1][-1]


def limit(word: str) -> float:
    """The largest distance at which a word of this length is taken for another."""
    return _SHORTEST if len(word) < 4 else 1.0 if len(word) < _LONG else 2.0


def nearest(word: str, candidates: Iterable[str], root: Callable[[str], str]) -> str | None:
    """The candidate that is clearly nearest to a misspelled word; None where there is none, or several.

    Args:
        word: In lower case, not a word of the language.
        candidates: Words to choose from.
        root: What a candidate stands for; two candidates of one root ("cat", "cats") do not compete.
    """
    if len(word) < 3 or not word.replace("-", "").isalpha():
        return None
    most = limit(word)
    found: list[tuple[float, bool, int, str]] = []
    for other in candidates:
        if len(other) < 3 or abs(len(other) - len(word)) > 2:
            continue
        if (apart := distance(word, other, most)) <= most and _same_start(word, other, apart):
            found.append((apart, _is_plural(other) != _is_plural(word), -len(other), other))
    if not found:
        return None
    found.sort()
    best, rivals = found[0][-1], {root(other) for apart, *_, other in found if apart < found[0][0] + _CLEAR}
    return best if len(rivals) == 1 else None


def _is_plural(word: str) -> bool:
    """Whether a word ends as plurals do: a mistake seldom changes the number ("guitare" is one guitar)."""
    return word.endswith("s")


def _same_start(word: str, other: str, apart: float) -> bool:
    """Whether the beginnings agree well enough."""
    if word[0] == other[0]:
        return True
    return apart < 1 or (len(word) >= _LONG and apart <= 1)
