"""Prompts with alternatives and weights: `{cat|dog}`, `__animals__`, `a | b`, `(red:1.3)`, `word++`.

Design choices
- Wildcards are expanded before a run: picture k takes the alternatives that seed + k chooses, so the same seed draws
  the same words again, and the settings of a picture hold the words that were used.
- A prompt matrix (`a cat | at night | watercolor`) is every subset of the parts after the first one, as in A1111.
- Weights follow A1111 and compel: `(words:1.3)` multiplies by 1.3, `(words)` by 1.1, `[words]` divides by 1.1, `word++`
  multiplies by 1.1 twice, `word-` by 0.9. A backslash before a bracket keeps it as text. A number as weight must be
  finite and at most 10, so that no prompt gives NaN embeddings.
- How a model applies weights is in `mm.engine.weighting`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from itertools import combinations

from mm.core.errors import UserError

MAX_ALTERNATIVES = 100_000
MAX_WEIGHT = 10.0
LORA_TAG = re.compile(r"\s*<(?:lora|lyco):([^:<>]{1,200}):?([^<>]{0,40})>")  # of A1111 and those that follow it
MAX_LENGTH = 20_000  # characters of an expanded prompt
_INNERMOST = re.compile(r"(?<!\\)\{((?:[^{}\\]|\\.)*)\}")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_WILDCARD = re.compile(r"__([A-Za-z0-9][\w/-]{0,63}?)__")
_TOKEN = re.compile(r"\\[()\[\]\\{}|]|\(|\)|\[|\]|:\s*([+-]?[0-9]*\.?[0-9]+)\s*(?=\))|[^\\()\[\]:]+|.", re.DOTALL)
_SIGNS = re.compile(r"([\w'-]*\w)([+]{1,8}|[-]{1,8})(?=\s|$|[,.;])")


def expand(prompt: str, seed: int, lines_of: Callable[[str], list[str]] | None = None) -> str:
    """The prompt with each `{a|b}` and `__name__` replaced by one alternative, chosen by the seed.

    Args:
        prompt: may nest alternatives; `{2$$a|b|c}` takes two of them, joined by commas.
        seed: of the picture.
        lines_of: gives the lines of a wildcard file by name; None knows none.

    Raises:
        UserError: for braces that do not pair, and a wildcard that is not known, an empty one, or one that holds
            itself.
    """
    _check_braces(prompt)
    rng = random.Random(f"wildcards {seed}")
    for _ in range(64):
        made = _INNERMOST.sub(lambda m: _choose(m[1], rng), _WILDCARD.sub(lambda m: _line(m[1], rng, lines_of), prompt))
        if made == prompt:
            return prompt
        if len(made) > MAX_LENGTH:  # a wildcard that holds itself twice would double in every round
            break
        prompt = made
    raise UserError(f"the wildcards in {prompt[:60]!r} never end, or make more than {MAX_LENGTH} characters")


def has_wildcards(prompt: str) -> bool:
    """Whether a prompt names a wildcard file, as `__name__`."""
    return _WILDCARD.search(prompt) is not None


def _check_braces(prompt: str) -> None:
    """Raises UserError for a brace without its partner; those behind a backslash are text."""
    opened: list[int] = []
    for match in _BRACE.finditer(prompt):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and not opened:
            before = prompt[max(0, match.start() - 30) : match.end()]
            raise UserError(
                f"the prompt has a }} that closes nothing, in {before!r}; remove it, or write \\}} for text"
            )
        elif match[0] == "}":
            opened.pop()
    if opened:
        after = prompt[opened[-1] : opened[-1] + 30]
        raise UserError(f"the prompt has a {{ that is not closed, in {after!r}; add }}, or write \\{{ for text")


def _choose(inner: str, rng: random.Random) -> str:
    count, found, rest = inner.partition("$$")
    parts = (rest if found and count.strip().isdecimal() else inner).split("|")
    if not found or not count.strip().isdecimal():
        return rng.choice(parts)
    return ", ".join(rng.sample(parts, min(int(count[:6]), len(parts))))


def _line(name: str, rng: random.Random, lines_of: Callable[[str], list[str]] | None) -> str:
    if lines_of is None:
        raise UserError(f"the prompt has a wildcard __{name}__, and no folder of wildcard files is given")
    lines = [line for line in lines_of(name) if line.strip()]
    if not lines:
        raise UserError(f"the wildcard __{name}__ has no lines")
    return rng.choice(lines)


def matrix(prompt: str) -> list[str]:
    """Every prompt of a matrix: the first part with each subset of the parts that follow `|`, outside of braces.

    Raises:
        UserError: for more combinations than `MAX_ALTERNATIVES`.
    """
    first, *others = [part.strip() for part in _outside(prompt)]
    if 2 ** len(others) > MAX_ALTERNATIVES:
        raise UserError(f"a prompt matrix of {len(others) + 1} parts has 2^{len(others)} prompts; give fewer parts")
    chosen = (subset for size in range(len(others) + 1) for subset in combinations(others, size))
    return [", ".join([first, *subset]) for subset in chosen]


def _outside(prompt: str) -> Iterator[str]:
    """The parts between `|` that stand in no braces."""
    depth, start = 0, 0
    for i, letter in enumerate(prompt):
        depth += (letter == "{") - (letter == "}")
        if letter == "|" and depth <= 0:
            yield prompt[start:i]
            start = i + 1
    yield prompt[start:]


def weighted(prompt: str) -> list[tuple[str, float]]:
    """The prompt as pieces of text with their weights, in order; neighbours of one weight are one piece.

    Raises:
        UserError: for a weight that is no finite number up to `MAX_WEIGHT`.
    """
    pieces: list[list[object]] = []
    round_, square = [], []  # where open brackets stand among the pieces
    for match in _TOKEN.finditer(prompt):
        token, given = match[0], match[1]
        if token.startswith("\\") and len(token) == 2:
            pieces.append([token[1], 1.0])
        elif token == "(":
            round_.append(len(pieces))
        elif token == "[":
            square.append(len(pieces))
        elif given is not None and round_:
            _scale(pieces, round_.pop(), _weight(given))
            round_.append(-1)  # the closing bracket of this weight multiplies no more
        elif token == ")" and round_:
            start = round_.pop()
            if start >= 0:
                _scale(pieces, start, 1.1)
        elif token == "]" and square:
            _scale(pieces, square.pop(), 1 / 1.1)
        else:
            pieces.extend([text, weight] for text, weight in _signed(token))
    for start in [s for s in round_ if s >= 0]:
        _scale(pieces, start, 1.1)
    for start in square:
        _scale(pieces, start, 1 / 1.1)
    return _merged(pieces)


def _signed(text: str) -> Iterator[tuple[str, float]]:
    """Text with words such as `red++` taken apart."""
    last = 0
    for match in _SIGNS.finditer(text):
        if match.start() > last:
            yield text[last : match.start()], 1.0
        base = 1.1 if match[2][0] == "+" else 0.9
        yield match[1], base ** len(match[2])
        last = match.end()
    if last < len(text):
        yield text[last:], 1.0


def _scale(pieces: list[list[object]], start: int, factor: float) -> None:
    for piece in pieces[start:]:
        piece[1] = float(piece[1]) * factor  # type: ignore[arg-type]


def _weight(given: str) -> float:
    value = float(given[:32])
    if not abs(value) <= MAX_WEIGHT:
        raise UserError(f"the weight {given[:32]} in the prompt is too large; give -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
    return value


def _merged(pieces: list[list[object]]) -> list[tuple[str, float]]:
    out: list[tuple[str, float]] = []
    for text, weight in pieces:
        same = out and abs(out[-1][1] - float(weight)) < 1e-9  # type: ignore[arg-type]
        if same:
            out[-1] = (out[-1][0] + str(text), out[-1][1])
        else:
            out.append((str(text), round(float(weight), 6)))  # type: ignore[arg-type]
    return out or [("", 1.0)]
