"""More tiny random whole pipelines, as those of tiny_pipelines: `MORE` holds their builders by family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
from tiny_parts import SIDE, flow, kl_vae
from tiny_text_encoders import WIDTH, glm_text, umt5_text
from tiny_tokenizers import glm_tokenizer, t5_tokenizer


def _cogview_4() -> Any:
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        text_embed_dim=WIDTH, time_embed_dim=16, condition_dim=8, pos_embed_max_size=16, sample_size=SIDE // 4,
        rope_axes_dim=(16, 16),
    )  # fmt: skip
    scheduler = flow(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear")
    return diffusers.CogView4Pipeline(
        transformer=transformer, vae=kl_vae(16), text_encoder=glm_text(), tokenizer=glm_tokenizer(),
        scheduler=scheduler,
    )  # fmt: skip


def _wan() -> Any:
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=WIDTH, freq_dim=16,
        ffn_dim=128, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    transformer.condition_embedder.text_embedder.linear_1.weight.data *= 10  # so that texts differ beside biases
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], scale_factor_spatial=2,
        latents_mean=[-0.7, 0.1, 0.9, -0.2], latents_std=[2.8, 1.4, 2.3, 0.7],
    )  # fmt: skip
    return diffusers.WanPipeline(
        transformer=transformer, vae=vae, text_encoder=umt5_text(), tokenizer=t5_tokenizer(), scheduler=flow(shift=3.0)
    )


MORE: dict[str, Callable[[], Any]] = {
    "cogview-4": _cogview_4,
    "wan": _wan,
}
