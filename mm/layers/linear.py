"""`BranchedLinear`: one linear layer as a sum, y = x W^T + b + sum_i s_i (x down_i^T) up_i^T.

Design choices
- W is 16-bit, or 4- or 8-bit in groups of 64 with scales (`quantize_`). The other terms are branches: thin, ordered,
  named, each with a live scale and an origin. SVDQuant's branch belongs to the base and is saved with it; LoRA and
  erasure branches come from patches and are not.
- Branches are laid side by side when they are attached, padded to a multiple of 16, so that all of them cost one `down`
  and one `up` in one op (`mm.kernels.branched_linear`). Their scales are one tensor: a slider recompiles nothing.
- It is an `nn.Linear`, so that adapters of other libraries, which look for that, wrap it. Without a 16-bit weight,
  `.weight` is computed: the base's meaning, smoothing undone, SVD branch included. Writing to it raises.
- A plain layer becomes one in place, by its class: references, hooks, compiled graphs and offloading stay with it.
- `state_dict` of a quantized layer is the checkpoint format: qweight, weight_scales, smooth, down, up, bias.
- Where a gradient is wanted, the same sum runs in plain torch: the ops are forward only.

Legend: M tokens, N outputs, K inputs, C = K up to whole groups of 64, G = C / 64, R ranks of all branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.core.errors import UserError
from mm.kernels import branched_linear
from mm.kernels.packing import GROUP, integers_of, padded
from mm.layers.branch import Branch as Branch
from mm.layers.branch import Scope as Scope
from mm.layers.branch import join
from mm.layers.branch import token_split as token_split
from mm.layers.computed_weight import computed
from mm.layers.offloading import foreign_forward, rebind, run_device, stored
from mm.layers.originals import kept


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


_BUFFERS = ("smooth", "down", "up", "_down", "_up", "_scales")


class BranchedLinear(nn.Linear):
    """A linear layer with branches over a 16-bit or quantized base."""

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
        for name in _BUFFERS:
            self.register_buffer(name, None)  # those that begin with "_" are not saved once they hold something
        self.activation = ActivationRule()
        self._branches: list[Branch] = []
        self._places: dict[str, slice] = {}

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> BranchedLinear:
        """Gives a layer room for branches, in place: it is the same object afterwards, with the same tensors.

        Args:
            linear: torch's own `nn.Linear`, or a `BranchedLinear`, which stays as it is.

        Raises:
            UserError: for other subclasses, and where the forward of this one layer was replaced.
        """
        if isinstance(linear, BranchedLinear):
            return linear
        if type(linear) is not nn.Linear:
            raise UserError(f"a {type(linear).__name__} ({type(linear).__module__}) is not torch's own nn.Linear")
        if foreign_forward(linear):
            raise UserError("the forward of this layer was replaced by another program; a branch would not act there")
        cast(Any, linear).__class__ = cls
        made = cast(BranchedLinear, linear)
        made._extras()
        rebind(made, nn.Linear.forward, cls.forward)
        return made

    def to_linear(self) -> nn.Linear:
        """Makes a 16-bit layer without branches torch's own class again, in place."""
        if self.bits != 16 or self._branches:
            raise ValueError(f"a layer of {self.bits} bits with {len(self._branches)} branches is no plain nn.Linear")
        for name in _BUFFERS:
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)
        for name in ("activation", "_branches", "_places"):
            self.__dict__.pop(name, None)
        made = cast(nn.Linear, self)
        cast(Any, made).__class__ = nn.Linear
        rebind(made, BranchedLinear.forward, nn.Linear.forward)
        return made

    @classmethod
    def empty(
        cls, in_features: int, out_features: int, *, bias: bool, bits: int, rank: int, smooth: bool, dtype: torch.dtype,
        activation: ActivationRule, device: Any = None,
    ) -> BranchedLinear:  # fmt: skip
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

    # ---- the base -----------------------------------------------------------------------------------------------

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
        if kept(self) is not None:
            raise UserError("patches have changed the weight of this layer; undo or bake them, then quantize")
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

    def effective_weight(self) -> Tensor:
        """(N, K) in fp32: base and branches. Raises UserError where a branch reads one scope of tokens only."""
        weight = self.base_weight(torch.float32)
        for branch in self._branches:
            if branch.scope:
                raise UserError(
                    f"branch {branch.name!r} acts on {branch.scope} tokens only: no single weight does that"
                )
            up, down = (tensor.to(weight.device, torch.float32) for tensor in (branch.up, branch.down))
            weight = weight + branch.scale * up @ down
        return weight

    # ---- branches -----------------------------------------------------------------------------------------------

    @property
    def branches(self) -> tuple[Branch, ...]:
        """What is attached, in order; the base's own SVD branch is not among them."""
        return tuple(self._branches)

    def attach(self, branch: Branch) -> None:
        """Adds a branch. Raises UserError when its name is taken or its shape does not fit."""
        if any(b.name == branch.name for b in self._branches):
            raise UserError(f"a branch {branch.name!r} is attached already; detach it or choose another name")
        want = (self.out_features, self.in_features)
        if (branch.up.shape[0], branch.down.shape[1]) != want:
            got = (branch.up.shape[0], branch.down.shape[1])
            raise UserError(
                f"branch {branch.name!r} is made for a layer of {got} outputs and inputs; this one has {want}"
            )
        self.arrange([*self._branches, branch])

    def arrange(self, branches: Sequence[Branch]) -> None:
        """Makes these the layer's branches, in this order; where it fails, those from before stay."""
        before = self._branches
        self._branches = list(branches)
        try:
            self._join()
        except BaseException:
            self._branches = before
            raise

    def detach(self, name: str) -> Branch:
        """Takes a branch off again; the layer is then what it was before, bit for bit."""
        found = self._find(name)
        self.arrange([b for b in self._branches if b is not found])
        return found

    def set_scale(self, name: str, scale: float) -> None:
        """Changes how strongly a branch acts, without rebuilding anything."""
        found = self._find(name)
        self._branches[self._branches.index(found)] = replace(found, scale=float(scale))
        if found.scope is None and self._scales is not None:
            with torch.inference_mode(self._scales.is_inference()), torch.no_grad():
                self._scales[self._places[name]] = float(scale)

    def _find(self, name: str) -> Branch:
        for branch in self._branches:
            if branch.name == name:
                return branch
        names = ", ".join(b.name for b in self._branches) or "none"
        raise UserError(f"no branch {name!r} is attached here; there are: {names}")

    def _join(self) -> None:
        """Lays the base's branch and the unscoped ones side by side."""
        name = "weight_scales" if self.bits != 16 else "weight"
        dtype, device = self._like()["dtype"], run_device(self, name)
        base = self.down is not None and self.up is not None
        parts = [("", self._stored("down"), self._stored("up"), 1.0)] if base else []
        parts += [(b.name, b.down, b.up, b.scale) for b in self._branches if b.scope is None]
        made = join(parts, self.in_features, self.out_features, device, dtype)
        self._places, self._down, self._up, self._scales = made.places, made.down, made.up, made.scales
        # accelerate moves every name in this set, also where there is no tensor.
        joined = {"_down", "_up", "_scales"}
        self._non_persistent_buffers_set -= joined
        if made.down is not None:
            self._non_persistent_buffers_set |= joined

    def _like(self) -> dict[str, Any]:
        tensor = self.weight_scales if self.bits != 16 else self.weight
        return {"dtype": tensor.dtype, "device": tensor.device}

    def _apply(self, fn: Any, recurse: bool = True) -> BranchedLinear:
        super()._apply(fn, recurse)
        # Attached tensors move along; trainable ones keep their identity for whoever optimizes them.
        self._branches = [
            b if b.down.requires_grad or b.up.requires_grad else replace(b, down=fn(b.down), up=fn(b.up))
            for b in self._branches
        ]
        if self._scales is not None and self._scales.device.type != "meta":
            self._scales = self._exact_scales(self._scales.device)
        return self

    def _exact_scales(self, device: torch.device) -> Tensor:
        """Scales in fp32 after the layer has changed its type, which would have rounded them."""
        with torch.inference_mode(False):
            scales = torch.zeros(cast(Tensor, self._scales).shape, device=device)
            for name, spot in self._places.items():
                scales[spot] = self._find(name).scale if name else 1.0
        return scales

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.refresh()

    def refresh(self) -> None:
        """Lays branches side by side again, for whoever has put tensors into the layer by hand."""
        if self._like()["device"].type != "meta":
            self._join()

    # ---- the sum ------------------------------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        """y (..., N) of x (..., K)."""
        learns = torch.is_grad_enabled() and (
            input.requires_grad
            or (self.bits == 16 and self.weight.requires_grad)
            or any(b.down.requires_grad or b.up.requires_grad for b in self._branches)
        )
        if learns:
            return self._plain(input)
        if self.bits != 16:
            rule = self.activation
            y = branched_linear(
                input, self.qweight, self.weight_scales, self.bias, self.smooth, self._down, self._up, self._scales,
                rule.bits, rule.group, rule.unsigned, rule.shift,
            )  # fmt: skip
        else:
            y = self._sixteen_bit(input)
        return self._scoped(y, input)

    def _sixteen_bit(self, x: Tensor) -> Tensor:
        """The base's weight in x's type, and the branches in the same op."""
        weight, bias = self.weight.to(x.dtype), self.bias
        if self._down is None:
            return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
        return branched_linear(x, weight, None, bias, None, self._down, self._up, self._scales)

    def _plain(self, x: Tensor) -> Tensor:
        """The sum in plain torch, with gradients for x and for branches that want them."""
        base = self.base_weight(x.dtype) if self.bits != 16 else self.weight.to(x.dtype)
        bias = self._unlifted_bias()
        y = F.linear(x, base, None if bias is None else bias.to(x.dtype))
        for branch in self._branches:
            if branch.scope is None:
                y = y + branch.scale * F.linear(
                    F.linear(x, branch.down.to(x.device, x.dtype)), branch.up.to(x.device, x.dtype)
                )
        return self._scoped(y, x)

    def _scoped(self, y: Tensor, x: Tensor) -> Tensor:
        for branch in self._branches:
            if branch.scope is None:
                continue
            mine, split = branch.token_range()
            low = F.linear(x[..., mine, :], branch.down.to(x.device, x.dtype))
            parts = [y[..., :split, :], y[..., split:, :]]
            place = 0 if branch.scope == "text" else 1
            parts[place] = parts[place] + branch.scale * F.linear(low, branch.up.to(x.device, x.dtype))
            y = torch.cat(parts, -2)
        return y

    def extra_repr(self) -> str:
        """What stands in the printed model."""
        names = "".join(f", {b.name}:{b.rank}x{b.scale:g}" for b in self._branches)
        rank = 0 if self.down is None else self.down.shape[0]
        return f"{super().extra_repr()}, bits={self.bits}, rank={rank}{names}"
