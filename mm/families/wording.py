"""Prompts that pipelines read as they are written."""

from __future__ import annotations

from collections.abc import Container

_CHANGES: tuple[str, ...] = ("clean_caption", "enable_prompt_rewrite", "use_pe")


def as_written(takes: Container[str]) -> dict[str, bool]:
    """Arguments of a call by which a pipeline leaves prompts as they are.

    PixArt and others would take "<mug>" out of one as a tag of HTML. LongCat-Image and ERNIE-Image would have a
    language model write another one, without an adapter's name.

    Args:
        takes: names of the call's arguments.
    """
    return {name: False for name in _CHANGES if name in takes}
