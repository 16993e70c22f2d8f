"""`BranchedLinear`: one linear layer as a sum, y = x W^T + b + sum_i s_i (x down_i^T) up_i^T.

Design choices
- W is 16-bit, or 4- or 8-bit in groups of 64 with scales (`quantize_`). The other terms are branches: thin, ordered,
  named, each with a live scale and an origin. SVDQuant's branch belongs to the base and is saved with it; LoRA and
  erasure branches come from patches and are not.
- Branches are laid side by side when they are attached, padded to a multiple of 16, so that all of them cost one `down`
  and one `up` in one op (`mm.kernels.branched_linear`). Their scales are one tensor: a slider recompiles nothing.
- It is an `nn.Linear`, so that adapters of other libraries, which search for that, wrap it. Without a 16-bit weight,
  `.weight` is computed: the base's meaning, smoothing undone, SVD branch included. Writing to it raises.
- A plain layer becomes one in place, by its class: references, hooks, compiled graphs and offloading stay with it.
- `state_dict` of a quantized layer is the checkpoint format: qweight, weight_scales, smooth, down, up, bias.
- Where a gradient is wanted, the same sum runs in plain torch: the ops are forward only.

Legend: M tokens, N outputs, K inputs, C = K up to whole groups of 64, G = C / 64, R ranks of all branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.core.errors import UserError
from mm.core.nouns import with_article
from mm.kernels import branched_linear
from mm.layers.base_linear import ActivationRule as ActivationRule
from mm.layers.base_linear import QuantizableLinear
from mm.layers.branch import Branch as Branch
from mm.layers.branch import Scope as Scope
from mm.layers.branch import join
from mm.layers.branch import token_split as token_split
from mm.layers.offloading import foreign_forward, rebind, run_device

_JOINED = ("_down", "_up", "_scales")


class BranchedLinear(QuantizableLinear):
    """A linear layer with branches over a 16-bit or quantized base."""

    def _extras(self) -> None:
        super()._extras()
        for name in _JOINED:
            self.register_buffer(name, None)  # saved no longer once they hold something, see `_join`
        self._branches: list[Branch] = []
        self._places: dict[str, slice] = {}

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> BranchedLinear:
        """Makes a layer one that can hold branches, in place: it is the same object afterwards, with the same tensors.

        Args:
            linear: torch's own `nn.Linear`, or a `BranchedLinear`, which stays as it is.

        Raises:
            UserError: for other subclasses, and where the forward of this one layer was replaced.
        """
        if isinstance(linear, BranchedLinear):
            return linear
        if type(linear) is not nn.Linear:
            raise UserError(
                f"{with_article(type(linear).__name__)} ({type(linear).__module__}) is not torch's own nn.Linear"
            )
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
        for name in ("smooth", "down", "up", *_JOINED):
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)
        for name in ("activation", "_branches", "_places"):
            self.__dict__.pop(name, None)
        made = cast(nn.Linear, self)
        cast(Any, made).__class__ = nn.Linear
        rebind(made, BranchedLinear.forward, nn.Linear.forward)
        return made

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
        self._non_persistent_buffers_set -= set(_JOINED)
        if made.down is not None:
            self._non_persistent_buffers_set |= set(_JOINED)

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
