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
from typing import Any

import torch
from torch import Tensor, nn

from mm.adapters.biases import changed_bias, set_bias
from mm.adapters.entry import Entry
from mm.layers import originals
from mm.layers.linear import Branch, BranchedLinear
from mm.layers.offloading import run_device, stored, write

_KEY = "_mm_adapters"


@dataclass(frozen=True, kw_only=True, eq=False)
class Placed:
    """One entry on a layer. `scale` is the patch's; `fused`: a low-rank entry acts in the weight. `base_matches`: None
    where the patch does not name its base."""

    name: str
    entry: Entry
    path: str
    scale: float = 1.0
    order: int = 0
    method: str = "lora"
    base_matches: bool | None = None
    fused: bool = False

    @property
    def in_weight(self) -> bool:
        """Whether it acts in the weight."""
        return not (self.is_branch or self.in_bias)

    @property
    def in_bias(self) -> bool:
        """Whether it acts in the bias."""
        return self.entry.kind == "bias"

    @property
    def is_branch(self) -> bool:
        """Whether it runs beside the weight."""
        return self.entry.kind == "lowrank" and not self.fused

    @property
    def strength(self) -> float:
        """Scale of the patch times that of the entry."""
        return self.scale * self.entry.scale

    def __deepcopy__(self, memo: dict[int, Any]) -> Placed:
        return self  # nothing in it ever changes


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
    weight = _weight_change(module, before, placed)
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
    """Makes an entry that acts in the weight part of the layer's own weight; the others are computed from there."""
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
            up_Nr = _rotated(up_Nr.to(device, torch.float32), above)
    with torch.inference_mode(False), torch.no_grad():
        return Branch(
            name=placed.name,
            down=placed.entry.tensors["down"].detach().to(device, like.dtype),
            up=up_Nr.detach().to(device, like.dtype),
            scale=placed.strength,
            origin=placed.method,
            scope=placed.entry.scope,
        )


# ---- weights ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class _Write:
    """A weight, or rows of an embedding, ready to be written, and what is kept as original from then on."""

    value: Tensor
    ids: Tensor | None = None
    original: Tensor | None = None
    original_ids: Tensor | None = None

    def write(self, module: nn.Module) -> None:
        if self.ids is None:
            write(module, "weight", self.value)
        else:
            weight = stored(module, "weight")
            assert weight is not None
            with torch.inference_mode(weight.is_inference()), torch.no_grad():
                weight[self.ids.to(weight.device)] = self.value.to(weight)
        if self.original is None:
            originals.forget(module)
        else:
            originals.keep(module, self.original, self.original_ids)


def _weight_change(module: nn.Module, before: Sequence[Placed], after: Sequence[Placed]) -> _Write | None:
    """What has to be written; None where the entries that act in the weight stay the same."""
    old, new = ([p for p in ps if p.in_weight] for ps in (before, after))
    if [(p.entry, p.scale) for p in old] == [(p.entry, p.scale) for p in new]:
        return None
    with torch.inference_mode(False), torch.no_grad():
        if isinstance(module, nn.Embedding):
            return _row_change(module, new)
        original = originals.kept(module)
        if original is None:
            weight = stored(module, "weight")
            assert weight is not None
            original = weight.detach().clone()
        return _Write(value=folded(original, new), original=original if new else None)


def folded(weight_NK: Tensor, placed: Sequence[Placed]) -> Tensor:
    """A weight through entries in order, in fp32 at least, rounded once at the end."""
    if not placed:
        return weight_NK
    wide = weight_NK.detach().to(torch.promote_types(weight_NK.dtype, torch.float32))
    for p in placed:
        tensors = {k: t.to(wide.device, wide.dtype) for k, t in p.entry.tensors.items()}
        if p.entry.kind == "rotation":
            wide = _rotated(wide, p)
        elif p.strength:  # at 0 even an infinite change is none
            change = tensors["delta"] if p.entry.kind == "dense" else tensors["up"] @ tensors["down"]
            wide = wide + p.strength * change
    return wide.to(weight_NK.dtype)


def _rotated(rows: Tensor, placed: Placed) -> Tensor:
    """R rows where the scale is 1, rows where it is 0, and in between (or beyond) the straight line through both."""
    if not placed.strength:
        return rows
    turned = placed.entry.tensors["rotation"].to(rows) @ rows
    return turned if placed.strength == 1.0 else rows + placed.strength * (turned - rows)


def _row_change(module: nn.Embedding, placed: Sequence[Placed]) -> _Write:
    weight = stored(module, "weight")
    assert weight is not None
    old_ids = originals.kept_ids(module).cpu()
    new_ids = torch.cat([p.entry.tensors["ids"].cpu().long() for p in placed]).unique() if placed else old_ids[:0]
    ids = torch.cat([old_ids, new_ids]).unique()
    original_nD = weight.detach()[ids.to(weight.device)].clone()
    kept = originals.kept(module)
    if kept is not None:
        original_nD[torch.searchsorted(ids, old_ids)] = kept.to(original_nD)
    value_nD = original_nD.clone()
    for p in placed:
        spots = torch.searchsorted(ids, p.entry.tensors["ids"].cpu().long())
        rows = p.entry.tensors["rows"].to(value_nD)
        value_nD[spots] = rows if p.strength == 1.0 else value_nD[spots].lerp(rows, p.strength)
    stay = torch.searchsorted(ids, new_ids)
    return _Write(
        value=value_nD, ids=ids, original=original_nD[stay] if placed else None, original_ids=new_ids.to(weight.device)
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
        return _row_change(module, placed).value if isinstance(module, nn.Embedding) else folded(original, placed)


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
