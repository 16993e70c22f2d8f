"""Which backend runs an op: one table, looked up when the op is called.

Design choices:
- A backend is a module with `absence()` (why it is not there, or None) and the ops it has under their own names. What
  it lacks, and float64, goes to `reference`, which has everything.
- The choice is made at run time, by the device of the first tensor: CPU tensors go to `cpu`, CUDA tensors to
  `triton`, where these are there; all others to `reference`.
- It can be forced: `with use_backend("reference"):` for a block, `MM_KERNELS=reference` for a process. A forced backend
  that is not there raises; nothing is swapped silently.
- `MM_KERNELS_ISA=avx2|portable` (read by `cpu` at its first call) caps the instruction set, for tests and bug reports.
- Shapes and types are checked in `checks` before it comes here.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mm.core.errors import UserError

BACKENDS = ("reference", "cpu", "triton")
_BY_DEVICE = {"cpu": "cpu", "cuda": "triton"}
_forced: ContextVar[str | None] = ContextVar("mm_kernels_backend", default=None)


@cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"mm.kernels.{name}")


@cache
def absence(name: str) -> str | None:
    """Why a backend is not there; None where it is."""
    if name not in BACKENDS:
        raise UserError(f"no backend of the kernels is called {name!r}; there are {', '.join(BACKENDS)}")
    return None if name == "reference" else _module(name).absence()


def backends() -> dict[str, str]:
    """Every backend and what it is here: `ready`, or why it is absent."""
    return {name: absence(name) or "ready" for name in BACKENDS}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """All ops of this thread run on one backend inside the block."""
    _require(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def _require(name: str) -> str:
    why = absence(name)
    if why:
        raise UserError(
            f"the kernels' backend {name!r} is not here: {why}. Choose another with MM_KERNELS or use_backend(), or"
            " leave the choice to mm"
        )
    return name


def backend_for(x: Tensor) -> str:
    """The backend that an op on x runs on now."""
    forced = _forced.get() or os.environ.get("MM_KERNELS")
    if forced:
        return _require(forced)
    chosen = _BY_DEVICE.get(x.device.type, "reference")
    return "reference" if x.dtype == torch.float64 or absence(chosen) else chosen


def implementation(op: str, x: Tensor) -> Callable[..., Any]:
    """The function that computes `op` on x."""
    return _function(backend_for(x), op)


@cache
def _function(backend: str, op: str) -> Callable[..., Any]:
    return getattr(_module(backend), op, None) or getattr(_module("reference"), op)
