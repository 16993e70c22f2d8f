"""While a pipeline is calibrated, each prompt is encoded once, however many passes draw it.

Design choices
- What `encode_prompt` returns is kept by its arguments. Text encoders are no part of what is quantized by default, and
  on a CPU a large one takes as long as several steps.
- A pipeline whose prompts are encoded by a part that is being quantized must see each pass: the first call shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from mm.layers.surgery import linears


@contextmanager
def prompts_remembered(pipe: Any, roots: Iterable[nn.Module]) -> Iterator[None]:
    """Keeps what `pipe.encode_prompt` returns, by its arguments; nothing changes for a target without that method.

    Args:
        pipe: a pipeline, or a bare module.
        roots: what is being quantized. Where one of them encodes the prompts, nothing is kept.
    """
    encode = getattr(pipe, "encode_prompt", None)
    if not callable(encode) or "encode_prompt" in vars(pipe):
        yield
        return
    pipe.encode_prompt = _Remembered(encode, tuple(roots))
    try:
        yield
    finally:
        del pipe.encode_prompt


class _Remembered:
    def __init__(self, encode: Callable[..., Any], roots: tuple[nn.Module, ...]) -> None:
        self.encode, self.roots = encode, roots
        self.__wrapped__ = encode  # for inspect.signature
        self.kept: dict[Hashable, Any] = {}
        self.changes: bool | None = None  # whether a root takes part; not known before the first call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.changes is None:
            return self._first(args, kwargs)
        key = None if self.changes else _key((args, kwargs))
        if key is None:
            return self.encode(*args, **kwargs)
        if key not in self.kept:
            self.kept[key] = _copied(self.encode(*args, **kwargs))
        return _copied(self.kept[key])

    def _first(self, args: Any, kwargs: Any) -> Any:
        """A call that is watched for layers of the roots."""
        called: list[nn.Module] = []
        with ExitStack() as stack:
            for root in self.roots:
                for _, layer in linears(root):
                    hook = layer.register_forward_pre_hook(lambda module, _: called.append(module))
                    stack.callback(hook.remove)
            result = self.encode(*args, **kwargs)
        self.changes = bool(called)
        key = None if self.changes else _key((args, kwargs))
        if key is not None:
            self.kept[key] = _copied(result)
        return result


def _key(value: Any) -> Hashable | None:
    """A value that is equal for equal arguments; None for arguments that cannot be compared, such as tensors."""
    if isinstance(value, dict):
        value = tuple(sorted(value.items()))
    if isinstance(value, (list, tuple)):
        parts = [_key(part) for part in value]
        return None if None in parts else (type(value).__name__, *parts)
    if value is None or isinstance(value, (str, bool, int, float, torch.device, torch.dtype)):
        return (type(value).__name__, str(value))
    return None


def _copied(value: Any) -> Any:
    """The value with its tensors cloned, so that a pipeline may change in place what it got."""
    if torch.is_tensor(value):
        return value.clone()
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_copied(part) for part in value)
    return value
