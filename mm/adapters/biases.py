"""What patches have changed at a layer's bias: the original is kept once, and the bias is computed from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mm.adapters.placed import Placed
from mm.layers import originals
from mm.layers.offloading import stored, write


def set_bias(module: nn.Module, before: Sequence[Placed], after: Sequence[Placed]) -> None:
    """Writes the bias that a layer's entries give, in order; without any it is the original, bit for bit.

    Args:
        module: the layer.
        before: the entries that it has.
        after: those that it is to have.
    """
    old, new = ([p for p in placed if p.in_bias] for placed in (before, after))
    if [(p.entry, p.scale) for p in old] == [(p.entry, p.scale) for p in new]:
        return
    original = originals.kept_bias(module)
    if original is None:
        bias = stored(module, "bias")
        assert bias is not None
        with torch.inference_mode(False), torch.no_grad():
            original = bias.detach().clone()
    write(module, "bias", changed_bias(original, new))
    if new:
        originals.keep_bias(module, original)
    else:
        originals.forget_bias(module)


def changed_bias(bias_N: Tensor, placed: Sequence[Placed]) -> Tensor:
    """A bias through entries, in fp32 at least, rounded once at the end."""
    with torch.inference_mode(False), torch.no_grad():
        wide = bias_N.detach().to(torch.promote_types(bias_N.dtype, torch.float32))
        for p in placed:
            if p.strength:
                wide = wide + p.strength * p.entry.tensors["delta"].to(wide)
        return wide.to(bias_N.dtype)
