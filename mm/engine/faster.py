"""Less work a picture, as a request asks for it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mm.engine.views import call_parameters
from mm.fast.guidance import AdaptiveGuidance
from mm.fast.hook import adaptive_guidance


@contextmanager
def less_work(view: Any, arguments: dict[str, Any], settings: Mapping[str, Any] | None) -> Iterator[None]:
    """Within the context a call of `view` leaves out work.

    Args:
        view: of a pipeline, used by this run alone.
        arguments: of the call; a pipeline with `fast` of its own gets it here.
        settings: from `Capabilities.fast_of`; None does all the work.
    """
    if settings is None:
        yield
    elif "fast" in call_parameters(view):
        arguments["fast"] = dict(settings)
        yield
    else:
        with adaptive_guidance(view, AdaptiveGuidance(**settings)) as report:
            yield
        if not report.guided:
            text = f"fast: {type(view).__name__} computed no guidance here, so nothing was left out"
            warnings.warn(text, stacklevel=3)
