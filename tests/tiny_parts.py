"""Parts that tiny pipelines share: schedulers and autoencoders of diffusers' real classes."""

from __future__ import annotations

from typing import Any

import diffusers

SIDE = 32  # pixels of pictures that are drawn, and of sources


def flow(**options: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def kl_vae(channels: int = 4, blocks: int = 3, *, shifted: bool = False) -> Any:
    """AutoencoderKL that makes pictures 2 ** (blocks - 1) times smaller; those for flow matching shift latents."""
    flow: dict[str, Any] = {}
    if shifted or channels == 16:
        flow = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1}
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16, 16)[:blocks], latent_channels=channels, norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks, **flow,
    )  # fmt: skip


def qwen_vae() -> Any:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )  # fmt: skip
