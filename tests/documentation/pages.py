"""Reads the code blocks of a Markdown page: which steps a reader of the page would take, in order."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("python", "bash", "json", "text", "toml", "yaml")
_FENCE = re.compile(r"^( *)(```+)(\S*)\s*$")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a page. line: the number of its first line of code, from 1."""

    language: str
    line: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of a bash block, without its environment. comment: what stands behind `#` on its line."""

    line: int
    arguments: tuple[str, ...]
    comment: str = ""


def pages() -> list[str]:
    """README.md and every page under docs/, relative to the root of the repository."""
    return ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]


def blocks_of(text: str) -> list[Block]:
    """All fenced blocks. Raises ValueError for a fence that is not closed."""
    found: list[Block] = []
    opened: tuple[str, str, str, int] | None = None
    lines: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is None and fence:
            opened, lines = (fence[1], fence[2], fence[3], number + 1), []
        elif opened and fence and fence[2] == opened[1] and not fence[3]:
            found.append(Block(language=opened[2], line=opened[3], text="\n".join(lines) + "\n"))
            opened = None
        elif opened:
            lines.append(line.removeprefix(opened[0]))
    if opened:
        raise ValueError(f"the block that begins in line {opened[3]} is not closed")
    return found


def outside_blocks(text: str) -> list[str]:
    """The lines of a page that lie in no fenced block."""
    inside, kept = False, []
    for line in text.splitlines():
        if _FENCE.match(line):
            inside = not inside
        elif not inside:
            kept.append(line)
    return kept


def commands_of(block: Block) -> list[Command]:
    """The commands of a bash block: `&&` separates two of them, a backslash continues a line."""
    found: list[Command] = []
    for number, line in enumerate(block.text.replace("\\\n", "  ").splitlines()):
        words = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        words.whitespace_split = True
        tokens = list(words)
        comment = line.partition(" # ")[2].strip()
        for part in " ".join(map(shlex.quote, tokens)).split(" '&&' "):
            arguments = shlex.split(part)
            while arguments and re.fullmatch(r"[A-Z_]+=\S*", arguments[0]):
                arguments.pop(0)
            if arguments:
                found.append(Command(line=block.line + number, arguments=tuple(arguments), comment=comment))
    return found
