"""How strongly an adapter acts: kohya's alpha tensors, peft's settings with their patterns, or 1 without either.

Design choices
- An alpha tensor counts first: alpha / rank, as kohya's scripts and LyCORIS compute it. An alpha of 0 means the rank
  there. LyCORIS folds rsLoRA's root into the alpha it saves, and does not scale a LoKr of two full factors.
- peft's settings count next: alpha / r, alpha / sqrt(r) with `use_rslora` (Kalajdzievski 2023), alpha by
  `alpha_pattern` and the rank of a LoKr by `rank_pattern`. Without either, as in diffusers, the change acts in full.
- peft runs a pattern as a regular expression, whose time a file could make endless. mm matches names, `^`, `$`, `.`,
  `.*`, `.+`, `\\d`, `\\d+` and `[0-9]+` by a set of states, in time linear in both lengths; other syntax raises.
- Settings under which a file's tensors mean something else (PiSSA's changed base, aLoRA) raise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mm.core.errors import UserError
from mm.core.nouns import with_article

_LONGEST_PATTERN = 512
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "lycoris")
_CHANGED = {  # setting: why its adapters cannot be applied, where it is set
    "alora_invocation_tokens": "an activated LoRA, which acts after its invocation tokens only",
    "use_qalora": "a QALoRA, whose inputs are pooled",
    "layer_replication": "for a model whose layers were replicated",
    "use_bdlora": "a block-diagonal LoRA",
    "arrow_config": "routed among several adapters (Arrow)",
}


@dataclass(frozen=True, kw_only=True)
class Strengths:
    """Settings of a file, by component where they name one."""

    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        for prefix in (*self._prefixes(), ""):
            _check(self._section(prefix), prefix)

    def _prefixes(self) -> set[str]:
        return {key.rpartition(".")[0] for key in self.settings if "." in key}

    def _section(self, prefix: str) -> dict[str, Any]:
        if not prefix:
            return {k: v for k, v in self.settings.items() if "." not in k}
        return {k.removeprefix(f"{prefix}."): v for k, v in self.settings.items() if k.startswith(f"{prefix}.")}

    def _prefix(self, module: str) -> str:
        return next((p for p in self._prefixes() if module.startswith(f"{p}.")), "")

    def section_of(self, module: str) -> dict[str, Any]:
        """The settings of a module's component, without its name."""
        return self._section(self._prefix(module))

    def of(self, module: str, rank: int | None, alpha: float | None) -> float:
        """The factor of a module's change.

        Args:
            module: its name in the file.
            rank: of its tensors; None for a LoKr of two full factors.
            alpha: of its alpha tensor, None without one.
        """
        if alpha is not None:
            return 1.0 if rank is None or alpha == 0 else alpha / rank
        own = self.section_of(module)
        prefix = self._prefix(module)
        name = module.removeprefix(f"{prefix}.") if prefix else module
        set_alpha = _by_pattern(own.get("alpha_pattern"), name, own.get("lora_alpha", own.get("alpha")))
        if set_alpha is None:
            return 1.0
        if rank is None:
            rank = _by_pattern(own.get("rank_pattern"), name, own.get("r"))
            if rank is None:
                raise UserError(f"the settings give {module} an alpha of {set_alpha} but no rank r")
        return float(set_alpha) / (math.sqrt(rank) if own.get("use_rslora") else rank)


def _check(own: Mapping[str, Any], prefix: str) -> None:
    of = f" of {prefix!r}" if prefix else ""
    # An OFT's r of 0 means that the size of its blocks is given.
    rotates = own.get("peft_type") == "OFT" or "oft_block_size" in own
    for key in ("lora_alpha", "alpha", *(() if rotates else ("r",))):
        _number(own.get(key), f"{key}{of}", optional=True)
    if not isinstance(own.get("use_rslora", False), bool | None):
        raise UserError(f"the setting use_rslora{of} is {own['use_rslora']!r}, not true or false")
    for key in ("alpha_pattern", "rank_pattern"):
        pattern = own.get(key)
        if not isinstance(pattern, dict | None):
            raise UserError(
                f"the setting {key}{of} is {with_article(type(pattern).__name__)}, not an object of numbers by name"
            )
        for name, value in (pattern or {}).items():
            _number(value, f"{key}[{name[:60]!r}]{of}")
            _tokens(name)
    for key in ("init_lora_weights", "init_weights"):
        start = own.get(key)
        if isinstance(start, list | dict) or start not in _PLAIN_STARTS:
            raise UserError(
                f"the setting {key}{of} is {start!r}: the adapter belongs to a base that its training changed; convert "
                "it to a plain LoRA with peft's path_initial_model_for_weight_conversion"
            )
    for key, why in _CHANGED.items():
        if own.get(key):
            raise UserError(f"the setting {key}{of} says that the adapter is {why}; mm does not apply it")


def _number(value: Any, what: str, optional: bool = False) -> None:
    if value is None and optional:
        return
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < 1e9
    if not fine or value is None or (value <= 0 and what.startswith(("r", "rank"))):
        raise UserError(f"the setting {what} is {value!r}, not a {'positive ' if what.startswith('r') else ''}number")


def _by_pattern(pattern: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """peft's rule: the first pattern that is the end of a name, from a dot on; else the setting for all."""
    return next((value for key, value in (pattern or {}).items() if matches(key, name)), otherwise)


def matches(pattern: str, name: str) -> bool:
    """Whether peft's `re.match(rf"(.*\\.)?({pattern})$", name)` matches, for the syntax that mm accepts.

    Raises:
        UserError: for other syntax.
    """
    tokens, anchored = _tokens(pattern)
    starts = {0} if anchored else {0} | {i + 1 for i, letter in enumerate(name) if letter == "."}
    states: set[int] = set()
    for place, letter in enumerate(name):
        if place in starts:
            states.add(0)
        states = _skipped(states, tokens)
        following = set()
        for state in states:
            if state < len(tokens) and _fits(tokens[state][0], letter):
                following |= {state + 1, state} if tokens[state][1] else {state + 1}
        states = following
    if len(name) in starts:
        states.add(0)
    return len(tokens) in _skipped(states, tokens)


def _skipped(states: set[int], tokens: list[tuple[str, str]]) -> set[int]:
    """The states that can be reached by leaving out starred tokens."""
    out = set(states)
    for state in sorted(states):
        while state < len(tokens) and tokens[state][1] == "*":
            state += 1
            out.add(state)
    return out


def _fits(token: str, letter: str) -> bool:
    if token == r"\d":
        return letter.isdigit()
    return token == "any" or token == letter


def _tokens(pattern: str) -> tuple[list[tuple[str, str]], bool]:
    """A pattern's letters ("any" and "\\d" stand for sets), each with "", "+" or "*"; and whether it begins with ^.

    `a+` is one `a`, then `a*`; so a "+" token advances and stays, and only "*" may be left out.
    """
    anchored, rest = pattern.startswith("^"), pattern.removeprefix("^").removesuffix("$").replace("[0-9]", r"\d")
    tokens: list[tuple[str, str]] = []
    place = 0
    while place < len(rest):
        letter = rest[place]
        size = 2 if letter == "\\" else 1
        token = rest[place : place + size]
        token = token if token == r"\d" else "any" if token == "." else token.removeprefix("\\")
        times = rest[place + size : place + size + 1]
        times = times if times in ("*", "+") else ""
        odd = len(token) != 1 and token not in ("any", r"\d")
        special = (size == 1 and letter in "*+?()[]{}|^$") or (size == 2 and token.isalnum() and token != r"\d")
        if odd or special or len(rest) > _LONGEST_PATTERN:
            raise UserError(
                f"the settings match names by the regular expression {pattern[:80]!r}, which mm does not run; write "
                "layer names, with \\d+ or .* at most"
            )
        tokens.append((token, times))
        place += size + len(times)
    return tokens, anchored
