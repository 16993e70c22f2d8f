"""LoRAs of the trunk for tests of diffusers' calls, and how near pictures must be."""

from __future__ import annotations

import torch
from peft import LoraConfig
from tiny import seeded

from mm import TextToImagePipeline

NEAR = {"atol": 1e-4, "rtol": 1e-4}
CONFIG = LoraConfig(r=2, lora_alpha=2, target_modules=["to_k_pic", "to_v_pic"], init_lora_weights=False)


def lora_of(pipe: TextToImagePipeline, seed: int) -> dict[str, torch.Tensor]:
    """A LoRA on what picture tokens read of the text."""
    generator, tensors = seeded(seed)[0], {}
    for name, module in pipe.trunk.named_modules():
        if name.endswith(("to_k_pic", "to_v_pic")):
            tensors[f"trunk.{name}.lora_A.weight"] = torch.randn(2, module.in_features, generator=generator)
            tensors[f"trunk.{name}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=generator)
    return tensors
