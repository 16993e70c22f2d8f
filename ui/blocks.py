"""Gradio's page, without what it fetches by itself.

Gradio downloads a picture that a request gives by its address. Here such a request is refused before that.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
from gradio.components.api_component import Api

_SCHEMES = ("http:", "https:", "ftp:", "file:", "data:")


class Page(gr.Blocks):
    """A page that fetches nothing a request names."""

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], state: Any, explicit_call: bool = False
    ) -> list[Any]:
        """Refuses addresses, fills in what a call leaves out at its end, then goes on as Gradio does."""
        if not explicit_call and _names_address(inputs):
            raise gr.Error(
                "a picture is given by its address, which is not fetched; upload the file", print_exception=False
            )
        missing = block_fn.inputs[len(inputs) :]
        if inputs and all(isinstance(one, Api) for one in missing):
            inputs = [*inputs, *(one.value for one in missing)]
        return await super().preprocess_data(block_fn, inputs, state, explicit_call)


def _names_address(value: Any, depth: int = 0) -> bool:
    """Whether a file in a request is given by an address."""
    if depth > 20:
        return True  # no input of the page is that deep
    if isinstance(value, list | tuple):
        return any(_names_address(one, depth + 1) for one in value)
    if not isinstance(value, dict):
        return False
    path = value.get("path") or (value.get("url") if "path" in value or "meta" in value else None)
    if isinstance(path, str) and path.strip().lower().startswith(_SCHEMES):
        return True
    return any(_names_address(one, depth + 1) for one in value.values())
