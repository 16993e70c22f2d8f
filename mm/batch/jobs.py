"""The job file: JSON Lines of {"custom_id", "task", "body"}, each line a `Row` or a `BadRow`.

Design choices:
- A row that cannot be used never stops the others. It becomes a `BadRow` whose error names the value and what to do.
- Rows are told apart by custom_id, never by prompt: the first row with an id has it, later ones are bad.
- Ids become parts of file names, so the few characters that no file system and no path takes otherwise are allowed.
- JSON is read strictly: no NaN, no key given twice, no field that would be ignored in silence.

- Which words and modes a model takes, the pipeline checks; the row fails with its words. Nothing a row names is opened
  or fetched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mm.core.errors import UserError, shown
from mm.core.files import open_regular
from mm.core.safe_json import parse_json
from mm.families.mm_tiny import GUIDANCE

TASKS = ("generate",)
MODES = ("flow", "codes")
MAX_LINE = 1 << 20  # bytes: a row is a prompt and some numbers
MAX_PICTURES = 1000  # of one row
MAX_SEED = 2**32 - 1  # what other programs read from a PNG's text
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class Generate:
    """The body of a "generate" row with the defaults of `mm generate`; seed None: the run's, steps None: the mode's."""

    prompt: str
    n: int = 1
    seed: int | None = None
    steps: int | None = None
    mode: str = "flow"
    guidance: float = GUIDANCE

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise UserError(f"prompt is {shown(self.prompt)}; say in words what to draw")
        if not self.prompt.isprintable():  # line ends, NUL, half surrogates: none can be written into a PNG's text
            raise UserError(f"prompt {shown(self.prompt)} holds characters that do not print; take them out")
        _whole("n", self.n, 1, MAX_PICTURES)
        if self.seed is not None:
            _whole("seed", self.seed, 0, MAX_SEED - self.n + 1)
        if self.steps is not None:
            _whole("steps", self.steps, 1, 1000)
        if self.mode not in MODES:
            raise UserError(f"mode is {shown(self.mode)}; take one of {', '.join(MODES)}")
        guidance = self.guidance
        if isinstance(guidance, bool) or not isinstance(guidance, int | float) or not 0 <= guidance <= 100:
            raise UserError(f"guidance is {shown(guidance)}; give a number from 0 to 100")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line that can be run."""

    line: int
    custom_id: str
    task: str
    body: Generate


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A line that cannot be run, and why. Its custom_id is shown, and never used in a path."""

    line: int
    custom_id: str | None
    error: str


def read_jobs(path: str | Path) -> Iterator[Row | BadRow]:
    """The rows of a job file in order; lines are counted from 1, empty ones and those of only blanks are passed over.

    Raises UserError where the file cannot be read at all.
    """
    first_line: dict[str, int] = {}
    with open_regular(path, "job file") as file:
        for line, data in enumerate(_lines(file), start=1):
            if data is not None and not data.strip():
                continue
            custom_id: str | None = None
            try:
                raw = _parsed(data)
                custom_id = raw["custom_id"] if isinstance(raw.get("custom_id"), str) else None
                row = _row(raw, line)
                if row.custom_id in first_line:
                    first = first_line[row.custom_id]
                    raise UserError(f"custom_id {shown(row.custom_id)} is line {first}'s; give each row its own")
                first_line[row.custom_id] = line
                yield row
            except UserError as error:
                yield BadRow(line=line, custom_id=custom_id, error=f"line {line}: {error}")


def _lines(file: Any) -> Iterator[bytes | None]:
    """Lines as bytes; None stands for one that is too long, which is never held in memory as a whole."""
    while data := file.readline(MAX_LINE + 1):
        if len(data) <= MAX_LINE:
            yield data
            continue
        while data and not data.endswith(b"\n"):
            data = file.readline(MAX_LINE + 1)
        yield None


def _parsed(data: bytes | None) -> dict[str, Any]:
    if data is None:
        raise UserError(f"longer than {MAX_LINE} bytes; a row is one JSON object with a prompt and some numbers")
    raw = parse_json(data.strip(), "it", most=MAX_LINE)
    if not isinstance(raw, dict):
        raise UserError(f"holds {shown(raw)}; a row is an object with custom_id, task and body")
    return raw


def _row(raw: dict[str, Any], line: int) -> Row:
    _only(raw, ("custom_id", "task", "body"), "a row")
    custom_id, task, body = raw.get("custom_id"), raw.get("task"), raw.get("body")
    if not isinstance(custom_id, str) or not _ID.fullmatch(custom_id):
        raise UserError(
            f"custom_id is {shown(custom_id)}; take letters A-Z a-z, digits, '.', '_' and '-', "
            "beginning with a letter or digit, at most 100: it becomes part of a file name"
        )
    if task not in TASKS:
        raise UserError(f"task is {shown(task)}; known is {', '.join(TASKS)}")
    if not isinstance(body, dict):
        raise UserError(f'body is {shown(body)}; give an object such as {{"prompt": "two red cats on grass"}}')
    _only(body, tuple(field.name for field in fields(Generate)), "the body of generate")
    if "prompt" not in body:
        raise UserError('body has no prompt; give one, such as {"prompt": "two red cats on grass"}')
    return Row(line=line, custom_id=custom_id, task=task, body=Generate(**body))


def _only(given: dict[str, Any], known: tuple[str, ...], what: str) -> None:
    unknown = [key for key in given if key not in known]
    if unknown:
        raise UserError(f"unknown field {shown(unknown[0])}; {what} takes {', '.join(known)}")


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UserError(f"{name} is {shown(value)}; give a whole number from {low} to {high}")
