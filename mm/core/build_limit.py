"""Building a module by settings from outside, without weights and within limits.

Design choices
- Settings name sizes, and a wrong one (`depth: 10**6`, `width: 10**6`) builds without end or asks for terabytes. What
  may be built is bounded by what the weights' file holds, which was counted before.
- Parameters become meta tensors as they are registered, so none takes memory. Tensors that constructors make on the way
  (tables of positions) are bounded too: each request is checked before it is answered.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode

from mm.core.errors import UserError

_SPARE_TENSORS = 64  # tied weights and parameters that are not saved
_SPARE_VALUES = 1 << 22


class _Requests(TorchDispatchMode):
    """Checks the size of every tensor that is asked for by its shape."""

    def __init__(self, most: int, source: str) -> None:
        super().__init__()
        self.most, self.source = most, source

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_meta = torch.device(kwargs.get("device") or "cpu").type == "meta"
        asked = 0 if on_meta else _asked(func.overloadpacket.__name__, args)
        if asked > self.most:
            raise UserError(f"{self.source} asks for a table of {asked} values; its weights hold too few for that size")
        return func(*args, **kwargs)


def _asked(name: str, args: Sequence[Any]) -> int:
    """How many values an operator is asked for; 0 where it takes no shape."""
    if name == "arange":
        numbers = [float(x) for x in args if isinstance(x, int | float)]
        start, end, step = (0.0, numbers[0], 1.0) if len(numbers) == 1 else (*numbers, 1.0)[:3]
        return int(abs(end - start) / abs(step)) if step and math.isfinite(end - start) else 0
    if name == "linspace":
        return int(args[2]) if len(args) > 2 else 0
    if name == "eye":
        return math.prod(int(x) for x in args[:2]) * (int(args[0]) if len(args) == 1 else 1)
    shapes = [x for x in args if isinstance(x, list | tuple) and x and all(isinstance(n, int) for n in x)]
    if not shapes or name in ("view", "_unsafe_view", "reshape", "permute", "expand", "sum", "mean"):
        return 0
    inputs = args[0].numel() if name == "repeat" and isinstance(args[0], Tensor) else 1
    return inputs * math.prod(shapes[0])


class _Counter:
    """Counts what one thread registers, and turns parameters into meta tensors."""

    def __init__(self, tensors: int, values: int, source: str) -> None:
        self.thread, self.source = threading.get_ident(), source
        self.tensors, self.values = 2 * tensors + _SPARE_TENSORS, 2 * values + _SPARE_VALUES
        self.modules = 64 * tensors + 4096
        self.made = self.size = self.nodes = 0

    def parameter(self, module: nn.Module, name: str, value: Any) -> nn.Parameter | None:
        if value is None or threading.get_ident() != self.thread:
            return None
        self.made, self.size = self.made + 1, self.size + value.numel()
        if self.made > self.tensors or self.size > self.values:
            raise UserError(f"{self.source} describes a larger model than its weights hold; copy or save it again")
        return value if value.is_meta else nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)

    def module(self, parent: nn.Module, name: str, value: Any) -> None:
        if threading.get_ident() == self.thread:
            self.nodes += 1
            if self.nodes > self.modules:
                raise UserError(f"{self.source} describes a larger model than its weights hold; copy or save it again")


@contextmanager
def build_limit(tensors: int, values: int, source: str) -> Iterator[None]:
    """Inside, modules are built without weights, and not larger than a file's.

    Args:
        tensors: how many tensors the file holds.
        values: how many values they have together.
        source: the settings' file, for error messages.

    Yields:
        Nothing. Raises UserError inside where something larger is built.
    """
    counter = _Counter(tensors, values, source)
    handles = [
        hooks.register_module_parameter_registration_hook(counter.parameter),  # type: ignore[arg-type]
        hooks.register_module_module_registration_hook(counter.module),
    ]
    try:
        with _Requests(8 * values + _SPARE_VALUES, source):
            yield
    finally:
        for handle in handles:
            handle.remove()


def build_empty(make: Callable[[], Any], tensors: int, values: int, source: str) -> Any:
    """What `make` builds, on the meta device and within the limits of `build_limit`.

    Raises UserError also where `make` fails, with the error's words: the settings do not describe a model.
    """
    try:
        with build_limit(tensors, values, source):
            return make()
    except UserError:
        raise
    except Exception as error:  # a constructor may fail in any way on sizes that do not fit each other
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        raise UserError(f"{source} describes no model that can be built ({why}); copy or save it again") from error
