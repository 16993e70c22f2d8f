"""The job file: JSON Lines of {"custom_id", "task", "body"}, each line a `Row` or a `BadRow`.

Design choices:
- A row that cannot be used never stops the others. It becomes a `BadRow` whose error names the value and what to do.
- Rows are identified by custom_id, never by prompt: the first row with an id has it, later ones are bad.
- Ids become parts of file names, so the few characters that no file system and no path takes otherwise are allowed.
- JSON is read strictly: no NaN, no key given twice, no field that would be ignored in silence.
- What a model takes (words, sizes, modes) is checked against the model by `mm.batch.plan`, and the row fails with its
  words. Nothing that a row names is downloaded, and files that it names lie under one folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from mm.core.checks import MAX_SEED, whole
from mm.core.errors import UserError, shown
from mm.core.files import open_regular
from mm.core.pictures import check_output_type
from mm.core.safe_json import parse_json
from mm.engine.requests import MAX_PROMPT, MAX_TRIES, size_in_pixels

_whole = partial(whole, said=shown)  # rows come from a file
TASKS = ("generate",)
MAX_LINE = 1 << 20  # bytes: a row is a prompt and some numbers
MAX_PICTURES = 1000  # of one row
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class Generate:
    """The body of a "generate" row. None is the model's own value; of seed, one by the run's seed; of model, the run's.

    Args:
        prompt: what to draw.
        n: number of pictures.
        seed: of the first picture.
        steps: sampling steps.
        mode: for models with several modes.
        guidance: scale of classifier-free guidance.
        negative: what to avoid.
        size: "WxH" or [W, H], in pixels.
        scheduler: another sampler.
        image: a file to start from.
        mask: a file, white where the picture is drawn anew.
        strength: how much of the picture is redrawn.
        lora: "FILE" or "FILE:SCALE", or a list of them, in this order.
        model: an embedded model, or a folder.
        fast: less work a picture: true, or an object of single settings (docs/fast.md).
        best_of: the most times that a picture is drawn, until the model reads in it what was asked for (mm-tiny).
        apart: each adapter draws its subject in a place of its own: true, or an object of known things by word.
        refine: share of the noise from which subjects that are drawn apart are drawn again; 0 leaves that out.
        strict: true refuses words that the model does not know, false refuses nothing.
        options: further arguments of the pipeline's call, by name.
    """

    prompt: str
    n: int = 1
    seed: int | None = None
    steps: int | None = None
    mode: str | None = None
    guidance: float | None = None
    negative: str | None = None
    size: tuple[int, int] | None = None
    scheduler: str | None = None
    image: str | None = None
    mask: str | None = None
    strength: float | None = None
    lora: tuple[str, ...] = ()
    model: str | None = None
    fast: bool | dict[str, Any] = False
    best_of: int = 1
    apart: bool | dict[str, Any] = False
    refine: float | None = None
    strict: bool | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise UserError(f"prompt is {shown(self.prompt)}; say in words what to draw")
        if len(self.prompt) > MAX_PROMPT:
            raise UserError(f"prompt has {len(self.prompt)} characters; give at most {MAX_PROMPT}")
        if not self.prompt.isprintable():  # line ends, NUL, half surrogates: none can be written into a PNG's text
            raise UserError(f"prompt {shown(self.prompt)} holds characters that do not print; take them out")
        _whole("n", self.n, 1, MAX_PICTURES)
        if self.seed is not None:
            _whole("seed", self.seed, 0, MAX_SEED - self.n + 1)
        if self.steps is not None:
            _whole("steps", self.steps, 1, 1000)
        _whole("best_of", self.best_of, 1, MAX_TRIES)
        for name in ("mode", "negative", "scheduler", "image", "mask", "model"):
            _text(name, getattr(self, name))
        _number("guidance", self.guidance, 100)
        _number("strength", self.strength, 1)
        _number("refine", self.refine, 1)
        object.__setattr__(self, "size", _size(self.size))
        object.__setattr__(self, "lora", _files(self.lora))
        if not isinstance(self.options, dict) or not all(name.isidentifier() for name in self.options):
            raise UserError(f'options is {shown(self.options)}; give an object such as {{"clip_skip": 1}}')
        check_output_type(self.options, file=True)
        if not isinstance(self.fast, bool | dict):
            raise UserError(f"fast is {shown(self.fast)}; give true, false, or an object of settings")
        if self.strict is not None and not isinstance(self.strict, bool):
            raise UserError(f"strict is {shown(self.strict)}; give true or false")
        if not isinstance(self.apart, bool | dict):
            raise UserError(f"apart is {shown(self.apart)}; give true, false, or an object of known things by word")
        if self.image is None and (self.mask is not None or self.strength is not None):
            given = "mask" if self.mask is not None else "strength"
            raise UserError(f"{given} is given without image; it acts on a picture to start from")


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
    _only(body, tuple(one.name for one in fields(Generate)), "the body of generate")
    if "prompt" not in body:
        raise UserError('body has no prompt; give one, such as {"prompt": "two red cats on grass"}')
    return Row(line=line, custom_id=custom_id, task=task, body=Generate(**body))


def _only(given: dict[str, Any], known: tuple[str, ...], what: str) -> None:
    unknown = [key for key in given if key not in known]
    if unknown:
        raise UserError(f"unknown field {shown(unknown[0])}; {what} takes {', '.join(known)}")


def _text(name: str, value: object) -> None:
    if value is not None and (
        not isinstance(value, str) or not value.isprintable() or (name != "negative" and not value)
    ):
        raise UserError(f"{name} is {shown(value)}; give a text that prints")


def _number(name: str, value: object, high: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
        raise UserError(f"{name} is {shown(value)}; give a number from 0 to {high:g}")


def _size(value: object) -> tuple[int, int] | None:
    """A size from "WxH" or [W, H]."""
    made: object = tuple(value) if isinstance(value, list | tuple) else value
    if isinstance(value, str):
        found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", value)
        made = (int(found[1]), int(found[2])) if found else value
    if made is not None and (not isinstance(made, tuple) or len(made) != 2):
        raise UserError(f'size is {shown(value)}; give "WIDTHxHEIGHT" in pixels, such as "1024x768"')
    size_in_pixels(made)
    return made


def _files(value: object) -> tuple[str, ...]:
    files = (value,) if isinstance(value, str) else value
    if not isinstance(files, list | tuple) or any(not isinstance(file, str) or not file for file in files):
        raise UserError(f'lora is {shown(value)}; give "FILE:SCALE", or a list of them')
    return tuple(files)
