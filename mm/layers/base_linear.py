"""The base of a linear layer: its weight at 16 bits, or at 4 or 8 in groups of 64 with scales, and SVDQuant's branch.

Design choices
- Without a 16-bit weight, `.weight` is computed: what the base does to x, smoothing undone, its branch included. Other
  libraries read it; writing to it raises.
- `state_dict` of a quantized layer is the checkpoint format: qweight, weight_scales, smooth, down, up, bias.

Legend: N outputs, K inputs, C = K up to whole groups of 64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from mm.core.errors import UserError
from mm.kernels.packing import GROUP, integers_of, padded
from mm.layers.computed_weight import computed
from mm.layers.offloading import stored
from mm.layers.originals import kept, kept_bias


@dataclass(frozen=True, kw_only=True)
class ActivationRule:
    """How a quantized layer's input is rounded; 16 bits = not at all. See `mm.kernels.quantize_activations`."""

    bits: int = 8
    group: int = 0
    unsigned: bool = False
    shift: float = 0.0

    def __post_init__(self) -> None:
        if self.bits not in (4, 8, 16) or self.group not in (0, GROUP):
            raise ValueError(f"activations of {self.bits} bits in groups of {self.group}: bits 4, 8, 16; group 0, 64")
        if self.unsigned and self.bits != 4:
            raise ValueError(f"unsigned activations take 4 bits, not {self.bits}")


class QuantizableLinear(nn.Linear):
    """A linear layer whose weight can be replaced by integers; its subclass runs it (`mm.layers.linear`)."""

    qweight: Tensor
    weight_scales: Tensor
    smooth: Tensor | None
    down: Tensor | None
    up: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._extras()

    def _extras(self) -> None:
        for name in ("smooth", "down", "up"):
            self.register_buffer(name, None)
        self.activation = ActivationRule()

    def _join(self) -> None:
        """Called when the base has changed."""

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As torch's; a quantized layer keeps its type where 8-bit floats are asked for (layerwise casting).

        Its weight is smaller already, and scales in 8-bit floats would change what it stands for.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if self.bits < 16 and dtype is not None and dtype.itemsize == 1:
            return self if device is None else super().to(device=device, non_blocking=non_blocking)
        return super().to(*args, **kwargs)

    @classmethod
    def empty(
        cls, in_features: int, out_features: int, *, bias: bool, bits: int, rank: int, smooth: bool, dtype: torch.dtype,
        activation: ActivationRule, device: Any = None,
    ) -> Self:  # fmt: skip
        """A quantized layer whose tensors are still to be loaded."""
        made = cls(in_features, out_features, bias=bias, device=device, dtype=dtype)
        like: dict[str, Any] = {"device": device}
        wide = padded(in_features)
        made._drop_weight()
        shape = (out_features, wide // 2) if bits == 4 else (out_features, wide)
        made.register_buffer("qweight", torch.empty(shape, dtype=torch.uint8 if bits == 4 else torch.int8, **like))
        made.register_buffer("weight_scales", torch.empty(out_features, wide // GROUP, dtype=dtype, **like))
        made.smooth = torch.empty(in_features, dtype=dtype, **like) if smooth else None
        if rank:
            made.down = torch.empty(rank, in_features, dtype=dtype, **like)
            made.up = torch.empty(out_features, rank, dtype=dtype, **like)
        made.activation = activation
        return made

    @property
    def bits(self) -> int:
        """Of the base's weight: 4, 8 or 16."""
        packed = self._buffers.get("qweight")
        return 16 if packed is None else 4 if packed.dtype == torch.uint8 else 8

    def quantize_(
        self,
        qweight: Tensor,
        weight_scales: Tensor,
        *,
        smooth: Tensor | None = None,
        down: Tensor | None = None,
        up: Tensor | None = None,
        bias: Tensor | None = None,
        activation: ActivationRule | None = None,
    ) -> None:
        """Replaces the 16-bit weight by integers, in place. `down` reads the raw input (1 / smooth folded in).

        qweight: uint8 (N, C / 2) as `pack_int4` makes it, or int8 (N, C). `bias` replaces the layer's own where given.
        """
        if self.bits != 16:
            raise ValueError(f"this layer has {self.bits}-bit weights already; quantize the 16-bit model again")
        if kept(self) is not None or kept_bias(self) is not None:
            raise UserError("patches have changed the weight or bias of this layer; undo or bake them, then quantize")
        dtype, device = self.weight.dtype, self.weight.device
        self._drop_weight()
        self.register_buffer("qweight", qweight.to(device))
        self.register_buffer("weight_scales", weight_scales.to(device, dtype))
        for name, tensor in (("smooth", smooth), ("down", down), ("up", up)):
            # A copy each: layers of a group come with the same tensor, and a file holds no tensor twice.
            setattr(self, name, None if tensor is None else tensor.to(device, dtype).contiguous().clone())
        if bias is not None:
            self.bias = nn.Parameter(bias.to(device, dtype), requires_grad=False)
        self.activation = activation or ActivationRule()
        self._join()

    def dequantize_(self, dtype: torch.dtype | None = None) -> None:
        """Replaces the integers and the SVD branch by the 16-bit weight that they stand for, in place.

        Args:
            dtype: of the weight; by default that of the scales.
        """
        weight, bias = self.base_weight(dtype), self._unlifted_bias()
        for name in ("qweight", "weight_scales"):
            del self._buffers[name]
        for name in ("smooth", "down", "up"):
            setattr(self, name, None)
        self.activation = ActivationRule()
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
        self._join()

    def _drop_weight(self) -> None:
        del self._parameters["weight"]

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self._buffers.get("qweight") is not None:
            return computed(self.base_weight())
        return super().__getattr__(name)

    def integers(self) -> Tensor:
        """int8 (N, K) of a quantized base."""
        return integers_of(self._stored("qweight"))[:, : self.in_features]

    def _stored(self, name: str) -> Tensor:
        """One of the layer's tensors, also where offloading keeps its values elsewhere."""
        tensor = stored(self, name)
        assert tensor is not None, name
        return tensor

    def base_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """(N, K): what the base does to x, before rounding of x: smoothing undone, its SVD branch included."""
        if self.bits == 16:
            weight = self._stored("weight")
            return weight if dtype is None else weight.to(dtype)
        work = torch.promote_types(torch.float32, dtype or torch.float32)
        weight = self._dense(work)
        if self.down is not None and self.up is not None:
            weight = weight + self._stored("up").to(work) @ self._stored("down").to(work)
        return weight.to(dtype or self.weight_scales.dtype)

    def _dense(self, dtype: torch.dtype) -> Tensor:
        """(N, K) of a quantized base's integers, smoothing undone."""
        steps = self._stored("weight_scales").to(dtype).repeat_interleave(GROUP, 1)[:, : self.in_features]
        weight = self.integers().to(dtype) * steps
        return weight if self.smooth is None else weight / self._stored("smooth").to(dtype)

    def _unlifted_bias(self) -> Tensor | None:
        """The bias where x is not shifted: the stored one has the shift's part taken off."""
        if self.bits == 16 or not self.activation.shift:
            return self.bias
        lifted = self._dense(torch.promote_types(torch.float32, self.weight_scales.dtype)).sum(1)
        return lifted * self.activation.shift + (0.0 if self.bias is None else self.bias)

    def _like(self) -> dict[str, Any]:
        tensor = self.weight_scales if self.bits != 16 else self.weight
        return {"dtype": tensor.dtype, "device": tensor.device}
