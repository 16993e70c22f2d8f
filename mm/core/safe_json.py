"""JSON from outside: read with limits on size and depth, strictly, and with errors of one line.

Design choices
- Strict: no NaN or infinity, no key given twice, no half surrogates, no integer of thousands of digits. Each of them
  passes Python's parser and fails later, in code that does not expect it.
- The depth is limited far below Python's own limit, so that code which walks the value afterwards never meets it.
- `Fields` takes values out of an object by type and range. Every error names the file, the key and the value.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from mm.core.errors import UserError, shown
from mm.core.files import open_regular, read_regular

MAX_BYTES = 16 << 20  # of one JSON text; the largest configs and safetensors headers have some hundred KB
MAX_DEPTH = 64
MAX_DIGITS = 40  # of an integer; tokenizers' configs write a length without limit as 10**30
MAX_VALUES = 2_000_000  # of one JSON text


def parse_json(
    data: bytes | str, source: str, *, most: int = MAX_BYTES, depth: int = MAX_DEPTH, nan_as_none: bool = False
) -> Any:
    """The value of a JSON text.

    Args:
        data: the text; bytes are UTF-8, with or without a byte order mark.
        source: where the text comes from, for error messages: a path, or "PATH: its metadata".
        most: the largest size allowed, in bytes (of a str: in characters).
        depth: how deep objects and lists may be nested.
        nan_as_none: reads NaN and infinities as None; ComfyUI writes them into its graphs.

    Returns:
        dict, list, str, int, float, bool or None.

    Raises:
        UserError: for everything else, with `source` and the place.
    """
    if len(data) > most:
        raise UserError(f"{source} has {len(data)} bytes of JSON; at most {most} are read")
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        value = json.loads(
            text,
            object_pairs_hook=_once_each,
            parse_constant=_none if nan_as_none else _no_constant,
            parse_float=_finite,
            parse_int=_whole,
        )
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except RecursionError as error:
        raise UserError(f"{source} is nested too deeply; at most {depth} levels are read") from error
    except json.JSONDecodeError as error:
        near = shown(text[error.pos : error.pos + 20].strip())
        place = f"column {error.colno}" if "\n" not in text else f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{source} is no JSON at {place} ({error.msg}, near {near})") from error
    except UserError as error:
        raise UserError(f"{source} {error}") from error
    _check_tree(value, source, depth)
    return value


def parse_object(data: bytes | str, source: str, *, most: int = MAX_BYTES, depth: int = MAX_DEPTH) -> dict[str, Any]:
    """As `parse_json`; raises UserError where the value is no object."""
    value = parse_json(data, source, most=most, depth=depth)
    if not isinstance(value, dict):
        raise UserError(f"{source} holds {shown(value)}; a JSON object is needed")
    return value


def read_json(path: str | os.PathLike[str], what: str = "JSON file", *, most: int = MAX_BYTES) -> Any:
    """The value in a JSON file. Raises UserError as `parse_json` and `mm.core.files.open_regular` do."""
    return parse_json(read_regular(path, what, most=most), str(path), most=most)


def read_object(path: str | os.PathLike[str], what: str = "JSON file", *, most: int = MAX_BYTES) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError as `read_json` does, and where the value is no object."""
    return parse_object(read_regular(path, what, most=most), str(path), most=most)


def read_json_lines(
    path: str | os.PathLike[str], what: str = "JSON Lines file", *, most: int = 1 << 20, lines: int = 1_000_000
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file with their line numbers, counted from 1; blank lines are passed over.

    Args:
        path: the file.
        what: what the file is, for error messages.
        most: the longest line allowed, in bytes.
        lines: how many lines are read at most.

    Yields:
        Line number and object.

    Raises:
        UserError: at the first line that is no JSON object, is too long, or is one too many.
    """
    with open_regular(path, what) as file:
        for number, data in enumerate(iter(lambda: file.readline(most + 1), b""), start=1):
            if len(data) > most or number > lines:
                limit = f"line {number} is longer than {most} bytes" if len(data) > most else f"more than {lines} lines"
                raise UserError(f"{Path(path)}: {limit}; the {what} is too large")
            if data.strip():
                yield number, parse_object(data, f"{path}, line {number}", most=most)


class Fields:
    """Typed values of one JSON object. Every method raises UserError with file, key and value where one is wrong."""

    def __init__(self, raw: object, source: str, at: str = "") -> None:
        """Takes an object in.

        Args:
            raw: the parsed value, which must be a dict.
            source: where it comes from, for error messages.
            at: the path of keys that leads to it, for error messages.
        """
        self.source, self.at = source, at
        if not isinstance(raw, dict):
            raise UserError(f"{source}: {at or 'the JSON'} is {shown(raw)}; an object is needed")
        self.raw: dict[str, Any] = raw

    def wrong(self, key: str, want: str) -> NoReturn:
        """Raises the error for a key: its value, or that it is missing, and what is needed."""
        name = shown(f"{self.at}.{key}" if self.at else key, 120).strip('"')
        is_what = shown(self.raw[key]) if key in self.raw else "missing"
        raise UserError(f"{self.source}: {name} is {is_what}; {want} is needed")

    def only(self, known: Collection[str]) -> None:
        """Raises UserError where there are other keys than these."""
        for key in self.raw:
            if key not in known:
                place = f" in {self.at}" if self.at else ""
                raise UserError(f"{self.source}: unknown key {shown(key)}{place}; known are {', '.join(known)}")

    def text(self, key: str, default: str | None = None, *, most: int = 1 << 16) -> str:
        """A string of at most `most` characters."""
        value = self._get(key, default)
        if not isinstance(value, str) or len(value) > most:
            self.wrong(key, f"a text of at most {most} characters")
        return value

    def choice(self, key: str, options: Collection[Any], default: Any = ...) -> Any:
        """One of the options, of the same type."""
        value = self.raw.get(key, default)
        if not any(value == option and type(value) is type(option) for option in options):
            self.wrong(key, f"one of {', '.join(map(shown, options))}")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            self.wrong(key, "true or false")
        return value

    def whole(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """An integer from `low` to `high`."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.wrong(key, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number from `low` to `high`."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            self.wrong(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def object(self, key: str, default: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """An object."""
        value = self._get(key, default)
        if not isinstance(value, dict):
            self.wrong(key, "an object")
        return value

    def fields(self, key: str) -> Fields:
        """An object as `Fields`."""
        return Fields(self.object(key), self.source, f"{self.at}.{key}" if self.at else key)

    def texts(self, key: str, *, most: int = 100_000) -> list[str]:
        """A list of strings, at most `most` of them."""
        value = self.raw.get(key)
        if not isinstance(value, list) or len(value) > most or not all(isinstance(x, str) for x in value):
            self.wrong(key, f"a list of at most {most} texts")
        return value

    def numbers(self, key: str, *, most: int = MAX_VALUES) -> list[float]:
        """A list of numbers, at most `most` of them."""
        value = self.raw.get(key)
        right = isinstance(value, list) and len(value) <= most
        if not right or any(isinstance(x, bool) or not isinstance(x, int | float) for x in value):  # type: ignore[union-attr]
            self.wrong(key, f"a list of at most {most} numbers")
        return value  # type: ignore[return-value]

    def _get(self, key: str, default: Any) -> Any:
        return self.raw[key] if key in self.raw else default


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UserError(f"gives the key {shown(twice)} twice; keep one of them")
    return found


def _no_constant(name: str) -> NoReturn:
    raise UserError(f"holds {name}, which is no JSON number; give a finite one")


def _none(_: str) -> None:
    return None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise UserError(f"holds {shown(text)}, which is too large for a number; give a finite one")
    return value


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise UserError(f"holds {shown(text)}, which cannot be read: an integer of more than {MAX_DIGITS} digits")
    return int(text)


def _check_tree(value: Any, source: str, depth: int) -> None:
    """Raises UserError where a value is nested too deeply, has too many parts, or text that cannot be written."""
    level, count = [value], 0
    for _ in range(depth + 1):
        count += len(level)
        if count > MAX_VALUES:
            raise UserError(f"{source} holds more than {MAX_VALUES} values; it is no file of this kind")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                for key in item:
                    _check_text(key, source)
                below += item.values()
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str):
                _check_text(item, source)
        if not below:
            return
        level = below
    raise UserError(f"{source} is nested too deeply; at most {depth} levels are read")


def _check_text(text: str, source: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{source} holds characters that do not print (a lone surrogate) in {shown(text)}") from error
