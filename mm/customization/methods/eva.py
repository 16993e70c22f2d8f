"""EVA: LoRA that starts in the directions in which a layer's inputs vary most, with ranks given by that variance.

Source: Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation",
arXiv 2410.07170. The incremental decomposition and the ranks are peft's.

Design choices
- The inputs are those of the pictures to learn from, at noise levels spread evenly, under their captions.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mm.core.errors import UserError
from mm.customization.batches import encode
from mm.customization.methods.protocol import Job, Learner, sites_of, with_word
from mm.customization.objectives.protocol import Objective
from mm.customization.pieces import Branches
from mm.layers.surgery import roots_of

_LEVELS = 8


class Eva:
    """LoRA of `rank` on average and at most `rho` times that; `tau` is when a direction counts as found."""

    name = "eva"
    defaults: Mapping[str, Any] = {"rank": 8, "layers": "all", "rho": 2.0, "tau": 0.99}

    def begin(self, job: Job) -> Learner:
        """Branches on the layers that were given a rank, and the name's row where the vocabulary is closed."""

        def branches() -> Branches:
            downs = directions(job)  # with the word on the model, since captions are read
            rank = max(len(down) for down in downs.values())
            return Branches(job.objective, list(downs), rank=rank, seed=job.seed, downs=downs, origin=self.name)

        return Learner(job=job, pieces=with_word(job, branches))


@torch.no_grad()
def directions(job: Job) -> dict[str, Tensor]:
    """Rows (r, K) by path; layers that were given no rank are left out."""
    from peft import EvaConfig, LoraConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    s, objective, found = job.settings, job.objective, {}
    if s["rho"] < 1 or not 0 < s["tau"] <= 1:
        raise UserError(f"rho is {s['rho']} and tau {s['tau']}; give rho of 1 or more, and tau above 0 and at most 1")
    paths = [site.path for site in sites_of(objective, s["layers"])]
    batches = _batches(job)
    for part, root in objective.modules().items():
        mine = [path.partition(".")[2] for path in paths if path.startswith(f"{part}.")]
        if not mine:
            continue
        config = LoraConfig(
            r=s["rank"], target_modules=mine, init_lora_weights="eva", eva_config=EvaConfig(rho=s["rho"], tau=s["tau"])
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "input of type .* could not be moved")  # captions need no device
            made = get_eva_state_dict(
                roots_of(objective.pipe).get(part, root), batches, peft_config=config,
                forward_fn=lambda _, batch: _predicted(objective, batch),
                prepare_model_inputs_fn=None, prepare_layer_inputs_fn=_inputs, show_progress_bar=False,
            )  # fmt: skip
        for below, rows in made.items():
            if len(rows):
                found[f"{part}.{below}"] = rows.float().cpu()
    if not found:
        raise UserError("the layers' inputs do not vary; give more pictures")
    return {path: found[path] for path in paths if path in found}


def _inputs(given: Any, _batch: Any, _layer: str) -> Tensor:
    """A layer's inputs as rows. peft's own function takes no inputs that are views of another layout."""
    inputs: Tensor = given[0] if isinstance(given, tuple | list) else given
    return inputs.reshape(-1, inputs.shape[-1]).contiguous()


def _predicted(objective: Objective, batch: Mapping[str, Any]) -> Tensor:
    """The prompts are encoded here, since layers that read text may belong to the component."""
    condition = objective.encode_prompts(batch["captions"])
    return objective.predict(batch["latents"], batch["level"], condition)


class _Batch(dict[str, Any]):
    """What peft hands from the loader to the forward pass; copies share their tensors."""

    def __deepcopy__(self, memo: Any) -> _Batch:
        return self


def _batches(job: Job) -> list[_Batch]:
    objective = job.objective
    latents, _ = encode(objective, job.examples)
    made = []
    for number, level in enumerate(objective.fixed_levels(_LEVELS)):
        chosen = [(number + k) % len(latents) for k in range(min(4, len(latents)))]
        clean = latents[chosen].to(objective.device)
        generator = torch.Generator().manual_seed(job.seed + number)
        noise = torch.randn(clean.shape, generator=generator).to(objective.device)
        level_B = level.expand(len(chosen)).to(objective.device)
        captions = [job.examples[i].caption for i in chosen]
        made.append(_Batch(latents=objective.noised(clean, noise, level_B), level=level_B, captions=captions))
    return made
