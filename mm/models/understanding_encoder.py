"""The understanding encoder: a small contrastively trained ViT, separate from the generation tokenizer.

Design choices
- It is an open_clip model (Cherti et al. 2022, arXiv 2212.07143) with our own config: the parts have open_clip's names,
  so that the same weights load through open_clip's tools under the name `mm-tiny-vit`.
- The trunk reads the tokens of the last layer, not the pooled vector: counts and positions need spatial tokens.
- The text tower is small; the contrastive loss and open_clip's tools use it, the trunk does not.
- A drawn picture is read without being decoded (as in CLEAR, arXiv 2604.04780): latents lie on the same 8 x 8 grid as
  the encoder's patches, so a stem maps latents to patch embeddings and the encoder's layers follow. A connector from
  latents directly to the trunk has no such layers: 1 of 5 of its tokens was read as another object.

Legend: B batch, C latent channels, H = image / patch, L = H * H tokens, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.outputs import BaseOutput
from torch import nn

from mm.layers.entry_points import ForwardMixin, entry_point
from mm.models import layers

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


@dataclass
class UnderstandingOutput(BaseOutput):
    """pooled: vectors (B, embed_dim). tokens: (B, L, W)."""

    pooled: torch.Tensor
    tokens: torch.Tensor


class PatchEmbedding(nn.Conv2d):
    """open_clip's patch convolution; patches that are embedded already pass unchanged."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.shape[1] == self.out_channels else super().forward(x)


class Attention(nn.MultiheadAttention):
    """torch's attention, with the output projection called as a module, so that its hooks act."""

    def forward(  # type: ignore[override]
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        need_weights: bool = False,
        attn_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Self-attention of (B, L, W)."""
        assert self.batch_first and query is key is value and not need_weights
        q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


def _with_hooks(clip: nn.Module) -> None:
    """Gives parts of an open_clip model the classes above, which hold the same tensors."""
    for module in clip.modules():
        if type(module) is nn.MultiheadAttention:
            module.__class__ = Attention
    clip.visual.conv1.__class__ = PatchEmbedding  # type: ignore[union-attr]


class UnderstandingEncoder(ForwardMixin, ModelMixin, ConfigMixin):
    """Pictures to tokens; `visual`, `text` and `logit_scale` are open_clip's own."""

    output_class = UnderstandingOutput

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
        _with_hooks(clip)
        self.visual, self.text, self.logit_scale = clip.visual, clip.text, clip.logit_scale

    def forward(self, pictures_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled vectors (B, embed_dim) and tokens (B, L, W) of pictures in [-1, 1]."""
        size = self.config.image_size
        if pictures_BCHW.shape[1:] != (3, size, size):
            raise ValueError(f"pictures of shape {tuple(pictures_BCHW.shape)}; this encoder reads 3 x {size} x {size}")
        return self.visual(pictures_BCHW)

    @entry_point
    def encode_patches(self, patches_BWHH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward`, from patch embeddings (B, W, H, H), such as a `LatentStem`'s output."""
        side = self.config.image_size // self.config.patch_size
        if patches_BWHH.shape[1:] != (self.config.width, side, side):
            shape = tuple(patches_BWHH.shape)
            raise ValueError(f"patches of shape {shape}; this encoder reads {self.config.width} x {side} x {side}")
        return self.visual(patches_BWHH)

    @entry_point
    def encode_text(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Pooled vectors (B, embed_dim) of captions, right-padded with 0 up to the context length."""
        return self.text(ids_BT)


class StemBlock(nn.Module):
    """A depthwise convolution, then a feed-forward; starts as the identity (after ConvNeXt, arXiv 2201.03545)."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.near = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = layers.Norm(width)
        self.ff = layers.FeedForward(width, ratio)
        layers.init_linears(self)
        layers.zero(self.ff.down)

    def forward(self, x_BWHH: torch.Tensor) -> torch.Tensor:
        normed = self.norm(self.near(x_BWHH).permute(0, 2, 3, 1))
        return x_BWHH + self.ff(normed).permute(0, 3, 1, 2)


class LatentStem(ForwardMixin, ModelMixin, ConfigMixin):
    """Maps generation latents to the understanding encoder's patch embeddings."""

    @register_to_config
    def __init__(self, *, latent_channels: int = 16, width: int = 192, depth: int = 2, ratio: int = 2) -> None:
        super().__init__()
        self.latent_in = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(StemBlock(width, ratio) for _ in range(depth))
        self.patch_out = nn.Conv2d(width, width, 1)

    def forward(self, latents_BCHH: torch.Tensor) -> torch.Tensor:
        """Patches (B, W, H, H) of latents (B, C, H, H)."""
        if latents_BCHH.ndim != 4 or latents_BCHH.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"latents of shape {tuple(latents_BCHH.shape)}; expected (B, {self.config.latent_channels}, H, H)"
            )
        x_BWHH = self.latent_in(latents_BCHH)
        for block in self.blocks:
            x_BWHH = block(x_BWHH)
        return self.patch_out(x_BWHH)
