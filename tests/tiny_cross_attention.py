"""Tiny transformers that read text by cross-attention, in one stream, or a class alone; see `tiny_families`."""

from __future__ import annotations

import diffusers
import torch
from tiny_builders import WORDS, Made, normal, timestep, tiny, unmasked


@tiny
def PixArtTransformer2DModel(kind: type) -> Made:
    model = kind(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=16,
        in_channels=4, cross_attention_dim=24, out_channels=8, use_additional_conditions=False,
    )  # fmt: skip
    conditions = {"resolution": None, "aspect_ratio": None}
    return model, {
        "hidden_states": normal(1, 4, 8, 8), "encoder_hidden_states": normal(1, WORDS, 16),
        "timestep": torch.tensor([3]),
        "added_cond_kwargs": conditions,
    }  # fmt: skip


@tiny
def SanaTransformer2DModel(kind: type) -> Made:
    model = kind(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=24,
        sample_size=8,
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 4, 8, 8),
        "encoder_hidden_states": normal(1, WORDS, 24),
        "timestep": torch.tensor([3]),
    }


@tiny
def HunyuanDiT2DModel(kind: type) -> Made:
    model = kind(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=8, hidden_size=32,
        num_layers=2, mlp_ratio=2.0, cross_attention_dim=16, cross_attention_dim_t5=24, pooled_projection_dim=16,
        text_len=3, text_len_t5=2, activation_fn="gelu-approximate",
    )  # fmt: skip
    rotary = diffusers.models.embeddings.get_2d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), output_type="pt")
    return model, {
        "hidden_states": normal(1, 4, 8, 8), "timestep": timestep(3.0), "encoder_hidden_states": normal(1, 3, 16),
        "text_embedding_mask": unmasked(3), "encoder_hidden_states_t5": normal(1, 2, 24),
        "text_embedding_mask_t5": unmasked(2),
        "image_meta_size": torch.ones(1, 6), "style": torch.zeros(1, dtype=torch.long), "image_rotary_emb": rotary,
    }  # fmt: skip


@tiny
def LuminaNextDiT2DModel(kind: type) -> Made:
    model = kind(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=32, num_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=16, cross_attention_dim=24,
    )  # fmt: skip
    rotary = diffusers.models.embeddings.get_2d_rotary_pos_embed_lumina(16, 8, 8)
    return model, {
        "hidden_states": normal(1, 4, 8, 8), "timestep": timestep(), "encoder_hidden_states": normal(1, WORDS, 24),
        "encoder_mask": unmasked(), "image_rotary_emb": rotary, "cross_attention_kwargs": {},
    }  # fmt: skip


@tiny
def DiTTransformer2DModel(kind: type) -> Made:
    model = kind(num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=1, sample_size=8,
                 num_embeds_ada_norm=10)  # fmt: skip
    return model, {
        "hidden_states": normal(1, 4, 8, 8),
        "timestep": torch.tensor([3]),
        "class_labels": torch.tensor([1]),
    }


@tiny
def ZImageTransformer2DModel(kind: type) -> Made:
    model = kind(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    return model, {"x": [normal(4, 1, 8, 8)], "t": timestep(), "cap_feats": [normal(WORDS, 16)]}


@tiny
def OmniGenTransformer2DModel(kind: type) -> Made:
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
    model = kind(
        in_channels=4, patch_size=2, hidden_size=32, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=48, num_layers=1, pad_token_id=0, vocab_size=50, max_position_embeddings=256,
        original_max_position_embeddings=128, rope_scaling=factors, pos_embed_max_size=16, time_step_dim=16,
    )  # fmt: skip
    tokens = WORDS + 1 + 16
    return model, {
        "hidden_states": normal(1, 4, 8, 8), "timestep": torch.tensor([3.0]),
        "input_ids": torch.arange(WORDS)[None] + 1, "input_img_latents": [], "input_image_sizes": {},
        "attention_mask": torch.ones(1, tokens, tokens), "position_ids": torch.arange(tokens)[None],
    }  # fmt: skip


@tiny
def Lumina2Transformer2DModel(kind: type) -> Made:
    model = kind(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(64, 32, 32),
        cap_feat_dim=16,
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 4, 8, 8), "timestep": timestep(), "encoder_hidden_states": normal(1, WORDS, 16),
        "encoder_attention_mask": unmasked().bool(),
    }  # fmt: skip


@tiny
def ErnieImageTransformer2DModel(kind: type) -> Made:
    model = kind(
        hidden_size=32, num_attention_heads=2, num_layers=1, ffn_hidden_size=48, in_channels=4, out_channels=4,
        text_in_dim=24, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 4, 4, 4), "timestep": timestep(), "text_bth": normal(1, WORDS, 24),
        "text_lens": torch.tensor([WORDS]),
    }  # fmt: skip
