"""Muon for convolution kernels and matrices, and optimizer state in safetensors.

Design choices
- A convolution kernel is treated as the matrix (out, in * height * width). The update is orthogonalized by five
  Newton-Schulz iterations in bf16 and scaled so that its root mean square is Adam's usual 0.2: one learning rate serves
  both optimizers.
- Optimizer state goes through `flatten_state` / `restore_state`, so that no checkpoint holds a pickle.

Legend: B matrices, M rows, N columns.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Keller Jordan's quintic: steep at zero, and it maps singular values into about [0.7, 1.2].
_QUINTIC = (3.4445, -4.7750, 2.0315)
# Matrices that are inputs, outputs, tables or modulation; their names, and open_clip's for the same. AdamW trains them.
_NOT_HIDDEN = {
    *("words", "mode_tokens", "latent_in", "velocity_out", "modulation", "modulation_out", "place", "readout"),
    *("token_embedding", "positional_embedding", "proj", "text_projection"),
}


def orthogonalize(matrices_BMN: Tensor, iterations: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: every singular value is moved near 1."""
    a, b, c = _QUINTIC
    tall = matrices_BMN.shape[-2] > matrices_BMN.shape[-1]
    x = (matrices_BMN.mT if tall else matrices_BMN).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices_BMN.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalized; weight decay decoupled as in AdamW.

    Matrices of one shape are orthogonalized together: on two CPU cores many small products cost more than their sum.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Tensor]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    shapes.setdefault(tuple(param.flatten(1).shape), []).append(param)
            for params in shapes.values():
                self._update(params, group)

    def _update(self, params: list[Tensor], group: dict[str, float]) -> None:
        blended = []
        for param in params:
            assert param.grad is not None
            buffer = self.state[param].setdefault("momentum", torch.zeros_like(param))
            buffer.lerp_(param.grad, 1 - group["momentum"])
            blended.append(param.grad.lerp(buffer, group["momentum"]).flatten(1))
        updates_BMN = orthogonalize(torch.stack(blended))
        updates_BMN *= 0.2 * max(updates_BMN.shape[-2:]) ** 0.5
        for param, update in zip(params, updates_BMN, strict=True):
            param.mul_(1 - group["lr"] * group["weight_decay"])
            param.add_(update.view_as(param), alpha=-group["lr"])


def flatten_state(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """Tensors of an optimizer's state under the names prefix.index.key (learning rates belong to the schedule)."""
    state = optimizer.state_dict()["state"]
    return {
        f"{prefix}.{number}.{key}": torch.as_tensor(value).detach().clone().contiguous()
        for number, entry in state.items()
        for key, value in entry.items()
    }


def restore_state(optimizer: torch.optim.Optimizer, prefix: str, tensors: dict[str, Tensor]) -> None:
    """The reverse of `flatten_state`, for an optimizer over the same parameters in the same order.

    Raises:
        ValueError: where a tensor has another shape than its parameter.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        head, _, rest = name.partition(".")
        if head == prefix:
            number, _, key = rest.partition(".")
            state.setdefault(int(number), {})[key] = tensor
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entry in state.items():
        for key, tensor in entry.items():
            if tensor.shape == parameters[index].shape:
                # fused kernels pair elements by memory position: the state must have its parameter's strides
                entry[key] = torch.empty_like(parameters[index]).detach().copy_(tensor)
            elif tensor.ndim:
                shape = list(parameters[index].shape)
                raise ValueError(f"{prefix}.{index}.{key} has shape {list(tensor.shape)}, not {shape}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def muon_and_adamw(
    module: nn.Module, *, learning_rate: float, muon_rate: float | None, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices (none where `muon_rate` is None) and AdamW for all other trained parameters."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    hidden = [p for n, p in named if muon_rate is not None and _is_hidden_matrix(n, p)]
    chosen = {id(p) for p in hidden}
    rest = [p for _, p in named if id(p) not in chosen]
    out: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
    ]
    if hidden and muon_rate is not None:
        out.append(Muon(hidden, muon_rate, weight_decay=weight_decay))
    return out


def _is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    parts = name.split(".")
    return parameter.ndim == 2 and not any(part in _NOT_HIDDEN or part.endswith("_out") for part in parts)
