"""All families, and which of them a model belongs to.

Design choices
- Every module of this package that defines `FAMILIES` (a tuple) is read, so that a new family is one file.
- Other packages bring families through the entry point group "mm.families": an object of that group is a `Family`, a
  sequence of them, or a function that gives either. They are loaded at the first question. One that cannot be loaded
  warns with its name and is left out.
- A family registered later wins over an earlier one with the same class name and as many matching config values, so
  that a package can replace a family of mm.
- A pipeline is asked first by its class (and those it inherits from), then by its denoisers. Among the families that a
  class name belongs to, the one with the most matching config values is taken, and one with a value that differs never.
"""

from __future__ import annotations

import importlib
import pkgutil
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mm.core.errors import UserError
from mm.families.family import Family, Rules

GROUP = "mm.families"
_LOCK = threading.RLock()
_families: dict[str, Family] = {}
_loaded = False


def register(family: Family, *, replace: bool = False) -> Family:
    """Adds a family; `replace` allows a name that is there already. Gives the family back.

    Raises:
        TypeError: where it is no `Family`.
        UserError: where the name is taken.
    """
    if not isinstance(family, Family):
        raise TypeError(f"{family!r} is no mm.families.Family")
    with _LOCK:
        _load()
        return _add(family, replace)


def unregister(name: str) -> None:
    """Takes a family off, for example at the end of a test. Raises KeyError where there is none of that name."""
    with _LOCK:
        _load()
        del _families[name]


def families() -> tuple[Family, ...]:
    """All families, those of mm first."""
    with _LOCK:
        _load()
        return tuple(_families.values())


def family_named(name: str) -> Family:
    """The family of that name. Raises KeyError with the known names where there is none."""
    known = {f.name: f for f in families()}
    if name not in known:
        raise KeyError(f"no family {name!r}; known: {', '.join(sorted(known))}")
    return known[name]


def family_of(target: Any, config: Mapping[str, Any] | None = None) -> Family | None:
    """The family of a pipeline, a module, a class or a class name.

    Args:
        target: a pipeline (its class decides, then its denoiser), a module (its class, then its config), a class, or
            the name of a class or of a `model_type` of transformers.
        config: with a name, the config of the denoiser, where it is at hand.

    Returns:
        The family, or None where none is known.
    """
    target = _plain(target)
    if isinstance(target, str):
        return _best((target.rpartition(":")[2],), config or {})
    if isinstance(target, type):
        return _best([kind.__name__ for kind in target.__mro__], {})
    names = [kind.__name__ for kind in type(target).__mro__]
    parts = getattr(target, "components", None)
    if not isinstance(parts, Mapping):
        return _best(names, _config(target))
    plain = [_plain(part) for part in parts.values()]
    denoisers = [part for part in plain if part is not None and type(part).__name__ in _denoiser_names()]
    own = _config(denoisers[0]) if denoisers else {}
    return _best(names, own) or next((found for part in denoisers if (found := family_of(part))), None)


def rules_of(target: Any) -> Rules | None:
    """The site rules of a module's class, by the class or one that it inherits from; None for an unknown one."""
    kinds = target if isinstance(target, type) else type(_plain(target))
    for kind in kinds.__mro__:
        for known in reversed(families()):
            for table in (known.denoisers, known.text_encoders):
                if kind.__name__ in table:
                    return table[kind.__name__]
    return None


def is_text_encoder(target: Any) -> bool:
    """Whether a module is of a class that a family names as text encoder, and none names as denoiser."""
    names = {kind.__name__ for kind in type(_plain(target)).__mro__}
    return bool(names & _text_encoder_names()) and not names & _denoiser_names()


def is_denoiser(target: Any) -> bool:
    """Whether a module is of a class that a family names as the part that draws."""
    return bool({kind.__name__ for kind in type(_plain(target)).__mro__} & _denoiser_names())


def model_types() -> tuple[str, ...]:
    """`model_type` values of transformers' configs that a family draws and reads with."""
    return tuple(sorted(kind for known in families() for kind in known.model_types))


def _denoiser_names() -> set[str]:
    return {name for known in families() for name in known.denoisers}


def _text_encoder_names() -> set[str]:
    return {name for known in families() for name in known.text_encoders}


def _plain(target: Any) -> Any:
    """A module out of wrappers, such as that of torch.compile; anything else as it is."""
    if isinstance(target, type) or not hasattr(target, "named_modules"):
        return target
    from mm.layers.surgery import unwrapped  # with torch, which the registry does not need

    return unwrapped(target)


def _config(module: Any) -> Mapping[str, Any]:
    config = getattr(module, "config", None)
    if isinstance(config, Mapping):
        return config
    return getattr(config, "__dict__", {}) if config is not None else {}


def _best(names: Iterable[str], config: Mapping[str, Any]) -> Family | None:
    """The family of the first name that has one."""
    for name in names:
        fitting: list[tuple[int, int, Family]] = []
        for order, known in enumerate(families()):
            if name not in known.classes and name not in known.denoisers and name not in known.model_types:
                continue
            own = name in known.classes and _alone(name, known)
            wrong = [k for k, value in known.config.items() if k in config and config[k] != value]
            if wrong and not own:
                continue
            unsaid = sum(key not in config for key in known.config)
            fitting.append((len(known.config) - 2 * unsaid, order, known))
        if fitting:
            return max(fitting, key=lambda entry: entry[:2])[2]
    return None


def _alone(name: str, one: Family) -> bool:
    """Whether only this family has the pipeline class, so that its config decides nothing."""
    return not any(name in other.classes for other in families() if other is not one)


def _add(new: Family, replace: bool = False) -> Family:
    if new.name in _families and not replace:
        raise UserError(f"a family {new.name!r} is registered already; choose another name, or replace=True")
    _families.pop(new.name, None)  # a replaced family counts as the latest
    _families[new.name] = new
    return new


def _load() -> None:
    global _loaded
    if _loaded:
        return
    _loaded = True
    for found in _own():
        _add(found)
    for label, found in _others():
        try:
            _add(found)
        except ValueError as error:
            warnings.warn(f"the family of the entry point {label} is left out: {error}", stacklevel=4)


def _own() -> Iterator[Family]:
    package = importlib.import_module("mm.families")
    for info in pkgutil.iter_modules(package.__path__):
        yield from getattr(importlib.import_module(f"mm.families.{info.name}"), "FAMILIES", ())


def _others() -> Iterator[tuple[str, Family]]:
    from importlib.metadata import entry_points

    for point in entry_points(group=GROUP):
        label = f"{point.name} = {point.value}"
        try:
            found: Any = point.load()
            found = found() if callable(found) else found
            several = [found] if isinstance(found, Family) else list(found)
            if wrong := [item for item in several if not isinstance(item, Family)]:
                raise TypeError(f"{wrong[0]!r} is no mm.families.Family")
        except Exception as error:  # another package's code: whatever it raises, mm goes on without it
            warnings.warn(f"the family of the entry point {label} cannot be loaded: {error!r}", stacklevel=5)
            continue
        yield from ((label, item) for item in several)
