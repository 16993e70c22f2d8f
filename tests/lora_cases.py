"""Tensors of a LoRA file, and comparing a model with its twin."""

from __future__ import annotations

import torch
from lora_families import noise, run

import mm

DATA_FREE = mm.SVDQuantConfig(rank=4, data_free=True)


TO_Q = "transformer_blocks.0.attn.to_q"


TO_K = "transformer_blocks.0.attn.to_k"


def pair(stem: str, outputs: int = 32, inputs: int = 32, seed: int = 1) -> dict[str, torch.Tensor]:
    made = {"lora_A": noise(2, inputs, seed=seed), "lora_B": noise(outputs, 2, seed=seed + 1)}
    return {f"{stem}.{k}.weight": t for k, t in made.items()}


def product(tensors: dict[str, torch.Tensor], stem: str) -> torch.Tensor:
    return tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]


def same(model, twin, family="FLUX", **bounds):
    torch.testing.assert_close(run(family, model), run(family, twin), **({"atol": 1e-4, "rtol": 1e-4} | bounds))
