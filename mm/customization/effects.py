"""Settings of a run that would have no effect, which are refused before it starts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from mm.core.checks import shown
from mm.core.errors import UserError

_OF_WORDS = ("textual-inversion",)  # methods that train rows of embeddings alone


def check_effects(
    method: str, kind: str, given: Mapping[str, Any], *, drawn: bool = False,
    guard: Sequence[str] = (), regularization: object = None, noun: str = "",
) -> None:  # fmt: skip
    """Checks what a user has given against the kind, the method and the other settings.

    Args:
        method: its name.
        kind: of what is learned.
        given: settings that the user has given.
        drawn: whether the pictures of a slider are drawn by the base.
        guard: concepts that stay.
        regularization: the folder of pictures of the class.
        noun: the subject's class.

    Raises:
        UserError: with the first setting that changes nothing, its value, and what to do.
    """
    lost: dict[str, str] = {}
    if kind != "subject":
        lost["companions"] = f"subjects are shown beside other things, and the kind is {kind!r}"
    if kind != "style":
        lost["recoloured"] = f"pictures get the colours of styles, and the kind is {kind!r}"
    if kind in ("edit", "slider"):
        lost["strangers"] = f"other names are held for subjects and styles, and the kind is {kind!r}"
        lost["caption_dropout"] = f"captions are never left out where the kind is {kind!r}"
    if given.get("preserve") == 0:
        lost["strangers"] = "other names are held to the base with the weight preserve, which is 0"
    if not drawn:
        lost["slider_pictures"] = "no pictures are drawn by the base here"
    if not guard:
        lost["guard_weight"] = lost["guard_batch"] = "no concept is guarded"
    if regularization is None:
        lost["regularize"] = "there are no regularization pictures"
    for name, why in lost.items():
        value = given.get(name)
        if value is not None and value != 0:
            raise UserError(f"{name} is {shown(value)}, and {why}; leave it out")
    if method in _OF_WORDS and given.get("learning_rate") is not None:  # of a list of settings for many methods, often
        warnings.warn(
            f"learning_rate is {shown(given['learning_rate'])}, and {method} trains a word alone, whose rate is "
            "row_rate",
            stacklevel=3,
        )
    if given.get("preserve") == 0 and guard:
        raise UserError(
            "guarded concepts are held to the base with the weight preserve, which is 0; leave one of them out"
        )
    if noun and kind in ("edit", "slider"):
        raise UserError(f"noun is {shown(noun)}, which is the class of a subject or style, and the kind is {kind!r}; "
                        "leave it out")  # fmt: skip
