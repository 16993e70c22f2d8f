"""Captions of training pictures: text files beside them, and the subject's name in their words.

Design choices
- `[trigger]`, in any case, stands for the name of the subject. A caption without the name gets it in front.
- A name counts as a whole word and in any case: "catalogue" does not name "cat", and "<Mug>" becomes "<mug>".
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from mm.core.errors import UserError
from mm.core.files import read_regular

TRIGGER = "[trigger]"
SUFFIX = ".txt"
_TRIGGERS = re.compile(re.escape(TRIGGER), re.IGNORECASE)
_TOKEN = re.compile(r"<[A-Za-z0-9_-]+>")
_MOST = 1 << 16  # bytes


def pattern_of(name: str) -> re.Pattern[str]:
    """Finds a name in a caption: as a whole word or words, in any case."""
    before, after = (r"\b" if end.isalnum() or end == "_" else "" for end in (name[:1], name[-1:]))
    return re.compile(rf"{before}{re.escape(name)}{after}", re.IGNORECASE)


def names(caption: str, name: str) -> bool:
    """Whether a caption holds a name."""
    return bool(name) and pattern_of(name).search(caption) is not None


def renamed(caption: str, name: str, other: str) -> str:
    """A caption with other words wherever it holds a name."""
    return pattern_of(name).sub(lambda _: other, caption)


def fill(caption: str, name: str) -> str:
    """A caption with the subject's name in it: in place of `[trigger]`, or in front where it has neither."""
    if has_trigger(caption):
        return _TRIGGERS.sub(lambda _: name, caption)
    return renamed(caption, name, name) if names(caption, name) else f"{name}, {caption}"


def has_trigger(caption: str) -> bool:
    """Whether a caption holds `[trigger]`, in any case."""
    return _TRIGGERS.search(caption) is not None


def default_caption(kind: str, noun: str) -> str:
    """The caption, with `[trigger]`, of a picture without a text file."""
    if kind == "edit":
        return TRIGGER
    if kind == "style":
        return f"a picture in the style of {TRIGGER}"
    return f"a photo of a {TRIGGER} {noun}".strip()


def read_caption(path: Path, default: str) -> str:
    """The caption in a text file, on one line; `default` where there is no file, or no word in it.

    Raises:
        UserError: where the file is no UTF-8 text, holds control characters, or is too long.
    """
    if not path.is_file():
        return default
    try:
        text = read_regular(path, "caption", most=_MOST).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text (byte {error.start}); save the caption as UTF-8") from error
    line = " ".join(text.split())
    if strange := next((letter for letter in line if unicodedata.category(letter) == "Cc"), ""):
        raise UserError(f"{path} holds {strange!r}, which no caption does (UTF-16?); save the caption as UTF-8")
    return line or default


def other_word(caption: str, name: str) -> str | None:
    """The first word in angle brackets that is not the name."""
    return next((word for word in _TOKEN.findall(caption) if word.lower() != name.lower()), None)
