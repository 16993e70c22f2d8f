"""What is said of pictures that a model has checked itself, in the same words by every command and pipeline."""

from __future__ import annotations

from collections.abc import Sequence

from mm.core.nouns import counted


def lacking(prompt: str, tries: int, found: Sequence[tuple[int, Sequence[str]]]) -> str:
    """A warning of what is missing in pictures.

    Args:
        prompt: of the pictures.
        tries: the most times that each was drawn.
        found: the seed of each picture that lacks something, and what.
    """
    each = "; ".join(f"{', '.join(missing)} (seed {seed})" for seed, missing in found)
    return f"{prompt!r}: the model does not see in any of {counted(tries, 'try', 'tries')} {each}"


def unchecked(prompt: str) -> str:
    """A warning that the pictures of a prompt were not checked, although it was asked for."""
    return (
        f"best_of: {prompt!r} is not read in full, or names what the model was erased of, so its pictures were not "
        "checked, and drawn once each"
    )
