"""Where a model reads text: the layers that erasure edits.

The family file names them: keys and values of cross-attention where there are such, else the projection of the text
encoder's output into the denoiser.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from mm.core.errors import UserError
from mm.families import family_of
from mm.families.registry import is_denoiser
from mm.layers.surgery import linears, roots_of


def text_layers(pipe: Any, patterns: tuple[str, ...] = ()) -> dict[str, nn.Linear]:
    """The linear layers of a pipeline where concepts are edited, by path below the pipeline.

    Args:
        pipe: a pipeline or a module.
        patterns: regular expressions for whole paths, instead of those of the family.

    Raises:
        UserError: where there are none, and for a pattern that is no regular expression.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"the site {pattern!r} is no regular expression ({error})") from error
    family = family_of(pipe)
    own = family.edit_sites if family is not None else ()
    found: dict[str, nn.Linear] = {}
    for name, root in roots_of(pipe).items():
        for path, layer in linears(root):
            whole = f"{name}.{path}".strip(".")
            if any(re.fullmatch(p, whole) for p in patterns) if patterns else is_edited(root, path, own):
                found[whole] = layer
    if not found and patterns:
        raise UserError(
            f"no linear layer of {type(pipe).__name__} has a path that matches {', '.join(patterns)}, so there is "
            "no layer that is known to read text; give other sites"
        )
    if not found:
        raise UserError(
            f"{type(pipe).__name__} has no layer that is known to read text; name the layers with sites=[...], as "
            "regular expressions over paths"
        )
    return found


def is_edited(root: nn.Module, path: str, patterns: tuple[str, ...]) -> bool:
    """Whether a layer of a denoiser is one that the family names."""
    return is_denoiser(root) and any(re.fullmatch(pattern, path) for pattern in patterns)


def groups_of(layers: dict[str, nn.Linear], features: dict[str, list[Any]]) -> list[list[str]]:
    """Layers that read the same features, so that one solution serves them: first by width, then by value."""
    groups: list[list[str]] = []
    for path in layers:
        first = features[path][0]
        for group in groups:
            other = features[group[0]][0]
            if other.shape == first.shape and bool((other == first).all()):
                group.append(path)
                break
        else:
            groups.append([path])
    return groups
