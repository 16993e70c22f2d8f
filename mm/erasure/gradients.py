"""Runs of a pipeline through which gradients flow, and low-rank changes that are trained by them.

Design choices
- A pipeline's `__call__` is under `torch.no_grad`, which wraps it; `inspect.unwrap` gives the function itself. So the
  family's own code encodes prompts and calls its denoiser, and one piece of code serves every family.
- A prediction is what the denoiser gives at one sampling step. Steps before it run without gradients; text is encoded
  with them, so that layers that read text there can be trained.
- Trained changes are low-rank terms that hooks add at the layers; the model's own weights are never written.
- Large denoisers compute their blocks again for the gradient (`mm.layers.checkpointing`).

Legend: B prompts, T tokens, D inputs and N outputs of a layer, r rank.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mm.adapters.entry import Entry
from mm.core.errors import UserError
from mm.erasure.features import PLAIN
from mm.erasure.measure import seed_of
from mm.families.registry import is_denoiser
from mm.families.sources import plain_sources
from mm.layers.checkpointing import checkpointed
from mm.layers.surgery import roots_of


class _ReachedError(Exception):
    """Leaves a pipeline once what is wanted was computed."""


def denoiser_of(pipe: Any) -> nn.Module:
    """The module whose output is the prediction: the last denoiser that runs in a step.

    Raises:
        UserError: where the pipeline has none that a family names.
    """
    # mm-tiny's code head draws in codes; in a flow step the velocity decoder comes last.
    found = [m for m in roots_of(pipe).values() if is_denoiser(m) and type(m).__name__ != "CodeHead"]
    if not found:
        raise UserError(f"{type(pipe).__name__} has no denoiser that is known to mm, so nothing can be trained on it")
    return found[-1]


def run(pipe: Any, prompts: Sequence[str], *, seed: int = 0, steps: int = 1, guidance: float = 1.0) -> Any:
    """Calls a pipeline with gradients as they are set, without decoding."""
    call = inspect.unwrap(type(pipe).__call__)
    takes = inspect.signature(call).parameters
    generators = [torch.Generator().manual_seed(seed_of(seed, str(i))) for i in range(len(prompts))]
    given: dict[str, Any] = {
        "prompt": list(prompts), "num_inference_steps": steps, "output_type": "latent", "guidance_scale": guidance,
        "generator": generators, **PLAIN, **plain_sources(pipe, len(prompts)),
    }  # fmt: skip
    return call(pipe, **{key: value for key, value in given.items() if key in takes})


def predict(
    pipe: Any, prompts: Sequence[str], *, seed: int = 0, step: int = 0, steps: int = 4, grad: bool = False
) -> Tensor:
    """What the denoiser predicts for prompts at one sampling step, from noise that depends on the seed alone.

    Args:
        pipe: any pipeline with a known denoiser.
        prompts: one picture each; the noise of picture k is the same in every call.
        seed: of the noise.
        step: at which the prediction is taken, 0 for the first.
        steps: of the whole sampling.
        grad: whether gradients flow to the layers that read text and to the denoiser.

    Returns:
        The prediction, float32, one row a prompt.
    """
    denoiser, seen = denoiser_of(pipe), 0
    denoisers = [module for module in roots_of(pipe).values() if is_denoiser(module)]
    out: list[Tensor] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        torch.set_grad_enabled(grad and seen == step)

    def after(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        nonlocal seen
        if seen == step:
            out.append(_tensor(result))
            raise _ReachedError
        seen += 1

    handles = [
        denoiser.register_forward_pre_hook(before, with_kwargs=True),
        denoiser.register_forward_hook(after, with_kwargs=True),
    ]
    quiet = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        with torch.set_grad_enabled(grad), checkpointed(denoisers, None if grad else False):
            with contextlib.suppress(_ReachedError):
                run(pipe, prompts, seed=seed, steps=steps)
    finally:
        for handle in handles:
            handle.remove()
        pipe.set_progress_bar_config(**quiet)
    if not out:
        raise UserError(f"{type(denoiser).__name__} did not run at step {step} of {steps}")
    return out[0][-len(prompts) :].float()


def _tensor(result: Any) -> Tensor:
    first = result[0] if isinstance(result, tuple | list) else getattr(result, "sample", result)
    return torch.stack(list(first)) if isinstance(first, list | tuple) else first


def outputs(
    pipe: Any, layers: Mapping[str, nn.Module], prompts: Sequence[str], *, grad: bool, reads: bool = False
) -> dict[str, Tensor]:
    """What each layer gives for prompts, (B, T, N), from one sampling step; it ends as soon as all have run.

    With `reads` what each layer reads, (B, T, D).
    """
    seen: dict[str, Tensor] = {}

    def hook(path: str) -> Any:
        def after(module: nn.Module, args: Any, result: Any) -> None:
            seen.setdefault(path, args[0] if reads else _tensor(result))
            if len(seen) == len(layers):
                raise _ReachedError

        return after

    handles = [module.register_forward_hook(hook(path)) for path, module in layers.items()]
    quiet = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        with torch.set_grad_enabled(grad), contextlib.suppress(_ReachedError):
            run(pipe, prompts)
    finally:
        for handle in handles:
            handle.remove()
        pipe.set_progress_bar_config(**quiet)
    if missing := [path for path in layers if path not in seen]:
        raise UserError(f"{missing[0]} did not run; it cannot be trained or searched")
    return {path: seen[path][-len(prompts) :] for path in layers}  # with guidance, the prompts' rows come last


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """A low-rank term of one layer that is being trained."""

    down_rD: Tensor
    up_Nr: Tensor


class Dense:
    """Changes of whole weights at layers, trained by gradients where a mask allows it."""

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        self.layers = dict(layers)
        self.deltas = {
            path: torch.zeros(layer.out_features, layer.in_features, device=device_of(layer)).requires_grad_()
            for path, layer in layers.items()
        }
        self.masks: dict[str, Tensor] = {}

    @property
    def parameters(self) -> list[Tensor]:
        """All trained tensors."""
        return list(self.deltas.values())

    def keep_largest(self, grads: Sequence[Tensor], share: float) -> None:
        """From now on only the weights with the largest gradients, a share of all of them, are trained."""
        sizes = torch.cat([g.abs().flatten() for g in grads])
        least = sizes.kthvalue(max(1, int((1 - share) * sizes.numel()))).values
        self.masks = {path: (g.abs() > least).float() for path, g in zip(self.deltas, grads, strict=True)}

    def masked(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the trained weights, 0 elsewhere."""
        return [g * self.masks.get(path, 1.0) for path, g in zip(self.deltas, grads, strict=True)]

    def on(self) -> AbstractContextManager[None]:
        """The changes act while the context is open."""
        return _added(self.layers, lambda path, x: x @ self.deltas[path].T)

    def entries(self, strength: float = 1.0) -> dict[str, Entry]:
        """The changes as entries of a patch."""
        return {
            path: Entry(kind="dense", tensors={"delta": strength * delta.detach().cpu().clone()})
            for path, delta in self.deltas.items()
        }


@contextlib.contextmanager
def _added(layers: Mapping[str, nn.Linear], term: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """`term(path, input)` is added to each layer's output while the context is open."""

    def hook(path: str) -> Any:
        def after(module: nn.Module, args: Any, result: Tensor) -> Tensor:
            return result + term(path, args[0].float()).to(result.dtype)

        return after

    handles = [layer.register_forward_hook(hook(path)) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def device_of(layer: nn.Module) -> torch.device:
    """Where a layer's tensors are."""
    return next(itertools.chain(layer.parameters(), layer.buffers())).device


def gradients(loss: Tensor, change: LowRank | Dense) -> tuple[Tensor, ...]:
    """Gradients of a loss by what a change trains, 0 where the loss does not depend on it.

    The change acts meanwhile: blocks may be computed again.
    """
    with change.on():
        return torch.autograd.grad(loss, change.parameters, materialize_grads=True)


def descend(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """One step of an optimizer with given gradients."""
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    optimizer.step()


class LowRank:
    """Low-rank terms at layers, trained by gradients, and entries of a patch in the end."""

    def __init__(self, layers: Mapping[str, nn.Linear], rank: int, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.layers = dict(layers)
        self.terms: dict[str, Trained] = {}
        for path, layer in self.layers.items():
            # As a LoRA starts: down random, up zero, so that nothing changes at first.
            down = torch.randn(rank, layer.in_features, generator=g) / layer.in_features**0.5
            self.terms[path] = Trained(
                down_rD=down.to(device_of(layer)).requires_grad_(),
                up_Nr=torch.zeros(layer.out_features, rank, device=device_of(layer)).requires_grad_(),
            )

    @property
    def parameters(self) -> list[Tensor]:
        """All trained tensors."""
        return [t for term in self.terms.values() for t in (term.down_rD, term.up_Nr)]

    def on(self) -> AbstractContextManager[None]:
        """The terms act while the context is open."""
        return _added(self.layers, lambda path, x: x @ self.terms[path].down_rD.T @ self.terms[path].up_Nr.T)

    def entries(self, strength: float = 1.0) -> dict[str, Entry]:
        """The terms as entries of a patch."""
        return {
            path: Entry(kind="lowrank", tensors={
                "down": term.down_rD.detach().cpu().clone(), "up": strength * term.up_Nr.detach().cpu().clone()
            })
            for path, term in self.terms.items()
        }  # fmt: skip
