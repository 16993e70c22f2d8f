"""Tiny random whole pipelines of families that mm learns on by watching their calls; as those of tiny_pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import transformers
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit
from tiny_parts import SIDE, flow, kl_vae
from tiny_text_encoders import WIDTH, clip_text, gemma_text, qwen3_text, qwen_vl_text, t5_text
from tiny_tokenizers import clip_tokenizer, gemma_tokenizer, qwen_processor, qwen_tokenizer, t5_tokenizer

HEADS: dict[str, Any] = {"attention_head_dim": 16, "num_attention_heads": 4}


def _longcat() -> Any:
    """Sources of its editing pipeline are brought to a megapixel; here to 32 x 32."""
    pipeline_longcat_image_edit.calculate_dimensions = lambda _area, _ratio: (SIDE, SIDE)
    transformer = diffusers.LongCatImageTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH,
        axes_dims_rope=[4, 4, 8], **HEADS,
    )  # fmt: skip
    return diffusers.LongCatImagePipeline(
        transformer=transformer, vae=kl_vae(16), text_encoder=qwen_vl_text(), tokenizer=qwen_tokenizer(),
        text_processor=qwen_processor(), scheduler=flow(use_dynamic_shifting=True),
    )  # fmt: skip


def _ovis() -> Any:
    transformer = diffusers.OvisImageTransformer2DModel(
        in_channels=64, out_channels=64, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8), **HEADS,
    )  # fmt: skip
    return diffusers.OvisImagePipeline(
        transformer=transformer, vae=kl_vae(16), text_encoder=qwen3_text(), tokenizer=qwen_tokenizer(),
        scheduler=flow(use_dynamic_shifting=True),
    )  # fmt: skip


def _cogview_3() -> Any:
    transformer = diffusers.CogView3PlusTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, text_embed_dim=WIDTH, time_embed_dim=16,
        condition_dim=8, pos_embed_max_size=16, sample_size=SIDE // 4, **HEADS,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    return diffusers.CogView3PlusPipeline(
        transformer=transformer, vae=kl_vae(), text_encoder=t5_text(), tokenizer=t5_tokenizer(), scheduler=scheduler
    )


def _lumina_next() -> Any:
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=SIDE // 4, patch_size=2, in_channels=4, hidden_size=64, num_layers=2, num_attention_heads=4,
        num_kv_heads=2, multiple_of=16, cross_attention_dim=WIDTH,
    )  # fmt: skip
    tokenizer = gemma_tokenizer()
    tokenizer.add_bos_token = True  # so that an empty prompt has a token
    tokenizer.update_post_processor()
    return diffusers.LuminaPipeline(
        transformer=transformer, vae=kl_vae(4, 4), text_encoder=gemma_text(), tokenizer=tokenizer, scheduler=flow()
    )


def _prx() -> Any:
    transformer = diffusers.PRXTransformer2DModel(
        in_channels=16, patch_size=2, context_in_dim=WIDTH, hidden_size=64, mlp_ratio=2.0, num_heads=4, depth=2,
        axes_dim=[8, 8],
    )  # fmt: skip
    return diffusers.PRXPipeline(
        transformer=transformer, scheduler=flow(shift=3.0), text_encoder=gemma_text(), tokenizer=gemma_tokenizer(),
        vae=kl_vae(16), default_sample_size=SIDE,
    )  # fmt: skip


def _hidream() -> Any:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=16, num_layers=1, num_single_layers=1,
        caption_channels=(WIDTH, WIDTH), text_emb_dim=2 * WIDTH, num_routed_experts=2, num_activated_experts=1,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(32, 32), llama_layers=(0, 1), **HEADS,
    )  # fmt: skip
    config = transformers.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=600,
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )  # fmt: skip
    pipe = diffusers.HiDreamImagePipeline(
        transformer=transformer, scheduler=scheduler, vae=kl_vae(16),
        text_encoder=clip_text(projection=True, tokens=248), tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(projection=True, tokens=248), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_text(), tokenizer_3=t5_tokenizer(),
        text_encoder_4=transformers.LlamaForCausalLM(config).eval(), tokenizer_4=qwen_tokenizer(),
    )  # fmt: skip
    pipe.default_sample_size = SIDE // 4  # a side that it draws all pictures at
    return pipe


def _omnigen() -> Any:
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
    transformer = diffusers.OmniGenTransformer2DModel(
        in_channels=4, patch_size=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=128, num_layers=2, pad_token_id=0, vocab_size=600, max_position_embeddings=4096,
        original_max_position_embeddings=4096, rope_scaling=factors, pos_embed_max_size=16, time_step_dim=16,
    )  # fmt: skip
    return diffusers.OmniGenPipeline(
        transformer=transformer,
        scheduler=flow(invert_sigmas=True, num_train_timesteps=1),
        vae=kl_vae(4, 4),
        tokenizer=qwen_tokenizer(),
    )


def _kandinsky_3() -> Any:
    unet = diffusers.Kandinsky3UNet(
        in_channels=4, time_embedding_dim=64, groups=8, attention_head_dim=16, layers_per_block=3,
        block_out_channels=(32, 64), cross_attention_dim=64, encoder_hid_dim=WIDTH,
    )  # fmt: skip
    return diffusers.Kandinsky3Pipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5_text(), unet=unet, scheduler=diffusers.DDPMScheduler(), movq=_movq(3)
    )


def kandinsky_2() -> Any:
    """Kandinsky 2.2 with its prior, which draws at multiples of 64 pixels."""
    unet = diffusers.UNet2DConditionModel(
        in_channels=4, out_channels=8, addition_embed_type="image", mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), layers_per_block=1,
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), block_out_channels=(64, 64),
        encoder_hid_dim=WIDTH, encoder_hid_dim_type="image_proj", cross_attention_dim=64, attention_head_dim=8,
        resnet_time_scale_shift="scale_shift", norm_num_groups=8,
    )  # fmt: skip
    sight = transformers.CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32,
        patch_size=8, projection_dim=WIDTH,
    )  # fmt: skip
    prior = diffusers.PriorTransformer(num_attention_heads=2, attention_head_dim=12, embedding_dim=WIDTH, num_layers=1)
    prior.clip_std.data.fill_(1.0)  # at zero all prompts would be one picture
    pipe = diffusers.KandinskyV22CombinedPipeline(
        unet=unet, scheduler=diffusers.DDPMScheduler(variance_type="learned_range"), movq=_movq(4),
        prior_prior=prior,
        prior_image_encoder=transformers.CLIPVisionModelWithProjection(sight).eval(),
        prior_text_encoder=clip_text(projection=True), prior_tokenizer=clip_tokenizer(),
        prior_scheduler=diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample_range=10.0),
        prior_image_processor=transformers.CLIPImageProcessor(crop_size=32, size=32),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _movq(blocks: int) -> Any:
    return diffusers.VQModel(
        block_out_channels=(8, 8, 16, 16)[-blocks:], latent_channels=4, norm_num_groups=4, layers_per_block=1,
        num_vq_embeddings=32, vq_embed_dim=4, down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
    )  # fmt: skip


def _kandinsky_5() -> Any:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=16, in_text_dim=WIDTH, in_text_dim2=WIDTH, time_dim=16, out_visual_dim=16, patch_size=(1, 2, 2),
        model_dim=64, ff_dim=128, num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 4, 8),
    )  # fmt: skip
    pipe = diffusers.Kandinsky5T2IPipeline(
        transformer=transformer, vae=kl_vae(16, 4), text_encoder=qwen_vl_text(), tokenizer=qwen_processor(),
        text_encoder_2=clip_text(), tokenizer_2=clip_tokenizer(), scheduler=flow(shift=3.0),
    )  # fmt: skip
    pipe.resolutions = [(SIDE, SIDE)]  # all that it draws
    return pipe


def _latte() -> Any:
    transformer = diffusers.LatteTransformer3DModel(
        in_channels=4, out_channels=8, num_layers=2, patch_size=2, cross_attention_dim=64, sample_size=SIDE // 4,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, caption_channels=WIDTH, video_length=1, attention_bias=True, **HEADS,
    )  # fmt: skip
    return diffusers.LattePipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5_text(), vae=kl_vae(), transformer=transformer,
        scheduler=diffusers.DDIMScheduler(),
    )  # fmt: skip


def _ltx() -> Any:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, cross_attention_dim=64, num_layers=2, caption_channels=WIDTH, **HEADS,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1), patch_size=1,
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
    )  # fmt: skip
    return diffusers.LTXPipeline(
        transformer=transformer, vae=vae, text_encoder=t5_text(), tokenizer=t5_tokenizer(),
        scheduler=flow(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05),
    )  # fmt: skip


def _mochi() -> Any:
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2, num_layers=2, pooled_projection_dim=16, in_channels=12, text_embed_dim=WIDTH, time_embed_dim=16,
        max_sequence_length=256, **HEADS,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12, out_channels=3, encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32), layers_per_block=(1, 1, 1, 1, 1), latents_mean=[0.1] * 12,
        latents_std=[0.8] * 12,
    )  # fmt: skip
    return diffusers.MochiPipeline(
        transformer=transformer, vae=vae, text_encoder=t5_text(), tokenizer=t5_tokenizer(),
        scheduler=flow(invert_sigmas=True),
    )  # fmt: skip


def _cogvideox() -> Any:
    transformer = diffusers.CogVideoXTransformer3DModel(
        in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=WIDTH, num_layers=2, sample_width=8,
        sample_height=8, sample_frames=1, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=226, **HEADS,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4,
    )  # fmt: skip
    return diffusers.CogVideoXPipeline(
        transformer=transformer, vae=vae, text_encoder=t5_text(), tokenizer=t5_tokenizer(),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0),
    )  # fmt: skip


# Without a row in the matrix: HiDream and Kandinsky 5 draw at sizes of their own; Latte reads a prompt otherwise in a
# call of several; an erasure of OmniGen is not seen in the pictures of a model as small as this.
NO_ROW = ("hidream", "kandinsky-5", "latte", "omnigen")
WATCHED: dict[str, Callable[[], Any]] = {
    "longcat-image": _longcat,
    "ovis-image": _ovis,
    "cogview-3-plus": _cogview_3,
    "lumina-next": _lumina_next,
    "prx": _prx,
    "hidream": _hidream,
    "omnigen": _omnigen,
    "kandinsky-3": _kandinsky_3,
    "kandinsky-5": _kandinsky_5,
    "latte": _latte,
    "ltx": _ltx,
    "mochi": _mochi,
    "cogvideox": _cogvideox,
}
