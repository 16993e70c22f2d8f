"""Tiny transformers that draw videos; see `tiny_families`."""

from __future__ import annotations

import diffusers
import torch
from tiny_builders import WORDS, Made, normal, timestep, tiny, unmasked


@tiny
def SanaVideoTransformer3DModel(kind: type) -> Made:
    model = kind(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=12, num_attention_heads=2,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=16,
        sample_size=8, patch_size=(1, 2, 2), rope_max_seq_len=32,
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 4, 2, 8, 8),
        "encoder_hidden_states": normal(1, WORDS, 16),
        "timestep": torch.tensor([3]),
    }


@tiny
def HunyuanVideoTransformer3DModel(kind: type) -> Made:
    model = kind(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, mlp_ratio=2.0, patch_size=1, text_embed_dim=24,
        pooled_projection_dim=12, rope_axes_dim=(4, 4, 8),
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 4, 1, 4, 4), "timestep": timestep(), "encoder_hidden_states": normal(1, WORDS, 24),
        "encoder_attention_mask": unmasked(), "pooled_projections": normal(1, 12), "guidance": timestep(6.0),
    }  # fmt: skip


@tiny
def CogVideoXTransformer3DModel(kind: type) -> Made:
    model = kind(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=24, num_layers=1, sample_width=8, sample_height=8, sample_frames=5, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=WORDS,
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 2, 4, 8, 8),
        "encoder_hidden_states": normal(1, WORDS, 24),
        "timestep": torch.tensor([3]),
    }


@tiny
def WanTransformer3DModel(kind: type) -> Made:
    model = kind(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=1, image_dim=20, added_kv_proj_dim=24, rope_max_seq_len=32,
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 4, 1, 8, 8), "timestep": torch.tensor([3]),
        "encoder_hidden_states": normal(1, WORDS, 16),
        "encoder_hidden_states_image": normal(1, 7, 20),
    }  # fmt: skip


@tiny
def WanVACETransformer3DModel(kind: type) -> Made:
    model = kind(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32, vace_layers=[0], vace_in_channels=6,
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 4, 1, 8, 8), "timestep": torch.tensor([3]),
        "encoder_hidden_states": normal(1, WORDS, 16),
        "control_hidden_states": normal(1, 6, 1, 8, 8),
    }  # fmt: skip


@tiny
def LTXVideoTransformer3DModel(kind: type) -> Made:
    model = kind(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=1, caption_channels=24,
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 16, 8), "encoder_hidden_states": normal(1, WORDS, 24), "timestep": torch.tensor([3]),
        "encoder_attention_mask": unmasked(), "num_frames": 1, "height": 4, "width": 4,
    }  # fmt: skip


@tiny
def MochiTransformer3DModel(kind: type) -> Made:
    model = kind(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=24, time_embed_dim=8, max_sequence_length=WORDS,
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 4, 1, 8, 8), "encoder_hidden_states": normal(1, WORDS, 24),
        "timestep": torch.tensor([3]),
        "encoder_attention_mask": unmasked().bool(),
    }  # fmt: skip


@tiny
def AllegroTransformer3DModel(kind: type) -> Made:
    model = kind(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=1,
        cross_attention_dim=24, sample_width=8, sample_height=8, sample_frames=2, caption_channels=16,
    )  # fmt: skip
    rotary = diffusers.models.embeddings.get_3d_rotary_pos_embed_allegro(12, ((0, 0), (4, 4)), (4, 4), 2)
    grid = torch.cartesian_prod(*(torch.as_tensor(axis).long() for axis in rotary[3:])).T[:, None]
    return model, {
        "hidden_states": normal(1, 4, 2, 8, 8),
        "encoder_hidden_states": normal(1, WORDS, 16),
        "timestep": torch.tensor([3]),
        "attention_mask": torch.ones(1, 2, 8, 8),
        "encoder_attention_mask": unmasked(),
        "image_rotary_emb": (rotary[:3], list(grid)),
    }


@tiny
def LatteTransformer3DModel(kind: type) -> Made:
    model = kind(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=1, patch_size=2,
        cross_attention_dim=24, sample_size=8, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, caption_channels=16, video_length=2,
        attention_bias=True,
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 4, 2, 8, 8),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": normal(1, WORDS, 16),
    }


@tiny
def CosmosTransformer3DModel(kind: type) -> Made:
    model = kind(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, mlp_ratio=2,
        text_embed_dim=24, adaln_lora_dim=4, max_size=(4, 16, 16), concat_padding_mask=True,
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 4, 1, 8, 8), "timestep": timestep(), "encoder_hidden_states": normal(1, WORDS, 24),
        "padding_mask": torch.zeros(1, 1, 8, 8),
    }  # fmt: skip


@tiny
def EasyAnimateTransformer3DModel(kind: type) -> Made:
    model = kind(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, sample_width=8,
        sample_height=8, num_layers=1, mmdit_layers=1, time_embed_dim=8, text_embed_dim=24,
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 4, 1, 8, 8),
        "timestep": timestep(3),
        "encoder_hidden_states": normal(1, WORDS, 24),
    }


@tiny
def Kandinsky5Transformer3DModel(kind: type) -> Made:
    model = kind(
        in_visual_dim=4, in_text_dim=16, in_text_dim2=12, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2),
        model_dim=32, ff_dim=48, num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 4, 8),
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 1, 8, 8, 4), "encoder_hidden_states": normal(1, WORDS, 16), "timestep": timestep(),
        "pooled_projections": normal(1, 12), "visual_rope_pos": [torch.arange(1), torch.arange(4), torch.arange(4)],
        "text_rope_pos": torch.arange(WORDS),
    }  # fmt: skip
