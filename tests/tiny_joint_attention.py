"""Tiny denoisers whose text and picture tokens attend to each other (MMDiT and the like); see `tiny_families`."""

from __future__ import annotations

from typing import Any

import torch
from tiny_builders import WORDS, Made, normal, positions, timestep, tiny, unmasked


def _flux_like(kind: type, *, text: int = 32, pooled: int | None = 32, **options: Any) -> Made:
    model = kind(
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=text, axes_dims_rope=[4, 4, 8], **options,
    )  # fmt: skip
    inputs = {
        "hidden_states": normal(1, 16, 8), "encoder_hidden_states": normal(1, WORDS, text), "timestep": timestep(),
        "img_ids": positions(16), "txt_ids": torch.zeros(WORDS, 3),
    }  # fmt: skip
    return model, inputs | ({} if pooled is None else {"pooled_projections": normal(1, pooled)})


@tiny
def FluxTransformer2DModel(kind: type) -> Made:
    return _flux_like(kind, pooled_projection_dim=32)


@tiny
def ChromaTransformer2DModel(kind: type) -> Made:
    return _flux_like(kind, pooled=None, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=2)


@tiny
def BriaTransformer2DModel(kind: type) -> Made:
    return _flux_like(kind, pooled=None)


@tiny
def BriaFiboTransformer2DModel(kind: type) -> Made:
    model, inputs = _flux_like(kind, pooled=None, text_encoder_dim=16)
    return model, inputs | {"text_encoder_layers": [normal(1, WORDS, 16), normal(1, WORDS, 16)]}


@tiny
def LongCatImageTransformer2DModel(kind: type) -> Made:
    return _flux_like(kind, pooled=None, pooled_projection_dim=32)


@tiny
def OvisImageTransformer2DModel(kind: type) -> Made:
    return _flux_like(kind, pooled=None, out_channels=8)


@tiny
def Flux2Transformer2DModel(kind: type) -> Made:
    model = kind(
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 16, 8), "encoder_hidden_states": normal(1, WORDS, 24), "timestep": timestep(),
        "guidance": timestep(4.0), "img_ids": positions(16, 4), "txt_ids": positions(WORDS, 4),
    }  # fmt: skip


@tiny
def Flux3Transformer2DModel(kind: type) -> Made:
    model = kind(
        in_channels=8, cond_in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, timestep_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 16, 8), "encoder_hidden_states": normal(1, WORDS, 24), "timestep": timestep(),
        "img_ids": positions(16, 4), "txt_ids": positions(WORDS, 4), "image_cond_hidden_states": normal(1, 9, 8),
        "image_cond_ids": positions(9, 4),
    }  # fmt: skip


@tiny
def SD3Transformer2DModel(kind: type) -> Made:
    model = kind(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=24, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 4, 8, 8), "encoder_hidden_states": normal(1, WORDS, 24),
        "pooled_projections": normal(1, 16), "timestep": timestep(),
    }  # fmt: skip


@tiny
def QwenImageTransformer2DModel(kind: type) -> Made:
    model = kind(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 16, 16), "encoder_hidden_states": normal(1, WORDS, 24),
        "encoder_hidden_states_mask": unmasked(), "timestep": timestep(), "img_shapes": [[(1, 4, 4)]],
    }  # fmt: skip


@tiny
def HiDreamImageTransformer2DModel(kind: type) -> Made:
    model = kind(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, caption_channels=(16, 24), text_emb_dim=16, num_routed_experts=2,
        num_activated_experts=1, axes_dims_rope=(8, 4, 4), max_resolution=(8, 8), llama_layers=(0, 0),
        force_inference_output=True,
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 4, 8, 8), "timesteps": torch.tensor([3]), "pooled_embeds": normal(1, 16),
        "encoder_hidden_states_t5": normal(1, WORDS, 16), "encoder_hidden_states_llama3": normal(1, 1, WORDS, 24),
    }  # fmt: skip


@tiny
def HunyuanImageTransformer2DModel(kind: type) -> Made:
    model = kind(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, mlp_ratio=2.0, patch_size=(1, 1), text_embed_dim=24,
        rope_axes_dim=(8, 8),
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 4, 4, 4), "timestep": timestep(), "encoder_hidden_states": normal(1, WORDS, 24),
        "encoder_attention_mask": unmasked(),
    }  # fmt: skip


@tiny
def AuraFlowTransformer2DModel(kind: type) -> Made:
    model = kind(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=32,
        out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 4, 8, 8),
        "encoder_hidden_states": normal(1, WORDS, 24),
        "timestep": timestep(),
    }


def _cogview(kind: type, **options: Any) -> Made:
    model = kind(
        patch_size=2, in_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2, out_channels=4,
        text_embed_dim=24, time_embed_dim=16, condition_dim=8, **options,
    )  # fmt: skip
    sizes = dict.fromkeys(("original_size", "target_size", "crop_coords"), torch.tensor([[8.0, 8.0]]))
    inputs = {
        "hidden_states": normal(1, 4, 8, 8),
        "encoder_hidden_states": normal(1, WORDS, 24),
        "timestep": timestep(3),
    }
    return model, inputs | sizes


@tiny
def CogView3PlusTransformer2DModel(kind: type) -> Made:
    return _cogview(kind, pos_embed_max_size=8, sample_size=8)


@tiny
def CogView4Transformer2DModel(kind: type) -> Made:
    return _cogview(kind, pos_embed_max_size=8, sample_size=8, rope_axes_dim=(8, 8))


@tiny
def GlmImageTransformer2DModel(kind: type) -> Made:
    model, inputs = _cogview(kind, prior_vq_quantizer_codebook_size=32)
    del inputs["original_size"]
    tokens = torch.arange(16)[None] % 32
    return model, inputs | {"prior_token_id": tokens, "prior_token_drop": torch.zeros(1, 16, dtype=torch.bool)}


@tiny
def Krea2Transformer2DModel(kind: type) -> Made:
    model = kind(
        in_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=48, timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=1,
        text_num_key_value_heads=1, text_intermediate_size=24, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 16, 16), "encoder_hidden_states": normal(1, WORDS, 3, 16), "timestep": timestep(),
        "position_ids": positions(16 + WORDS),
    }  # fmt: skip


@tiny
def PRXTransformer2DModel(kind: type) -> Made:
    model = kind(
        in_channels=4, patch_size=2, context_in_dim=24, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=1,
        axes_dim=[8, 8],
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 4, 8, 8),
        "timestep": timestep(),
        "encoder_hidden_states": normal(1, WORDS, 24),
    }


@tiny
def NucleusMoEImageTransformer2DModel(kind: type) -> Made:
    model = kind(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 6, 6), mlp_ratio=2.0, num_experts=2, moe_intermediate_dim=16,
        capacity_factors=[2.0, 2.0], dense_moe_strategy="leave_first_block_dense",
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 16, 16), "img_shapes": [(1, 4, 4)], "encoder_hidden_states": normal(1, WORDS, 24),
        "encoder_hidden_states_mask": unmasked(), "timestep": timestep(),
    }  # fmt: skip


@tiny
def QwenImage21Transformer2DModel(kind: type) -> Made:
    model = kind(
        in_channels=8, out_channels=8, num_layers=1, attention_head_dim=16, num_attention_heads=2, context_in_dim=24,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 16, 8), "encoder_hidden_states": normal(1, WORDS, 24), "timestep": timestep(),
        "img_shapes": [[(1, 4, 4)]], "img_mask": torch.arange(WORDS + 4)[None] >= WORDS,
        "encoder_hidden_states_mask": unmasked(),
    }  # fmt: skip
