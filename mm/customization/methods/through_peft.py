"""LoRA, DoRA, OFT, LoKr, LoHa and SHiRA through peft, whose tuners wrap the denoiser's layers while they are trained.

Sources: Hu et al. 2021 (arXiv 2106.09685), Liu et al. 2024 (2402.09353, DoRA), Qiu et al. 2023 (2306.07280, OFT), Yeh
et al. 2023 (2309.14859, LyCORIS' LoKr and LoHa), Bhardwaj et al. 2024 (2406.13175, SHiRA).

Design choices
- LoRA becomes products. The others change whole weights, in their own factors, and go onto 16-bit layers as they are.

Legend: N outputs, K inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mm.adapters.entry import Entry
from mm.core.errors import UserError
from mm.customization.methods.peft_factors import ADAPTER, FACTORS
from mm.customization.methods.protocol import Job, Learner, sites_of, with_word
from mm.customization.pieces import check_whole
from mm.layers.linear import BranchedLinear
from mm.layers.surgery import branched, roots_of, submodule, swap

_PRODUCTS = ("lora", "adalora")  # the others change whole weights


class PeftAdapters:
    """A tuner of peft on some layers of the denoiser's components."""

    def __init__(self, job: Job, kind: str) -> None:
        self.kind = kind
        self.roots = roots_of(job.objective.pipe)
        self.paths = [site.path for site in sites_of(job.objective, job.settings["layers"])]
        self.components = list(dict.fromkeys(path.partition(".")[0] for path in self.paths))
        self._flags = [(p, p.requires_grad) for name in self.components for p in self.roots[name].parameters()]
        self._plain: dict[str, bool] = {}
        if kind not in _PRODUCTS:
            check_whole(self.roots, self.paths, "a method of products (dreambooth, lora), or learn on the 16-bit model")
        if kind == "shira":
            _check_sparse(self.roots, self.paths, job.settings["rank"])
            if not torch.sparse.check_sparse_tensor_invariants.is_enabled():
                torch.sparse.check_sparse_tensor_invariants.disable()  # torch warns where it is neither on nor off
        try:
            self._wrap(job)
        except BaseException:
            self.remove()
            raise

    def _wrap(self, job: Job) -> None:
        from peft import inject_adapter_in_model

        for path in self.paths:
            component, _, below = path.partition(".")
            self._plain[path] = not isinstance(submodule(self.roots[component], below), BranchedLinear)
            branched(self.roots[component], below)
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(job.seed)
            for name in self.components:
                mine = [path.partition(".")[2] for path in self.paths if path.startswith(f"{name}.")]
                inject_adapter_in_model(config_of(self.kind, job.settings, mine, job.seed), self.roots[name], ADAPTER)
        for parameter in self.parameters().values():
            parameter.data = parameter.data.float()

    def _layer(self, path: str) -> Any:
        component, _, below = path.partition(".")
        return self.roots[component].get_submodule(below)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{path}": parameter
            for name in self.components
            for path, parameter in self.roots[name].named_parameters()
            if parameter.requires_grad
        }

    @contextmanager
    def off(self) -> Iterator[None]:
        for path in self.paths:
            self._layer(path)._disable_adapters = True
        try:
            yield
        finally:
            for path in self.paths:
                self._layer(path)._disable_adapters = False

    def settle(self) -> None:
        """peft's layers draw with the values as they are."""

    @torch.no_grad()
    def entries(self) -> dict[str, Entry]:
        out = {}
        for path in self.paths:
            layer = self._layer(path)
            if self.kind in _PRODUCTS:
                down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
                tensors = {"down": down.cpu().half().clone(), "up": up.cpu().half().clone()}
                out[path] = Entry(kind="lowrank", tensors=tensors, scale=float(layer.scaling[ADAPTER]))
            else:
                out[path] = FACTORS[self.kind](layer)
        return out

    def remove(self) -> None:
        for path in self.paths:
            component, _, below = path.partition(".")
            layer = self._layer(path)
            base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
            swap(self.roots[component], below, base)
            if self._plain.get(path) and isinstance(base, BranchedLinear) and base.bits == 16 and not base.branches:
                base.to_linear()
        for parameter, wanted in self._flags:
            parameter.requires_grad_(wanted)
        for name in self.components:
            self.roots[name].__dict__.pop("peft_config", None)


def _check_sparse(roots: Mapping[str, nn.Module], paths: list[str], rank: int) -> None:
    """Raises UserError where SHiRA would take more values of a weight than it has."""
    for path in paths:
        component, _, below = path.partition(".")
        layer = submodule(roots[component], below)
        assert isinstance(layer, nn.Linear)
        outputs, inputs = layer.out_features, layer.in_features
        if rank * (outputs + inputs) > outputs * inputs:
            raise UserError(
                f"rank is {rank}, and shira takes rank x ({outputs} + {inputs}) values of the {outputs} x {inputs} of "
                f"{path}; give at most {outputs * inputs // (outputs + inputs)}"
            )


def config_of(kind: str, settings: Mapping[str, Any], paths: list[str], seed: int) -> Any:
    """peft's config of a tuner."""
    import peft

    rank = settings.get("rank", 0)
    common: dict[str, Any] = {"target_modules": paths}
    if kind in ("lora", "dora"):
        return peft.LoraConfig(r=rank, lora_alpha=rank, use_dora=kind == "dora", **common)
    if kind == "adalora":
        steps = settings["steps"]
        return peft.AdaLoraConfig(
            target_r=rank, init_r=rank + (rank + 1) // 2, lora_alpha=rank + (rank + 1) // 2, total_step=steps,
            tinit=steps // 10, tfinal=steps // 2, deltaT=max(1, steps // 50), **common,
        )  # fmt: skip
    if kind == "oft":
        return peft.OFTConfig(oft_block_size=settings["block"], r=0, use_cayley_neumann=False, **common)
    if kind == "lokr":
        return peft.LoKrConfig(r=rank, alpha=rank, decompose_factor=settings["factor"], **common)
    if kind == "loha":
        return peft.LoHaConfig(r=rank, alpha=rank, **common)
    return peft.ShiraConfig(r=rank, random_seed=seed, **common)


class ThroughPeft:
    """A tuner of peft, and the name's row where the vocabulary is closed."""

    def __init__(self, kind: str, **defaults: Any) -> None:
        self.name = kind
        self.defaults: Mapping[str, Any] = {"layers": "all", **defaults}

    def begin(self, job: Job) -> Learner:
        """The tuner on the layers."""
        return Learner(job=job, pieces=with_word(job, lambda: PeftAdapters(job, self.name)))


def lora() -> ThroughPeft:
    """LoRA as peft makes it."""
    return ThroughPeft("lora", rank=8)


def dora() -> ThroughPeft:
    """DoRA."""
    return ThroughPeft("dora", rank=8)


def oft() -> ThroughPeft:
    """OFT in blocks, which take the place of a rank."""
    return ThroughPeft("oft", block=16)


def lokr() -> ThroughPeft:
    """LoKr."""
    return ThroughPeft("lokr", rank=8, factor=8)


def loha() -> ThroughPeft:
    """LoHa."""
    return ThroughPeft("loha", rank=8)


def shira() -> ThroughPeft:
    """SHiRA."""
    return ThroughPeft("shira", rank=8)
