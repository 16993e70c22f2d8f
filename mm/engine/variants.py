"""Requests of one picture each from a prompt with wildcards or a prompt matrix."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mm.core.errors import UserError
from mm.core.files import read_text_lines
from mm.core.nouns import counted
from mm.core.paths import expanded
from mm.engine import prompts
from mm.engine.requests import MAX_COUNT, Draw

_MOST_BYTES = 16 << 20  # of a wildcard file


def variants(request: Draw, *, matrix: bool = False, lines_of: Callable[[str], list[str]] | None = None) -> list[Draw]:
    """A request as requests of one picture each.

    Args:
        request: whose prompt may hold `{cat|dog}` and `__name__`; picture k takes what seed + k chooses.
        matrix: whether the parts after `|` are combined (`a cat | at night`); each combination is drawn `count` times,
            with the same seeds.
        lines_of: gives the lines of a wildcard file by name.

    Raises:
        UserError: for a wildcard that is not known, a matrix of one part, or too many pictures.
    """
    texts = prompts.matrix(request.prompt) if matrix else [request.prompt]
    if matrix and len(texts) == 1:
        raise UserError(
            f"the prompt {request.prompt[:60]!r} has no part after a | outside of braces, so a matrix of it is one "
            "picture; write it as in 'a cat | at night', or leave out --matrix"
        )
    if len(texts) * request.count > MAX_COUNT:
        raise UserError(
            f"{counted(len(texts), 'prompt')} with {counted(request.count, 'picture')} each; at "
            f"most {MAX_COUNT} are drawn at once"
        )
    first = secrets.randbelow(2**31) if request.seed is None else request.seed
    seeds = [first + k for k in range(request.count)]
    return [
        replace(request, prompt=prompts.expand(text, seed, lines_of), seed=seed, count=1)
        for text in texts
        for seed in seeds
    ]


def wildcard_files(folder: Path) -> Callable[[str], list[str]]:
    """A function that gives the lines of FOLDER/NAME.txt by NAME.

    Raises:
        UserError: where there is no such folder; the function raises it where a file is missing or leads out of it.
    """
    root = expanded(folder).resolve()
    if not root.is_dir():
        raise UserError(f"there is no folder {folder} with wildcard files")

    def lines_of(name: str) -> list[str]:
        path = (root / f"{name}.txt").resolve()
        if not path.is_relative_to(root):
            raise UserError(f"the wildcard __{name}__ leads out of {folder}")
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in root.glob("*.txt"))[:8]) or "none"
            raise UserError(f"the wildcard __{name}__ has no file {name}.txt in {folder}; there are {known}")
        lines = read_text_lines(path, "wildcard file", most=_MOST_BYTES)
        return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]

    return lines_of
