"""Methods of a model that run through `forward`, so that offloading and casting hooks act on them as well.

accelerate and diffusers put their hooks around the `forward` of a module: they move or cast its weights before and
after. A method that uses weights and is called beside `forward` finds them on the meta device, on another device or in
8 bits. A method marked with `entry_point` is called through `forward`, hooks included.

The same wrapper gives every model diffusers' `return_dict` argument.

Example:
    class Head(ForwardMixin, ModelMixin, ConfigMixin):
        def forward(self, x): ...

        @entry_point
        def sample(self, x): ...
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

from diffusers.utils.outputs import BaseOutput

Method = TypeVar("Method", bound=Callable[..., Any])
_METHOD = "_entry_point"  # the argument of `forward` that carries the method to run


@dataclass
class SampleOutput(BaseOutput):
    """What a model gives with `return_dict=True`. sample: the output; hidden: further tensors where they were asked."""

    sample: Any
    hidden: Any = None


def entry_point(method: Method) -> Method:
    """Makes a method of a `ForwardMixin` class run through the `forward` of its object.

    `forward` itself is called, not the module: hooks of offloading and casting replace `forward`, and a model that was
    compiled in place does not compile the method as well.
    """

    @functools.wraps(method)
    def through_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs, **{_METHOD: method})

    return cast("Method", through_forward)


class ForwardMixin:
    """For modules with entry points.

    Attributes:
        output_class: What `return_dict=True` returns; its fields take the outputs in order.
    """

    output_class: ClassVar[type[BaseOutput]] = SampleOutput

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__:
            cls.forward = _dispatching(cls.__dict__["forward"])  # type: ignore[attr-defined]


def _dispatching(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` that runs an entry point where one is given, and knows `return_dict`."""

    @functools.wraps(forward)
    def dispatch(self: Any, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> Any:
        method = kwargs.pop(_METHOD, None)
        if method is not None:
            return method(self, *args, **kwargs)
        out = forward(self, *args, **kwargs)
        if return_dict is None:
            return out
        parts = out if isinstance(out, tuple) else (out,)
        return self.output_class(*parts) if return_dict else parts

    signature = inspect.signature(forward)
    extra = inspect.Parameter("return_dict", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="bool | None")
    dispatch.__signature__ = signature.replace(parameters=[*signature.parameters.values(), extra])  # type: ignore[attr-defined]
    return dispatch
