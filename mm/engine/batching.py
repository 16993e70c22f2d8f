"""Which pictures can share a call without changing.

Design choices
- The last bits of 16-bit layers depend on the number of rows, since torch chooses other kernels for other sizes. Where
  a layer rounds its inputs to 8 or 4 bits, such a difference now and then moves a value into the next step, and the
  pictures drift apart: by up to 175 of 255 between batch sizes. A picture that is drawn alone has the same bits in any
  call, so models that round activations draw one by one.
- diffusers' pipelines that start from a picture encode it with the first generator alone, so that the other pictures of
  a call would not be those of their seeds. They draw one by one as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch import nn

from mm.layers.linear import BranchedLinear

_SHARED: ContextVar[bool] = ContextVar("shared", default=False)


@contextlib.contextmanager
def shared_calls() -> Iterator[None]:
    """Pictures share calls also where activations are rounded: for rates over many pictures that nobody draws again."""
    token = _SHARED.set(True)
    try:
        yield
    finally:
        _SHARED.reset(token)


def rounds_activations(pipe: Any) -> bool:
    """Whether a module of the pipeline has layers that round their inputs; never inside of `shared_calls`."""
    if _SHARED.get():
        return False
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return any(
        isinstance(layer, BranchedLinear) and layer.bits != 16 and layer.activation.bits != 16
        for module in modules
        for layer in module.modules()
    )
