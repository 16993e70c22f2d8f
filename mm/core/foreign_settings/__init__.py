"""Settings that other programs keep in PNG files, under mm's names.

Design choices
- One module a dialect; each takes parsed text and gives a plain dict. Known settings have the names prompt,
  negative_prompt, seed, steps, guidance, sampler, scheduler, width, height and model; everything else is kept under
  "other", by the program's own names.
- A value of a wrong type is kept under "other" too: it is another program's text, and no reason to lose the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm.core.foreign_settings import a1111, comfyui, invokeai, swarmui


def read_foreign(texts: Mapping[str, str], source: str) -> dict[str, Any] | None:
    """Settings by the text chunks of a PNG; None where no dialect is recognized.

    Args:
        texts: text by keyword.
        source: where they come from, for error messages.

    Returns:
        Settings by mm's names.

    Raises:
        UserError: where a dialect is recognized and its text is damaged.
    """
    parameters = texts.get("parameters")
    if parameters is not None:
        if parameters.lstrip().startswith("{"):
            return swarmui.read(parameters, f"{source}: parameters")
        return a1111.read(parameters)
    for keyword, read in (("invokeai_metadata", invokeai.read), ("sd-metadata", invokeai.read_old)):
        if keyword in texts:
            return read(texts[keyword], f"{source}: {keyword}")
    for keyword, read_graph in (("prompt", comfyui.read), ("workflow", comfyui.read_workflow)):
        if texts.get(keyword, "").lstrip().startswith("{"):
            return read_graph(texts[keyword], f"{source}: {keyword}")
    return None
