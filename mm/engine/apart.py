"""Pictures whose adapters each draw their subject in a place of its own, as a request asks for it (`Draw.apart`)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mm.adapters.stack import stack_of
from mm.customization.apart import REFINE, compose, size_in, words_of
from mm.customization.apart_base import OnLatents, Subjects
from mm.engine import calls
from mm.engine.events import CancelToken
from mm.engine.faster import less_work
from mm.engine.requests import Draw
from mm.engine.weighting import applies_weights, plain_text, weighed


def stand_ins_of(request: Draw) -> Mapping[str, str]:
    """The known things that a request names, by word."""
    return request.apart if isinstance(request.apart, Mapping) else {}


def draw_apart(
    view: Any, arguments: Mapping[str, Any], request: Draw, *, steps: int | None,
    fast: Mapping[str, Any] | None, cancel: CancelToken, on_step: Callable[[int, Any, int | None], None],
) -> Any:  # fmt: skip
    """The picture of a request.

    Args:
        view: of a pipeline with adapters on it.
        arguments: of its call, by name.
        request: with `apart`.
        steps: sampling steps of each run.
        fast: settings by which each run leaves out work; None does all.
        cancel: asked after every step.
        on_step: called after every step with its number among all, latents, and how many steps there are.

    Raises:
        UserError: where adapters cannot be kept apart here (`mm.customization.apart`).
    """
    words = words_of(stack_of(view).list())
    plain = weighed(copy.copy(view), arguments)  # warns once, in the words of the request
    if not applies_weights(view):
        arguments = {**arguments, **plain}
        request = replace(request, prompt=plain_text(request.prompt))
    asked = Subjects(
        prompt=request.prompt, words=tuple(words), seed=request.seed or 0, stand_ins=stand_ins_of(request),
        read=plain_text,
    )  # fmt: skip
    refine = REFINE if request.refine is None else request.refine
    runs = 1 + len(asked.words) * (2 if refine else 1)
    done = 0

    def call(text: str, seed: int, on_latents: OnLatents) -> Any:
        nonlocal done
        number = done if asked.still_in(text) else 0  # the base may draw more than once
        total = None if steps is None else runs * steps
        given = dict(arguments) | {"prompt": text}
        own = copy.copy(view)  # it applies the weights of this prompt alone
        with less_work(own, given, fast):  # within it the denoiser is not seen, so neither are its adapters
            picture = calls.draw(
                own, given | weighed(own, given), [seed], steps=steps, cancel=cancel,
                on_step=lambda step, latents: on_step(number * (steps or 0) + step, latents, total), change=on_latents,
            )[0].picture  # fmt: skip
        done = number + 1
        return picture

    return compose(view, asked, call, words, refine=refine, size=size_in(arguments)).picture
