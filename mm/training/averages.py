"""The exponential moving average of a module's weights.

Design choices
- Not diffusers' `EMAModel`: that averages a list of parameters without names. A stage that gains a part (a code head)
  resumes here by name, the judge's batch norms need their statistics averaged with the weights, and the first steps are
  averaged with decay (1 + step) / (10 + step) from step 0 on instead of copied.
- Averaged are parameters and the statistics of batch norms. Other buffers stay the module's own: tables are constant,
  and a VQ codebook is an average already.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def _averaged(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    for prefix, part in module.named_modules():
        if isinstance(part, _BatchNorm):
            buffers = part.named_buffers(prefix, recurse=False)
            yield from ((name, tensor) for name, tensor in buffers if tensor.is_floating_point())


class WeightAverage:
    """Averaged copies of a module's tensors, by name.

    Attributes:
        tensors: The averaged tensors, or the trained ones while they are swapped in.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in _averaged(module)}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the module's tensors after training step `step` (from 0)."""
        keep = min(self.decay, (1 + step) / (10 + step))
        names, now = zip(*_averaged(self.module), strict=True)
        torch._foreach_lerp_([self.tensors[n] for n in names], [t.detach() for t in now], 1 - keep)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the averaged tensors and the module's."""
        for name, tensor in _averaged(self.module):
            mine = self.tensors[name]
            kept = tensor.detach().clone()
            tensor.copy_(mine)
            mine.copy_(kept)

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes saved averages; parts that are not among them keep their fresh weights.

        Raises:
            ValueError: where one has another shape.
        """
        for name, tensor in self.tensors.items():
            if name in tensors:
                if tensors[name].shape != tensor.shape:  # copying would repeat values
                    raise ValueError(f"the average of {name} is {list(tensors[name].shape)}, not {list(tensor.shape)}")
                tensor.copy_(tensors[name])
