"""Writes `lexicon_real_words.txt`: `python -m mm.world.cut_real_words /usr/share/dict/words`.

The input is a list of English words, one a line, such as Debian's wamerican and wbritish (SCOWL). Kept are those that
`lexicon_typos` would take for a misspelled known word, so that they are left as they are. Names (words with a capital
letter) and possessives are dropped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mm.core.files import read_text_lines, write_text
from mm.world.lexicon_tables import REAL_WORDS, TASKS, tables
from mm.world.lexicon_typos import distance, limit

NOTICE = """\
# English words that are spelled almost as words of the world, from SCOWL (Spell Checker Oriented Word Lists).
# Copyright 2000-2011 by Kevin Atkinson. Permission to use, copy, modify, distribute and sell these word lists, the
# associated scripts, the output created from the scripts, and its documentation for any purpose is hereby granted
# without fee, provided that the above copyright notice appears in all copies and that both that copyright notice and
# this permission notice appear in supporting documentation. Kevin Atkinson makes no representations about the
# suitability of this array for any purpose. It is provided "as is" without express or implied warranty.
# Made by mm.world.cut_real_words.
"""
_WIDTH = 118


def chosen(words: list[str]) -> list[str]:
    """The words of a list that are spelled almost as a known word, and are in no table themselves."""
    lexicons = [tables(task) for task in TASKS]
    known = sorted({word for table in lexicons for word in (*table.known, *table.synonyms) if len(word) > 2})
    plain = sorted({w for w in words if w.isascii() and w.isalpha() and w == w.lower() and len(w) > 2})
    return [
        word
        for word in plain
        if not all(table.has(word) for table in lexicons)
        and any(abs(len(word) - len(o)) <= 2 and distance(word, o, limit(word)) <= limit(word) for o in known)
    ]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lists", nargs="+", type=Path, help="Files of English words, one a line.")
    words = [line.strip() for path in parser.parse_args().lists for line in read_text_lines(path, "list of words")]
    lines, line = [], ""
    for word in chosen(words):
        if len(line) + len(word) + 1 > _WIDTH:
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
    write_text(REAL_WORDS, NOTICE + "\n".join([*lines, line]) + "\n")


if __name__ == "__main__":
    main()
