"""What is trained: branches on linear layers; rows of embeddings are in `mm.customization.rows`.

Design choices
- Trained values are float32 tensors beside the model, which stays as it is, 16-bit or 4-bit: a branch runs in plain
  torch while gradients are wanted, and then the base's weight is dequantized for the product.
- `off` gives the frozen base for one call, and `remove` puts everything back bit for bit.

Legend: r rank, K inputs, N outputs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mm.adapters.entry import Entry
from mm.core.errors import UserError
from mm.customization.objectives.protocol import Objective
from mm.layers.linear import Branch, BranchedLinear
from mm.layers.surgery import branched, roots_of, submodule

TRAINING = "customize: in training"


class Piece(Protocol):
    """Trained values of one kind."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """By name; names say where they belong."""
        ...

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within the context the model is the base."""
        ...

    def settle(self) -> None:
        """Lets the model draw with the values as they are now."""
        ...

    def entries(self) -> dict[str, Entry]:
        """The values as entries of a patch."""
        ...

    def remove(self) -> None:
        """Takes everything off the model."""
        ...


@contextmanager
def frozen(pipe: Any) -> Iterator[None]:
    """Within the context no parameter of the model asks for gradients."""
    wanted = [p for root in roots_of(pipe).values() for p in root.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def layer_seed(path: str, seed: int) -> torch.Generator:
    """A generator that depends on the layer's path and the seed alone."""
    digest = hashlib.blake2s(f"{seed} {path}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


class Branches:
    """A branch on each of some layers, W + scale * up @ down (LoRA, Hu et al. 2021, arXiv 2106.09685).

    Args:
        objective: its pipeline has the layers.
        paths: of the layers.
        rank: r, at most the layer's inputs.
        seed: of the starting values.
        downs: starting values (r, K) of `down` by path; None draws them.
        frozen_down: only `up` is trained.
        ups: values (N, r) of `up` by path, which are not trained; `down` starts at zero there, and is.
        origin: the method's name, kept on the branches.
    """

    def __init__(
        self, objective: Objective, paths: Sequence[str], *, rank: int, seed: int, alpha: float | None = None,
        downs: Mapping[str, Tensor] | None = None, frozen_down: bool = False,
        ups: Mapping[str, Tensor] | None = None, origin: str = "lora",
    ) -> None:  # fmt: skip
        self.scale = 1.0 if alpha is None else alpha / rank
        self._acting = 1.0  # as a multiple of it
        self.layers: dict[str, BranchedLinear] = {}
        self.down: dict[str, nn.Parameter] = {}
        self.up: dict[str, nn.Parameter] = {}
        self._plain: set[str] = set()
        self.objective, self.origin = objective, origin
        try:
            for path in paths:
                layer = self._branched(path)
                fixed = None if ups is None else ups.get(path)
                if fixed is not None:
                    down = torch.zeros(fixed.shape[1], layer.in_features)
                elif downs is not None:
                    down = downs[path].clone()
                else:
                    down = torch.empty(min(rank, layer.in_features), layer.in_features)
                    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=layer_seed(path, seed))
                self._attach(path, down, fixed, train_down=fixed is not None or not frozen_down)
        except BaseException:
            self.remove()
            raise

    def _branched(self, path: str) -> BranchedLinear:
        component, _, below = path.partition(".")
        root = roots_of(self.objective.pipe)[component]
        if not isinstance(submodule(root, below), BranchedLinear):
            self._plain.add(path)
        self.layers[path] = branched(root, below)
        return self.layers[path]

    def _attach(self, path: str, down: Tensor, fixed_up: Tensor | None, *, train_down: bool) -> None:
        layer, device = self.layers[path], self.objective.device
        up = torch.zeros(layer.out_features, len(down)) if fixed_up is None else fixed_up.clone()
        self.down[path] = nn.Parameter(down.to(device), requires_grad=train_down)
        self.up[path] = nn.Parameter(up.to(device), requires_grad=fixed_up is None)
        made = Branch(name=TRAINING, down=self.down[path], up=self.up[path], scale=self.scale, origin=self.origin)
        layer.attach(made)

    def parameters(self) -> dict[str, nn.Parameter]:
        both = {f"{path}|up": up for path, up in self.up.items()}
        both |= {f"{path}|down": down for path, down in self.down.items()}
        return {name: value for name, value in both.items() if value.requires_grad}

    @contextmanager
    def off(self) -> Iterator[None]:
        kept = {path: layer.branches for path, layer in self.layers.items()}
        for layer in self.layers.values():
            layer.arrange([b for b in layer.branches if b.name != TRAINING])
        try:
            yield
        finally:
            for path, layer in self.layers.items():
                layer.arrange(kept[path])

    @contextmanager
    def at(self, scale: float) -> Iterator[None]:
        """Within the context the branches act `scale` times; where they are off, they stay off."""
        before, self._acting = self._acting, scale
        for layer in self.layers.values():
            self._rescale(layer, scale)
        try:
            yield
        finally:
            self._acting = before
            for layer in self.layers.values():
                self._rescale(layer, before)

    def _rescale(self, layer: BranchedLinear, scale: float) -> None:
        if any(b.name == TRAINING for b in layer.branches):
            layer.set_scale(TRAINING, scale * self.scale)

    def settle(self) -> None:
        for layer in self.layers.values():
            layer.refresh()

    def entries(self) -> dict[str, Entry]:
        return {
            path: Entry(
                kind="lowrank", scale=self.scale,
                tensors={
                    "down": self.down[path].detach().cpu().to(torch.float16).clone(),
                    "up": self.up[path].detach().cpu().to(torch.float16).clone(),
                },
            )
            for path in self.layers
        }  # fmt: skip

    def remove(self) -> None:
        for path, layer in self.layers.items():
            if any(b.name == TRAINING for b in layer.branches):
                layer.detach(TRAINING)
            if path in self._plain and layer.bits == 16 and not layer.branches:
                layer.to_linear()


class FullWeights(Branches):
    """Changes of whole weights: a branch whose `down` is the identity, and stays it.

    Its entries are dense, so that they go onto 16-bit layers.
    """

    def __init__(self, objective: Objective, paths: Sequence[str], *, seed: int, origin: str) -> None:
        roots = roots_of(objective.pipe)
        widths = {path: branched_width(roots, path) for path in paths}
        downs = {path: torch.eye(width) for path, width in widths.items()}
        super().__init__(
            objective, paths, rank=max(widths.values()), seed=seed, downs=downs, frozen_down=True, origin=origin
        )

    def entries(self) -> dict[str, Entry]:
        return {
            path: Entry(kind="dense", tensors={"delta": up.detach().cpu().to(torch.float16).clone()})
            for path, up in self.up.items()
        }


def check_whole(roots: Mapping[str, nn.Module], paths: Sequence[str], instead: str) -> None:
    """Raises UserError where a layer takes no change of its whole weight; `instead` says what to give."""
    for path in paths:
        component, _, below = path.partition(".")
        layer = submodule(roots[component], below)
        if isinstance(layer, BranchedLinear) and layer.bits != 16:
            raise UserError(f"{path} has {layer.bits}-bit weights, which whole changes do not go onto; give {instead}")


def branched_width(roots: Mapping[str, nn.Module], path: str) -> int:
    """Inputs of the layer at a path."""
    component, _, below = path.partition(".")
    layer = submodule(roots[component], below)
    if not isinstance(layer, nn.Linear):
        raise UserError(f"{path} is no linear layer")
    return layer.in_features


def halved(entry: Entry) -> Entry:
    """An entry whose floats take two bytes."""
    made = {k: v.to(torch.float16) if v.is_floating_point() else v for k, v in entry.tensors.items()}
    return replace(entry, tensors=made)
