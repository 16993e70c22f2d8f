"""AdaLoRA: LoRA as P diag(E) Q, whose directions of least importance are taken away until an average rank is left.

Source: Zhang et al. 2023, arXiv 2303.10512. Layers, importance and allocation are peft's.

Design choices
- All components share one budget of directions. They begin with half as many again; the budget falls until half of the
  run, so that what is left is trained together.
- Rows of Q and columns of P begin orthonormal, as the loss that keeps them apart wants them; E begins at zero.
- The importance's running means belong to the state of a run, so that one that was stopped ends in the same file.
- What is left is a product, exactly: it loads as any LoRA does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mm.adapters.entry import Entry
from mm.core.errors import UserError
from mm.customization.methods.protocol import Job, Learner, with_word
from mm.customization.methods.through_peft import ADAPTER, PeftAdapters
from mm.customization.pieces import layer_seed

_MEANS = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class _Adapters(PeftAdapters):
    """peft's AdaLoRA layers, and who allocates their directions."""

    def __init__(self, job: Job) -> None:
        from peft.tuners.adalora.layer import RankAllocator

        super().__init__(job, "adalora")
        for path in self.paths:
            layer = self._layer(path)
            for half, value in (("Q", layer.lora_A[ADAPTER]), ("P", layer.lora_B[ADAPTER])):
                start = torch.randn(value.shape, generator=layer_seed(f"{path} {half}", job.seed))
                value.data.copy_(orthonormal(start))
        self.model = nn.ModuleDict({name: self.roots[name] for name in self.components})
        config = vars(self.roots[self.components[0]])["peft_config"][ADAPTER]
        self.allocator = RankAllocator(self.model, config, ADAPTER)

    @torch.no_grad()
    def entries(self) -> dict[str, Entry]:
        out = {}
        for path in self.paths:
            layer = self._layer(path)
            sizes_r1, down, up = layer.lora_E[ADAPTER], layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            left = sizes_r1.flatten().nonzero().flatten()
            left = left if len(left) else torch.zeros(1, dtype=torch.int64, device=left.device)
            tensors = {"down": (sizes_r1 * down)[left].cpu().half(), "up": up[:, left].cpu().half().contiguous()}
            scale = float(layer.scaling[ADAPTER]) / (float(layer.ranknum[ADAPTER]) + 1e-5)
            out[path] = Entry(kind="lowrank", tensors=tensors, scale=scale)
        return out

    def unorthogonal(self) -> Tensor:
        """How far rows of Q and columns of P are from orthonormal, a mean over all of them."""
        found = []
        for path in self.paths:
            layer = self._layer(path)
            for rows in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER].T):
                found.append((rows @ rows.T - torch.eye(len(rows), device=rows.device)).norm())
        return torch.stack(found).mean()


def orthonormal(start: Tensor) -> Tensor:
    """A matrix with orthonormal rows, or columns where these are fewer."""
    left, _, right = torch.linalg.svd(start, full_matrices=False)
    return left @ right


@dataclass(kw_only=True)
class _Learner(Learner):
    @property
    def adapters(self) -> _Adapters:
        found = self.pieces[0]
        assert isinstance(found, _Adapters)
        return found

    def extra_loss(self) -> Tensor | None:
        return float(self.job.settings["orthogonal"]) * self.adapters.unorthogonal()

    def after_step(self, number: int) -> None:
        for value in self.adapters.parameters().values():
            if value.grad is None:  # a layer whose output nothing reads, such as the text stream of the last block
                value.grad = torch.zeros_like(value)
        self.adapters.allocator.update_and_allocate(self.adapters.model, number)

    def kept(self) -> dict[str, Tensor]:
        allocator = self.adapters.allocator
        return {f"{kind}|{name}": t for kind in _MEANS for name, t in getattr(allocator, kind).items()}

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        parameters = dict(self.adapters.model.named_parameters())
        for key, tensor in kept.items():
            kind, _, name = key.partition("|")
            if tensor.shape != parameters[name].shape:
                raise ValueError(f"{key} has shape {list(tensor.shape)}, not {list(parameters[name].shape)}")
            getattr(self.adapters.allocator, kind)[name] = tensor.to(parameters[name].device)


class AdaLora:
    """LoRA of `rank` on average; `orthogonal` is the weight of the loss that keeps directions apart."""

    name = "adalora"
    defaults: Mapping[str, Any] = {"layers": "all", "rank": 8, "orthogonal": 0.1}

    def begin(self, job: Job) -> Learner:
        """The layers, and the name's row where the vocabulary is closed."""
        if not 0 <= job.settings["orthogonal"] < float("inf"):
            raise UserError(f"orthogonal is {job.settings['orthogonal']}; give 0 or more")
        timed = replace(job, settings={**job.settings, "steps": job.steps})
        return _Learner(job=job, pieces=with_word(job, lambda: _Adapters(timed)))
