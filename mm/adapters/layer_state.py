"""What patches have changed at one layer: the layer's ordered list of entries, kept in the layer itself.

Design choices
- Low-rank entries are branches. Rows, dense and rotation entries, and fused low-rank ones, act in the weight: the
  original is kept once, and the weight is computed from it through all of them, in order, whenever something changes.
  Taking one out therefore gives, bit for bit, what the others alone would have given.
- A rotation turns the outputs of everything below it: the weight, and the `up` of branches that were put on earlier.
- The list is part of the layer (`deepcopy`, pickling and shared components carry it along); a patch holds no state.

Legend: N outputs, K inputs, r rank, n changed rows of an embedding, D its width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mm.adapters.biases import changed_bias, set_bias
from mm.adapters.placed import Placed
from mm.adapters.weights import folded, rotated, row_change, weight_change
from mm.layers import originals
from mm.layers.linear import Branch, BranchedLinear
from mm.layers.offloading import run_device, stored

_KEY = "_mm_adapters"


@dataclass(kw_only=True)
class _State:
    placed: list[Placed] = field(default_factory=list)
    converted: bool = False  # the layer was a plain nn.Linear
    dtype: torch.dtype | None = None  # of the layer when the entries were put there


def placed_on(module: nn.Module) -> tuple[Placed, ...]:
    """Entries on a layer, in order."""
    state = module.__dict__.get(_KEY)
    return () if state is None else tuple(state.placed)


def arrange(module: nn.Module, placed: Sequence[Placed]) -> None:
    """Makes these the layer's entries, in this order. Where it fails, the layer stays as it was.

    Args:
        module: a linear layer or an embedding that the entries fit.
        placed: all entries, those that stay among them.
    """
    before = placed_on(module)
    state = module.__dict__.setdefault(_KEY, _State())
    weight = weight_change(module, before, placed)
    try:
        _set_branches(module, state, before, placed)
    except BaseException:
        _tidy(module, state)
        raise
    if weight is not None:
        weight.write(module)
    set_bias(module, before, placed)
    state.placed, state.dtype = list(placed), _dtype(module)
    _tidy(module, state)


def _dtype(module: nn.Module) -> torch.dtype:
    quantized = isinstance(module, BranchedLinear) and module.bits != 16
    tensor = module._buffers["weight_scales"] if quantized else module._parameters["weight"]
    assert tensor is not None
    return tensor.dtype


def settle(module: nn.Module, name: str) -> None:
    """Makes what acts in weight and bias part of the layer's own; the other entries are computed from there."""
    mine = [p for p in placed_on(module) if p.name == name]
    others = [p for p in placed_on(module) if p.name != name]
    branches = [p for p in others if p.is_branch]
    arrange(module, [*mine, *branches])
    originals.forget(module)
    originals.forget_bias(module)
    module.__dict__[_KEY].placed = branches
    arrange(module, others)


def rescale(module: nn.Module, name: str, scale: float) -> None:
    """How strongly a patch's entries on a layer act from now on; a live branch is only given another number."""
    before = placed_on(module)
    after = [replace(p, scale=scale) if p.name == name else p for p in before]
    if any(p.name == name and not p.is_branch for p in before):
        arrange(module, after)
        return
    assert isinstance(module, BranchedLinear)
    for p in after:
        if p.name == name:
            module.set_scale(name, p.strength)
    module.__dict__[_KEY].placed = after


def _tidy(module: nn.Module, state: _State) -> None:
    """A layer without entries keeps nothing of them; one that was plain is plain again."""
    if state.converted and isinstance(module, BranchedLinear) and module.bits == 16 and not module.branches:
        module.to_linear()
        state.converted = False
    if not state.placed:
        module.__dict__.pop(_KEY, None)


# ---- branches --------------------------------------------------------------------------------------------------------


def _set_branches(module: nn.Module, state: _State, before: Sequence[Placed], after: Sequence[Placed]) -> None:
    wanted = [p for p in after if p.is_branch]
    if not isinstance(module, BranchedLinear):
        if not wanted:
            return
        assert isinstance(module, nn.Linear)
        module, state.converted = BranchedLinear.from_linear(module), True
    ours = {p.name for p in before if p.is_branch}
    there = {b.name: b for b in module.branches if b.name in ours}
    turned = any(p.entry.kind == "rotation" for p in (*before, *after))
    made = []
    for p in wanted:
        if p.name in there and not turned:
            made.append(replace(there[p.name], scale=p.strength))
        else:
            made.append(branch_of(module, p, after))
    if wanted or there:
        module.arrange([*made, *(b for b in module.branches if b.name not in ours)])


def branch_of(layer: BranchedLinear, placed: Placed, stack: Sequence[Placed]) -> Branch:
    """The branch of a low-rank entry, its outputs turned by the rotations above it in the layer's stack."""
    like = layer.weight_scales if layer.bits != 16 else layer.weight
    device = run_device(layer, "weight_scales" if layer.bits != 16 else "weight")
    up_Nr = placed.entry.tensors["up"]
    for above in stack[list(stack).index(placed) + 1 :]:
        if above.entry.kind == "rotation":
            up_Nr = rotated(up_Nr.to(device, torch.float32), above)
    with torch.inference_mode(False), torch.no_grad():
        return Branch(
            name=placed.name,
            down=placed.entry.tensors["down"].detach().to(device, like.dtype),
            up=up_Nr.detach().to(device, like.dtype),
            scale=placed.strength,
            origin=placed.method,
            scope=placed.entry.scope,
        )


def acts(module: nn.Module, placed: Placed) -> bool:
    """Whether a layer's tensors still are what its entries make of them; reads only."""
    if placed.in_bias:
        bias, original = stored(module, "bias"), originals.kept_bias(module)
        biases = [p for p in placed_on(module) if p.in_bias]
        return bias is not None and original is not None and _equal(module, bias, changed_bias(original, biases))
    if placed.in_weight:
        want, have = _expected_weight(module), _present_weight(module)
        return want is not None and _equal(module, have, want)
    found = [b for b in getattr(module, "branches", ()) if b.name == placed.name]
    if not found or not isinstance(module, BranchedLinear) or found[0].scale != placed.strength:
        return False
    made = branch_of(module, placed, placed_on(module))
    return _equal(module, found[0].down, made.down) and _equal(module, found[0].up, made.up)


def _equal(module: nn.Module, have: Tensor, want: Tensor) -> bool:
    """Bit for bit; where the layer has changed its type since, within that type's rounding."""
    want = want.to(have.device)
    if module.__dict__[_KEY].dtype == have.dtype == want.dtype:
        return torch.equal(have, want)
    return torch.allclose(have.float(), want.float(), rtol=2**-6, atol=2**-7 * float(want.abs().max()))


def _expected_weight(module: nn.Module) -> Tensor | None:
    """The weight (of an embedding the changed rows) that the layer's entries give; None where none acts in it."""
    placed = [p for p in placed_on(module) if p.in_weight]
    original = originals.kept(module)
    if not placed or original is None:
        return None
    with torch.no_grad():
        return row_change(module, placed).value if isinstance(module, nn.Embedding) else folded(original, placed)


def _present_weight(module: nn.Module) -> Tensor:
    """The weight, or the changed rows of an embedding, as the layer has it."""
    weight = stored(module, "weight")
    assert weight is not None
    return weight[originals.kept_ids(module).to(weight.device)] if isinstance(module, nn.Embedding) else weight


@contextmanager
def lifted(root: nn.Module) -> Iterator[None]:
    """Inside, the model's weights are those before patches; branches stay."""
    changed = [(m, placed_on(m)) for m in root.modules() if any(not p.is_branch for p in placed_on(m))]
    try:
        for module, placed in changed:
            arrange(module, [p for p in placed if p.is_branch])
        yield
    finally:
        for module, placed in changed:
            arrange(module, placed)
