"""Tiny UNets of pictures and videos; see `tiny_families`."""

from __future__ import annotations

import torch
from tiny_builders import WORDS, Made, normal, timestep, tiny, unmasked


@tiny
def UNet2DConditionModel(kind: type) -> Made:
    model = kind(
        block_out_channels=(16, 32), norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=24, attention_head_dim=8,
        layers_per_block=1, sample_size=8, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64, use_linear_projection=True,
    )  # fmt: skip
    conditions = {"text_embeds": normal(1, 16), "time_ids": normal(1, 6)}
    return model, {
        "sample": normal(1, 4, 8, 8), "timestep": 3, "encoder_hidden_states": normal(1, WORDS, 24),
        "added_cond_kwargs": conditions,
    }  # fmt: skip


@tiny
def Kandinsky3UNet(kind: type) -> Made:
    model = kind(
        time_embedding_dim=32, groups=4, attention_head_dim=16, layers_per_block=2, block_out_channels=(32, 64),
        cross_attention_dim=16, encoder_hid_dim=24,
    )  # fmt: skip
    return model, {
        "sample": normal(1, 4, 8, 8), "timestep": torch.tensor([3]), "encoder_hidden_states": normal(1, WORDS, 24),
        "encoder_attention_mask": unmasked(),
    }  # fmt: skip


@tiny
def StableCascadeUNet(kind: type) -> Made:
    layers = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    model = kind(
        in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, conditioning_dim=24,
        block_out_channels=(16, 16), num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1), clip_text_in_channels=16, clip_text_pooled_in_channels=16,
        block_types_per_layer=(layers, layers), clip_seq=2, dropout=(0.0, 0.0), switch_level=(False,),
    )  # fmt: skip
    return model, {
        "sample": normal(1, 4, 8, 8), "timestep_ratio": timestep(), "clip_text_pooled": normal(1, 1, 16),
        "clip_text": normal(1, WORDS, 16),
    }  # fmt: skip


@tiny
def UNetSpatioTemporalConditionModel(kind: type) -> Made:
    model = kind(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 32), num_attention_heads=(2, 2),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24, layers_per_block=1, cross_attention_dim=24, num_frames=2,
    )  # fmt: skip
    return model, {
        "sample": normal(1, 2, 4, 8, 8), "timestep": 3, "encoder_hidden_states": normal(1, WORDS, 24),
        "added_time_ids": torch.ones(1, 3),
    }  # fmt: skip


@tiny
def UNetMotionModel(kind: type) -> Made:
    model = kind(
        sample_size=8, block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1, cross_attention_dim=24,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), num_attention_heads=2,
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), motion_num_attention_heads=2,
    )  # fmt: skip
    return model, {"sample": normal(1, 4, 2, 8, 8), "timestep": 3, "encoder_hidden_states": normal(2, WORDS, 24)}


@tiny
def UVit2DModel(kind: type) -> Made:
    model = kind(
        hidden_size=16, cond_embed_dim=16, micro_cond_encode_dim=2, micro_cond_embed_dim=10, encoder_hidden_size=24,
        vocab_size=32, codebook_size=32, in_channels=16, block_out_channels=16, num_res_blocks=1, block_num_heads=2,
        num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, sample_size=4,
    )  # fmt: skip
    return model, {
        "input_ids": torch.arange(16).reshape(1, 4, 4), "encoder_hidden_states": normal(1, WORDS, 24),
        "pooled_text_emb": normal(1, 16), "micro_conds": torch.ones(1, 5),
    }  # fmt: skip
