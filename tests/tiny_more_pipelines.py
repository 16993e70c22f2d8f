"""More tiny random whole pipelines, as those of tiny_pipelines: `MORE` holds their builders by family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import transformers
from diffusers.guiders import AdaptiveProjectedMixGuidance
from tiny_parts import SIDE, flow, kl_vae
from tiny_text_encoders import WIDTH, bert_text, glm_text, qwen_vl_text, t5_text, umt5_text
from tiny_tokenizers import bert_tokenizer, glm_tokenizer, qwen_tokenizer, t5_tokenizer


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


def _hunyuan_image() -> Any:
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=16, out_channels=16, num_attention_heads=4, attention_head_dim=16, num_layers=2,
        num_single_layers=2, num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=WIDTH, text_embed_2_dim=WIDTH,
        rope_axes_dim=(8, 8),
    )  # fmt: skip
    transformer.context_embedder.proj_in.weight.data *= 2  # so that prompts differ beside what is around each
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(32, 32, 32), layers_per_block=1,
        spatial_compression_ratio=4, sample_size=SIDE, scaling_factor=0.75,
    )  # fmt: skip
    pipe = diffusers.HunyuanImagePipeline(
        transformer=transformer, vae=vae, text_encoder=qwen_vl_text(3), tokenizer=qwen_tokenizer(),
        text_encoder_2=t5_text(), tokenizer_2=transformers.ByT5Tokenizer(), scheduler=flow(shift=5.0),
        guider=AdaptiveProjectedMixGuidance(), ocr_guider=AdaptiveProjectedMixGuidance(),
    )  # fmt: skip
    pipe.tokenizer_max_length = 256  # 1000 take long
    return pipe


def _bria() -> Any:
    transformer = diffusers.BriaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=WIDTH, axes_dims_rope=[4, 6, 6],
    )  # fmt: skip
    kind: Any = diffusers.BriaPipeline
    return kind(
        transformer=transformer, vae=kl_vae(shifted=True), text_encoder=t5_text(), tokenizer=t5_tokenizer(),
        scheduler=flow(use_dynamic_shifting=True),
    )  # fmt: skip


def _hunyuan_dit() -> Any:
    transformer = diffusers.HunyuanDiT2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=SIDE // 8,
        hidden_size=64, num_layers=4, mlp_ratio=2.0, cross_attention_dim=WIDTH, cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=WIDTH,
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.018, prediction_type="v_prediction"
    )
    kind: Any = diffusers.HunyuanDiTPipeline
    return kind(
        transformer=transformer, vae=kl_vae(4, 4), text_encoder=bert_text(), tokenizer=bert_tokenizer(),
        text_encoder_2=t5_text(), tokenizer_2=t5_tokenizer(), scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


MORE: dict[str, Callable[[], Any]] = {
    "cogview-4": _cogview_4,
    "wan": _wan,
    "hunyuan-image": _hunyuan_image,
    "bria": _bria,
    "hunyuan-dit": _hunyuan_dit,
}
