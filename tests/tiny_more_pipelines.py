"""More tiny random whole pipelines, as those of tiny_pipelines: `MORE` holds their builders by family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
from tiny_parts import SIDE, flow, kl_vae
from tiny_text_encoders import WIDTH, glm_text
from tiny_tokenizers import glm_tokenizer


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


MORE: dict[str, Callable[[], Any]] = {
    "cogview-4": _cogview_4,
}
