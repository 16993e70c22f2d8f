"""The understanding encoder: a small ViT of its own, contrastively trained, apart from the generation tokenizer.

Design choices
- It is an open_clip model (Cherti et al. 2022, arXiv 2212.07143) with a config of ours: the parts carry open_clip's
  names, so that the same weights load through open_clip's tools under the name `mm-tiny-vit`.
- The trunk reads the tokens of the last layer, not the pooled vector: counts and positions need places.
- The text tower is small; it serves the contrastive loss and open_clip's tools, never the trunk.

This module does not know the trunk, pictures' files or losses.
Legend: B batch, L = (image / patch)^2 tokens, W width.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

NAME = "mm-tiny-vit"


def open_clip_config(config: dict[str, Any]) -> dict[str, Any]:
    """open_clip's description of an encoder with this config."""
    return {
        "embed_dim": config["embed_dim"],
        "custom_text": True,
        "vision_cfg": {
            "image_size": config["image_size"],
            "patch_size": config["patch_size"],
            "width": config["width"],
            "layers": config["depth"],
            "head_width": config["width"] // config["heads"],
            "mlp_ratio": config["ratio"],
            "output_tokens": True,
        },
        "text_cfg": {
            "context_length": config["context_length"],
            "vocab_size": config["vocabulary_size"],
            "width": config["text_width"],
            "heads": config["heads"],
            "layers": config["text_depth"],
            "pool_type": "eos",
            "eos_id": 3,
            "pad_id": 0,
        },
    }


class UnderstandingEncoder(ModelMixin, ConfigMixin):
    """Pictures to tokens; `visual`, `text` and `logit_scale` are open_clip's own."""

    @register_to_config
    def __init__(
        self,
        *,
        image_size: int = 128,
        patch_size: int = 16,
        width: int = 192,
        depth: int = 4,
        heads: int = 4,
        ratio: float = 3.0,
        embed_dim: int = 128,
        vocabulary_size: int = 1024,
        context_length: int = 64,
        text_width: int = 96,
        text_depth: int = 2,
    ) -> None:
        super().__init__()
        from open_clip.model import CustomTextCLIP

        if image_size % patch_size or width % heads:
            raise ValueError(
                f"image_size {image_size} / patch_size {patch_size} and width {width} / heads {heads}: whole"
            )
        clip: Any = CustomTextCLIP(
            **{k: x for k, x in open_clip_config(dict(self.config)).items() if k != "custom_text"}
        )
        self.visual, self.text, self.logit_scale = clip.visual, clip.text, clip.logit_scale

    def forward(self, pictures_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled vectors (B, embed_dim) and tokens (B, L, W) of pictures in [-1, 1]."""
        size = self.config.image_size
        if pictures_BCHW.shape[1:] != (3, size, size):
            raise ValueError(f"pictures of shape {tuple(pictures_BCHW.shape)}; this encoder reads 3 x {size} x {size}")
        return self.visual(pictures_BCHW)

    def encode_text(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Pooled vectors (B, embed_dim) of captions, right-padded with 0 up to the context length."""
        return self.text(ids_BT)
