"""Tiny random denoisers of diffusers' real classes, with the inputs of one call.

`TINY["FluxTransformer2DModel"]()` gives (model, inputs), and `model(**inputs)` runs. Weights are seeded, and those that
start at zero are filled. Text has `WORDS` tokens everywhere, which no picture here has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import nn

WORDS = 5
Made = tuple[nn.Module, dict[str, Any]]
TINY: dict[str, Callable[[], Made]] = {}


def _r(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _tiny(make: Callable[[type], Made]) -> Callable[[type], Made]:
    """Registers a builder under the name of diffusers' class that its own name is."""
    name = make.__name__

    def build() -> Made:
        torch.manual_seed(0)
        model, inputs = make(getattr(diffusers, name))
        for parameter in model.parameters():
            if parameter.numel() and not 1e-3 < parameter.abs().max() < 1e3:  # zeros, or memory that was never written
                nn.init.normal_(parameter, std=0.1)
        return model.eval().requires_grad_(False), inputs

    TINY[name] = build
    return make


def _ids(tokens: int, axes: int = 3) -> torch.Tensor:
    return torch.arange(tokens)[:, None].expand(tokens, axes).float() % 4


def _t(value: float = 0.5) -> torch.Tensor:
    return torch.tensor([value])


def _mask(words: int = WORDS) -> torch.Tensor:
    return torch.ones(1, words, dtype=torch.long)


def _flux_like(kind: type, *, text: int = 32, pooled: int | None = 32, **options: Any) -> Made:
    model = kind(
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=text, axes_dims_rope=[4, 4, 8], **options,
    )  # fmt: skip
    inputs = {
        "hidden_states": _r(1, 16, 8), "encoder_hidden_states": _r(1, WORDS, text), "timestep": _t(),
        "img_ids": _ids(16), "txt_ids": torch.zeros(WORDS, 3),
    }  # fmt: skip
    return model, inputs | ({} if pooled is None else {"pooled_projections": _r(1, pooled)})


@_tiny
def FluxTransformer2DModel(kind: type) -> Made:
    return _flux_like(kind, pooled_projection_dim=32)


@_tiny
def ChromaTransformer2DModel(kind: type) -> Made:
    return _flux_like(kind, pooled=None, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=2)


@_tiny
def BriaTransformer2DModel(kind: type) -> Made:
    return _flux_like(kind, pooled=None)


@_tiny
def BriaFiboTransformer2DModel(kind: type) -> Made:
    model, inputs = _flux_like(kind, pooled=None, text_encoder_dim=16)
    return model, inputs | {"text_encoder_layers": [_r(1, WORDS, 16), _r(1, WORDS, 16)]}


@_tiny
def LongCatImageTransformer2DModel(kind: type) -> Made:
    return _flux_like(kind, pooled=None, pooled_projection_dim=32)


@_tiny
def OvisImageTransformer2DModel(kind: type) -> Made:
    return _flux_like(kind, pooled=None, out_channels=8)


@_tiny
def Flux2Transformer2DModel(kind: type) -> Made:
    model = kind(
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": _r(1, 16, 8), "encoder_hidden_states": _r(1, WORDS, 24), "timestep": _t(),
        "guidance": _t(4.0), "img_ids": _ids(16, 4), "txt_ids": _ids(WORDS, 4),
    }  # fmt: skip


@_tiny
def Flux3Transformer2DModel(kind: type) -> Made:
    model = kind(
        in_channels=8, cond_in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, timestep_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": _r(1, 16, 8), "encoder_hidden_states": _r(1, WORDS, 24), "timestep": _t(),
        "img_ids": _ids(16, 4), "txt_ids": _ids(WORDS, 4), "image_cond_hidden_states": _r(1, 9, 8),
        "image_cond_ids": _ids(9, 4),
    }  # fmt: skip


@_tiny
def SD3Transformer2DModel(kind: type) -> Made:
    model = kind(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=24, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return model, {
        "hidden_states": _r(1, 4, 8, 8), "encoder_hidden_states": _r(1, WORDS, 24),
        "pooled_projections": _r(1, 16), "timestep": _t(),
    }  # fmt: skip


@_tiny
def QwenImageTransformer2DModel(kind: type) -> Made:
    model = kind(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": _r(1, 16, 16), "encoder_hidden_states": _r(1, WORDS, 24),
        "encoder_hidden_states_mask": _mask(), "timestep": _t(), "img_shapes": [[(1, 4, 4)]],
    }  # fmt: skip


@_tiny
def PixArtTransformer2DModel(kind: type) -> Made:
    model = kind(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=16,
        in_channels=4, cross_attention_dim=24, out_channels=8, use_additional_conditions=False,
    )  # fmt: skip
    conditions = {"resolution": None, "aspect_ratio": None}
    return model, {
        "hidden_states": _r(1, 4, 8, 8), "encoder_hidden_states": _r(1, WORDS, 16), "timestep": torch.tensor([3]),
        "added_cond_kwargs": conditions,
    }  # fmt: skip


@_tiny
def SanaTransformer2DModel(kind: type) -> Made:
    model = kind(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=24,
        sample_size=8,
    )  # fmt: skip
    return model, {
        "hidden_states": _r(1, 4, 8, 8),
        "encoder_hidden_states": _r(1, WORDS, 24),
        "timestep": torch.tensor([3]),
    }


@_tiny
def SanaVideoTransformer3DModel(kind: type) -> Made:
    model = kind(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=12, num_attention_heads=2,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=16,
        sample_size=8, patch_size=(1, 2, 2), rope_max_seq_len=32,
    )  # fmt: skip
    return model, {
        "hidden_states": _r(1, 4, 2, 8, 8),
        "encoder_hidden_states": _r(1, WORDS, 16),
        "timestep": torch.tensor([3]),
    }


@_tiny
def ZImageTransformer2DModel(kind: type) -> Made:
    model = kind(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    return model, {"x": [_r(4, 1, 8, 8)], "t": _t(), "cap_feats": [_r(WORDS, 16)]}


@_tiny
def UNet2DConditionModel(kind: type) -> Made:
    model = kind(
        block_out_channels=(16, 32), norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=24, attention_head_dim=8,
        layers_per_block=1, sample_size=8, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64, use_linear_projection=True,
    )  # fmt: skip
    conditions = {"text_embeds": _r(1, 16), "time_ids": _r(1, 6)}
    return model, {
        "sample": _r(1, 4, 8, 8), "timestep": 3, "encoder_hidden_states": _r(1, WORDS, 24),
        "added_cond_kwargs": conditions,
    }  # fmt: skip


@_tiny
def HiDreamImageTransformer2DModel(kind: type) -> Made:
    model = kind(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, caption_channels=(16, 24), text_emb_dim=16, num_routed_experts=2,
        num_activated_experts=1, axes_dims_rope=(8, 4, 4), max_resolution=(8, 8), llama_layers=(0, 0),
        force_inference_output=True,
    )  # fmt: skip
    return model, {
        "hidden_states": _r(1, 4, 8, 8), "timesteps": torch.tensor([3]), "pooled_embeds": _r(1, 16),
        "encoder_hidden_states_t5": _r(1, WORDS, 16), "encoder_hidden_states_llama3": _r(1, 1, WORDS, 24),
    }  # fmt: skip


@_tiny
def Lumina2Transformer2DModel(kind: type) -> Made:
    model = kind(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(64, 32, 32),
        cap_feat_dim=16,
    )  # fmt: skip
    return model, {
        "hidden_states": _r(1, 4, 8, 8), "timestep": _t(), "encoder_hidden_states": _r(1, WORDS, 16),
        "encoder_attention_mask": _mask().bool(),
    }  # fmt: skip


@_tiny
def LuminaNextDiT2DModel(kind: type) -> Made:
    model = kind(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=32, num_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=16, cross_attention_dim=24,
    )  # fmt: skip
    rotary = diffusers.models.embeddings.get_2d_rotary_pos_embed_lumina(16, 8, 8)
    return model, {
        "hidden_states": _r(1, 4, 8, 8), "timestep": _t(), "encoder_hidden_states": _r(1, WORDS, 24),
        "encoder_mask": _mask(), "image_rotary_emb": rotary, "cross_attention_kwargs": {},
    }  # fmt: skip


@_tiny
def OmniGenTransformer2DModel(kind: type) -> Made:
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
    model = kind(
        in_channels=4, patch_size=2, hidden_size=32, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=48, num_layers=1, pad_token_id=0, vocab_size=50, max_position_embeddings=256,
        original_max_position_embeddings=128, rope_scaling=factors, pos_embed_max_size=16, time_step_dim=16,
    )  # fmt: skip
    tokens = WORDS + 1 + 16
    return model, {
        "hidden_states": _r(1, 4, 8, 8), "timestep": torch.tensor([3.0]),
        "input_ids": torch.arange(WORDS)[None] + 1, "input_img_latents": [], "input_image_sizes": {},
        "attention_mask": torch.ones(1, tokens, tokens), "position_ids": torch.arange(tokens)[None],
    }  # fmt: skip


@_tiny
def Kandinsky3UNet(kind: type) -> Made:
    model = kind(
        time_embedding_dim=32, groups=4, attention_head_dim=16, layers_per_block=2, block_out_channels=(32, 64),
        cross_attention_dim=16, encoder_hid_dim=24,
    )  # fmt: skip
    return model, {
        "sample": _r(1, 4, 8, 8), "timestep": torch.tensor([3]), "encoder_hidden_states": _r(1, WORDS, 24),
        "encoder_attention_mask": _mask(),
    }  # fmt: skip


@_tiny
def Kandinsky5Transformer3DModel(kind: type) -> Made:
    model = kind(
        in_visual_dim=4, in_text_dim=16, in_text_dim2=12, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2),
        model_dim=32, ff_dim=48, num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 4, 8),
    )  # fmt: skip
    return model, {
        "hidden_states": _r(1, 1, 8, 8, 4), "encoder_hidden_states": _r(1, WORDS, 16), "timestep": _t(),
        "pooled_projections": _r(1, 12), "visual_rope_pos": [torch.arange(1), torch.arange(4), torch.arange(4)],
        "text_rope_pos": torch.arange(WORDS),
    }  # fmt: skip


@_tiny
def HunyuanImageTransformer2DModel(kind: type) -> Made:
    model = kind(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, mlp_ratio=2.0, patch_size=(1, 1), text_embed_dim=24,
        rope_axes_dim=(8, 8),
    )  # fmt: skip
    return model, {
        "hidden_states": _r(1, 4, 4, 4), "timestep": _t(), "encoder_hidden_states": _r(1, WORDS, 24),
        "encoder_attention_mask": _mask(),
    }  # fmt: skip


@_tiny
def HunyuanVideoTransformer3DModel(kind: type) -> Made:
    model = kind(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, mlp_ratio=2.0, patch_size=1, text_embed_dim=24,
        pooled_projection_dim=12, rope_axes_dim=(4, 4, 8),
    )  # fmt: skip
    return model, {
        "hidden_states": _r(1, 4, 1, 4, 4), "timestep": _t(), "encoder_hidden_states": _r(1, WORDS, 24),
        "encoder_attention_mask": _mask(), "pooled_projections": _r(1, 12), "guidance": _t(6.0),
    }  # fmt: skip


@_tiny
def HunyuanDiT2DModel(kind: type) -> Made:
    model = kind(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=8, hidden_size=32,
        num_layers=2, mlp_ratio=2.0, cross_attention_dim=16, cross_attention_dim_t5=24, pooled_projection_dim=16,
        text_len=3, text_len_t5=2, activation_fn="gelu-approximate",
    )  # fmt: skip
    rotary = diffusers.models.embeddings.get_2d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), output_type="pt")
    return model, {
        "hidden_states": _r(1, 4, 8, 8), "timestep": _t(3.0), "encoder_hidden_states": _r(1, 3, 16),
        "text_embedding_mask": _mask(3), "encoder_hidden_states_t5": _r(1, 2, 24), "text_embedding_mask_t5": _mask(2),
        "image_meta_size": torch.ones(1, 6), "style": torch.zeros(1, dtype=torch.long), "image_rotary_emb": rotary,
    }  # fmt: skip


@_tiny
def AuraFlowTransformer2DModel(kind: type) -> Made:
    model = kind(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=32,
        out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip
    return model, {"hidden_states": _r(1, 4, 8, 8), "encoder_hidden_states": _r(1, WORDS, 24), "timestep": _t()}


def _cogview(kind: type, **options: Any) -> Made:
    model = kind(
        patch_size=2, in_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2, out_channels=4,
        text_embed_dim=24, time_embed_dim=16, condition_dim=8, **options,
    )  # fmt: skip
    sizes = dict.fromkeys(("original_size", "target_size", "crop_coords"), torch.tensor([[8.0, 8.0]]))
    inputs = {"hidden_states": _r(1, 4, 8, 8), "encoder_hidden_states": _r(1, WORDS, 24), "timestep": _t(3)}
    return model, inputs | sizes


@_tiny
def CogView3PlusTransformer2DModel(kind: type) -> Made:
    return _cogview(kind, pos_embed_max_size=8, sample_size=8)


@_tiny
def CogView4Transformer2DModel(kind: type) -> Made:
    return _cogview(kind, pos_embed_max_size=8, sample_size=8, rope_axes_dim=(8, 8))


@_tiny
def GlmImageTransformer2DModel(kind: type) -> Made:
    model, inputs = _cogview(kind, prior_vq_quantizer_codebook_size=32)
    del inputs["original_size"]
    tokens = torch.arange(16)[None] % 32
    return model, inputs | {"prior_token_id": tokens, "prior_token_drop": torch.zeros(1, 16, dtype=torch.bool)}


@_tiny
def CogVideoXTransformer3DModel(kind: type) -> Made:
    model = kind(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=24, num_layers=1, sample_width=8, sample_height=8, sample_frames=5, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=WORDS,
    )  # fmt: skip
    return model, {
        "hidden_states": _r(1, 2, 4, 8, 8),
        "encoder_hidden_states": _r(1, WORDS, 24),
        "timestep": torch.tensor([3]),
    }


@_tiny
def Krea2Transformer2DModel(kind: type) -> Made:
    model = kind(
        in_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=48, timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=1,
        text_num_key_value_heads=1, text_intermediate_size=24, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": _r(1, 16, 16), "encoder_hidden_states": _r(1, WORDS, 3, 16), "timestep": _t(),
        "position_ids": _ids(16 + WORDS),
    }  # fmt: skip


@_tiny
def ErnieImageTransformer2DModel(kind: type) -> Made:
    model = kind(
        hidden_size=32, num_attention_heads=2, num_layers=1, ffn_hidden_size=48, in_channels=4, out_channels=4,
        text_in_dim=24, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": _r(1, 4, 4, 4), "timestep": _t(), "text_bth": _r(1, WORDS, 24),
        "text_lens": torch.tensor([WORDS]),
    }  # fmt: skip


@_tiny
def PRXTransformer2DModel(kind: type) -> Made:
    model = kind(
        in_channels=4, patch_size=2, context_in_dim=24, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=1,
        axes_dim=[8, 8],
    )  # fmt: skip
    return model, {"hidden_states": _r(1, 4, 8, 8), "timestep": _t(), "encoder_hidden_states": _r(1, WORDS, 24)}


@_tiny
def NucleusMoEImageTransformer2DModel(kind: type) -> Made:
    model = kind(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 6, 6), mlp_ratio=2.0, num_experts=2, moe_intermediate_dim=16,
        capacity_factors=[2.0, 2.0], dense_moe_strategy="leave_first_block_dense",
    )  # fmt: skip
    return model, {
        "hidden_states": _r(1, 16, 16), "img_shapes": [(1, 4, 4)], "encoder_hidden_states": _r(1, WORDS, 24),
        "encoder_hidden_states_mask": _mask(), "timestep": _t(),
    }  # fmt: skip


@_tiny
def QwenImage21Transformer2DModel(kind: type) -> Made:
    model = kind(
        in_channels=8, out_channels=8, num_layers=1, attention_head_dim=16, num_attention_heads=2, context_in_dim=24,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": _r(1, 16, 8), "encoder_hidden_states": _r(1, WORDS, 24), "timestep": _t(),
        "img_shapes": [[(1, 4, 4)]], "img_mask": torch.arange(WORDS + 4)[None] >= WORDS,
        "encoder_hidden_states_mask": _mask(),
    }  # fmt: skip


@_tiny
def DiTTransformer2DModel(kind: type) -> Made:
    model = kind(num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=1, sample_size=8,
                 num_embeds_ada_norm=10)  # fmt: skip
    return model, {"hidden_states": _r(1, 4, 8, 8), "timestep": torch.tensor([3]), "class_labels": torch.tensor([1])}


@_tiny
def WanTransformer3DModel(kind: type) -> Made:
    model = kind(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=1, image_dim=20, added_kv_proj_dim=24, rope_max_seq_len=32,
    )  # fmt: skip
    return model, {
        "hidden_states": _r(1, 4, 1, 8, 8), "timestep": torch.tensor([3]), "encoder_hidden_states": _r(1, WORDS, 16),
        "encoder_hidden_states_image": _r(1, 7, 20),
    }  # fmt: skip


@_tiny
def WanVACETransformer3DModel(kind: type) -> Made:
    model = kind(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32, vace_layers=[0], vace_in_channels=6,
    )  # fmt: skip
    return model, {
        "hidden_states": _r(1, 4, 1, 8, 8), "timestep": torch.tensor([3]), "encoder_hidden_states": _r(1, WORDS, 16),
        "control_hidden_states": _r(1, 6, 1, 8, 8),
    }  # fmt: skip


@_tiny
def LTXVideoTransformer3DModel(kind: type) -> Made:
    model = kind(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=1, caption_channels=24,
    )  # fmt: skip
    return model, {
        "hidden_states": _r(1, 16, 8), "encoder_hidden_states": _r(1, WORDS, 24), "timestep": torch.tensor([3]),
        "encoder_attention_mask": _mask(), "num_frames": 1, "height": 4, "width": 4,
    }  # fmt: skip


@_tiny
def MochiTransformer3DModel(kind: type) -> Made:
    model = kind(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=24, time_embed_dim=8, max_sequence_length=WORDS,
    )  # fmt: skip
    return model, {
        "hidden_states": _r(1, 4, 1, 8, 8), "encoder_hidden_states": _r(1, WORDS, 24), "timestep": torch.tensor([3]),
        "encoder_attention_mask": _mask().bool(),
    }  # fmt: skip


@_tiny
def AllegroTransformer3DModel(kind: type) -> Made:
    model = kind(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=1,
        cross_attention_dim=24, sample_width=8, sample_height=8, sample_frames=2, caption_channels=16,
    )  # fmt: skip
    rotary = diffusers.models.embeddings.get_3d_rotary_pos_embed_allegro(12, ((0, 0), (4, 4)), (4, 4), 2)
    grid = torch.cartesian_prod(*(torch.as_tensor(axis).long() for axis in rotary[3:])).T[:, None]
    return model, {
        "hidden_states": _r(1, 4, 2, 8, 8),
        "encoder_hidden_states": _r(1, WORDS, 16),
        "timestep": torch.tensor([3]),
        "attention_mask": torch.ones(1, 2, 8, 8),
        "encoder_attention_mask": _mask(),
        "image_rotary_emb": (rotary[:3], list(grid)),
    }


@_tiny
def LatteTransformer3DModel(kind: type) -> Made:
    model = kind(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=1, patch_size=2,
        cross_attention_dim=24, sample_size=8, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, caption_channels=16, video_length=2,
        attention_bias=True,
    )  # fmt: skip
    return model, {
        "hidden_states": _r(1, 4, 2, 8, 8),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": _r(1, WORDS, 16),
    }


@_tiny
def CosmosTransformer3DModel(kind: type) -> Made:
    model = kind(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, mlp_ratio=2,
        text_embed_dim=24, adaln_lora_dim=4, max_size=(4, 16, 16), concat_padding_mask=True,
    )  # fmt: skip
    return model, {
        "hidden_states": _r(1, 4, 1, 8, 8), "timestep": _t(), "encoder_hidden_states": _r(1, WORDS, 24),
        "padding_mask": torch.zeros(1, 1, 8, 8),
    }  # fmt: skip


@_tiny
def EasyAnimateTransformer3DModel(kind: type) -> Made:
    model = kind(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, sample_width=8,
        sample_height=8, num_layers=1, mmdit_layers=1, time_embed_dim=8, text_embed_dim=24,
    )  # fmt: skip
    return model, {"hidden_states": _r(1, 4, 1, 8, 8), "timestep": _t(3), "encoder_hidden_states": _r(1, WORDS, 24)}


@_tiny
def UVit2DModel(kind: type) -> Made:
    model = kind(
        hidden_size=16, cond_embed_dim=16, micro_cond_encode_dim=2, micro_cond_embed_dim=10, encoder_hidden_size=24,
        vocab_size=32, codebook_size=32, in_channels=16, block_out_channels=16, num_res_blocks=1, block_num_heads=2,
        num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, sample_size=4,
    )  # fmt: skip
    return model, {
        "input_ids": torch.arange(16).reshape(1, 4, 4), "encoder_hidden_states": _r(1, WORDS, 24),
        "pooled_text_emb": _r(1, 16), "micro_conds": torch.ones(1, 5),
    }  # fmt: skip


@_tiny
def StableCascadeUNet(kind: type) -> Made:
    layers = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    model = kind(
        in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, conditioning_dim=24,
        block_out_channels=(16, 16), num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1), clip_text_in_channels=16, clip_text_pooled_in_channels=16,
        block_types_per_layer=(layers, layers), clip_seq=2, dropout=(0.0, 0.0), switch_level=(False,),
    )  # fmt: skip
    return model, {
        "sample": _r(1, 4, 8, 8), "timestep_ratio": _t(), "clip_text_pooled": _r(1, 1, 16),
        "clip_text": _r(1, WORDS, 16),
    }  # fmt: skip


@_tiny
def UNetSpatioTemporalConditionModel(kind: type) -> Made:
    model = kind(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 32), num_attention_heads=(2, 2),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24, layers_per_block=1, cross_attention_dim=24, num_frames=2,
    )  # fmt: skip
    return model, {
        "sample": _r(1, 2, 4, 8, 8), "timestep": 3, "encoder_hidden_states": _r(1, WORDS, 24),
        "added_time_ids": torch.ones(1, 3),
    }  # fmt: skip


@_tiny
def UNetMotionModel(kind: type) -> Made:
    model = kind(
        sample_size=8, block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1, cross_attention_dim=24,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), num_attention_heads=2,
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), motion_num_attention_heads=2,
    )  # fmt: skip
    return model, {"sample": _r(1, 4, 2, 8, 8), "timestep": 3, "encoder_hidden_states": _r(2, WORDS, 24)}
