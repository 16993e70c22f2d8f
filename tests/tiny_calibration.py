"""Tiny random whole pipelines of diffusers' real classes, to calibrate with; tokenizers are made on the spot."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,<>|'"


def clip_tokenizer() -> Any:
    """Letters as tokens."""
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    made = transformers.CLIPTokenizer(vocab={word: k for k, word in enumerate(words)}, merges=[])
    made.model_max_length = 77
    return made


def t5_tokenizer() -> Any:
    return transformers.T5Tokenizer(vocab=[(f"\u2581{x}", -1.0) for x in LETTERS] + [(x, -2.0) for x in LETTERS])


def gemma_tokenizer() -> Any:
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *LETTERS]
    made = transformers.GemmaTokenizer(vocab={word: k for k, word in enumerate(words)}, merges=[])
    made.padding_side = "right"
    return made


def clip_text(projection: bool = False, width: int = 32) -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, vocab_size=200,
        projection_dim=width, bos_token_id=84, eos_token_id=85, pad_token_id=85,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config).eval()


def t5_text(width: int = 32) -> Any:
    config = transformers.T5Config(d_model=width, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=200)
    return transformers.T5EncoderModel(config).eval()


def vae(channels: int = 4, kind: type = diffusers.AutoencoderKL, blocks: int = 2) -> Any:
    widths = (8, 16, 16, 16)[:blocks]
    return kind(
        block_out_channels=widths, in_channels=3, out_channels=3, latent_channels=channels, norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * blocks, up_block_types=["UpDecoderBlock2D"] * blocks,
        use_quant_conv=channels == 4, use_post_quant_conv=channels == 4, shift_factor=0.0 if channels != 4 else None,
    )  # fmt: skip


def unet(cross: int, sdxl: bool, channels: int = 4, width: int = 32) -> Any:
    extra: dict[str, Any] = {}
    if sdxl:
        extra = {
            "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "transformer_layers_per_block": (1, 2),
            "projection_class_embeddings_input_dim": 8 * 6 + cross // 2,
        }  # fmt: skip
    return diffusers.UNet2DConditionModel(
        block_out_channels=(width, 2 * width), layers_per_block=2, sample_size=32, in_channels=channels,
        out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4), use_linear_projection=True,
        cross_attention_dim=cross, **extra,
    )  # fmt: skip


def _euler() -> Any:
    return diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl(seed: int = 0, width: int = 32) -> Any:
    torch.manual_seed(seed)
    return quiet(
        diffusers.StableDiffusionXLPipeline(
            vae=vae(), text_encoder=clip_text(), text_encoder_2=clip_text(True), tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(), unet=unet(64, True, width=width), scheduler=_euler(),
            force_zeros_for_empty_prompt=True, add_watermarker=False,
        )
    )  # fmt: skip


def sana_transformer(width: int = 64, layers: int = 1, guidance: bool = False) -> Any:
    extra: dict[str, Any] = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"} if guidance else {}
    return diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=layers, attention_head_dim=16,
        num_attention_heads=width // 16, num_cross_attention_heads=width // 16, cross_attention_head_dim=16,
        cross_attention_dim=width, caption_channels=32, sample_size=32, **extra,
    )  # fmt: skip


def sana_sprint(seed: int = 0, width: int = 64, layers: int = 2) -> Any:
    torch.manual_seed(seed)
    gemma = transformers.Gemma2Model(
        transformers.Gemma2Config(
            head_dim=16, hidden_size=32, initializer_range=0.02, intermediate_size=64, max_position_embeddings=8192,
            num_attention_heads=2, num_hidden_layers=1, num_key_value_heads=2, vocab_size=200,
        )
    ).eval()  # fmt: skip
    dc = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1],
        downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
        decoder_act_fns="silu", scaling_factor=0.41407,
    )  # fmt: skip
    return quiet(
        diffusers.SanaSprintPipeline(
            tokenizer=gemma_tokenizer(), text_encoder=gemma, vae=dc,
            transformer=sana_transformer(width, layers, True), scheduler=diffusers.SCMScheduler(),
        )
    )  # fmt: skip


def sd(kind: str = "StableDiffusionImg2ImgPipeline", seed: int = 0) -> Any:
    """Stable Diffusion in one of its pipelines: image to image, inpainting, ControlNet."""
    torch.manual_seed(seed)
    parts: dict[str, Any] = {
        "vae": vae(), "text_encoder": clip_text(width=64), "tokenizer": clip_tokenizer(), "scheduler": _euler(),
        "unet": unet(64, False, 9 if "Inpaint" in kind else 4), "safety_checker": None, "feature_extractor": None,
    }  # fmt: skip
    if "ControlNet" in kind:
        parts["controlnet"] = diffusers.ControlNetModel.from_unet(
            parts["unet"], conditioning_embedding_out_channels=(8, 8)
        )
    return quiet(getattr(diffusers, kind)(**parts, requires_safety_checker=False))


def kontext(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[8, 8, 16], guidance_embeds=True,
    )  # fmt: skip
    return quiet(
        diffusers.FluxKontextPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae(16), text_encoder=clip_text(),
            tokenizer=clip_tokenizer(), text_encoder_2=t5_text(), tokenizer_2=t5_tokenizer(), transformer=transformer,
        )
    )  # fmt: skip


def ltx(seed: int = 0) -> Any:
    """Text to video."""
    torch.manual_seed(seed)
    coder = diffusers.AutoencoderKLLTXVideo(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1), spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False), decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4, upsample_factor=(1, 1, 1, 1), timestep_conditioning=False, patch_size=1,
        patch_size_t=1, encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    coder.use_framewise_encoding = coder.use_framewise_decoding = False
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4, attention_head_dim=16,
        cross_attention_dim=64, num_layers=1, caption_channels=32,
    )  # fmt: skip
    return quiet(
        diffusers.LTXPipeline(
            transformer=transformer, vae=coder, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            text_encoder=t5_text(), tokenizer=t5_tokenizer(),
        )
    )  # fmt: skip
