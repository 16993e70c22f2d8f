"""Tiny random whole pipelines of diffusers' real classes, with text encoders and tokenizers made offline.

Denoisers are 64 wide, so that some of their layers get 4 bits. `tiny_pipeline_of("flux")` gives a pipeline that draws
in two steps within a second; `arguments_of("flux")` what it is called with, a source picture and a mask where the
pipeline needs them, and `options_of("flux")` those arguments that have no name in mm. `PIPELINES` lists the names,
which are those of the families in `mm.families`. The same seed gives the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_inpaint
from PIL import Image
from tiny_more_pipelines import MORE
from tiny_parts import SIDE as SIDE
from tiny_parts import flow, kl_vae, qwen_vae
from tiny_text_encoders import (
    WIDTH,
    clip_text,
    gemma_text,
    mistral_text,
    qwen3_text,
    qwen_vl_text,
    t5_text,
    umt5_text,
)
from tiny_tokenizers import clip_tokenizer, gemma_tokenizer, qwen_processor, qwen_tokenizer, t5_tokenizer
from tiny_watched import NO_ROW, WATCHED

from mm.families.frames import pictures_of


def _unet(cross: int, *, xl: bool) -> Any:
    more: dict[str, Any] = {"addition_embed_type": None}
    if xl:
        more = {
            "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "use_linear_projection": True,
            "projection_class_embeddings_input_dim": WIDTH + 6 * 8,
        }  # fmt: skip
    return diffusers.UNet2DConditionModel(
        block_out_channels=(64, 64), norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=cross, attention_head_dim=8,
        layers_per_block=1, sample_size=SIDE // 4, **more,
    )  # fmt: skip


def _sd() -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=kl_vae(), text_encoder=clip_text(), tokenizer=clip_tokenizer(), unet=_unet(WIDTH, xl=False),
        scheduler=diffusers.DDIMScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def _sdxl() -> Any:
    return diffusers.StableDiffusionXLPipeline(
        vae=kl_vae(), text_encoder=clip_text(), text_encoder_2=clip_text(projection=True), tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(), unet=_unet(2 * WIDTH, xl=True), scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    )  # fmt: skip


def _sd3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIDE // 4, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=8, caption_projection_dim=64, joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH, out_channels=16, pos_embed_max_size=16, qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=flow(), vae=kl_vae(16), text_encoder=clip_text(projection=True),
        tokenizer=clip_tokenizer(), text_encoder_2=clip_text(projection=True), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_text(2 * WIDTH), tokenizer_3=t5_tokenizer(),
    )  # fmt: skip


def _flux_parts(channels: int = 64, out: int | None = None, *, guided: bool = True) -> dict[str, Any]:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=channels, out_channels=out, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8),
        guidance_embeds=guided,
    )  # fmt: skip
    return {
        "transformer": transformer, "vae": kl_vae(16), "text_encoder": clip_text(), "tokenizer": clip_tokenizer(),
        "text_encoder_2": t5_text(), "tokenizer_2": t5_tokenizer(), "scheduler": flow(use_dynamic_shifting=True),
    }  # fmt: skip


def _flux_2_parts(kind: str) -> dict[str, Any]:
    text = mistral_text() if kind == "mistral" else qwen3_text(27, causal=True)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=3 * WIDTH, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=kind == "mistral",
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 16, 16), latent_channels=4, norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    return {
        "transformer": transformer, "vae": vae, "text_encoder": text, "tokenizer": qwen_tokenizer(),
        "scheduler": flow(use_dynamic_shifting=True),
    }  # fmt: skip


def _qwen_parts() -> dict[str, Any]:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return {
        "transformer": transformer, "vae": qwen_vae(), "text_encoder": qwen_vl_text(),
        "tokenizer": qwen_tokenizer(), "scheduler": flow(use_dynamic_shifting=True),
    }  # fmt: skip


def _qwen_edit() -> Any:
    """Sources of this pipeline are brought to a megapixel; here to 32 x 32."""
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_inpaint):
        module.calculate_dimensions = lambda _area, _ratio: (SIDE, SIDE, None)
    return diffusers.QwenImageEditPipeline(**_qwen_parts(), processor=qwen_processor())


def _pixart() -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=SIDE // 4, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=8,
        caption_channels=WIDTH, in_channels=4, cross_attention_dim=64, out_channels=8,
        use_additional_conditions=False,
    )  # fmt: skip
    return diffusers.PixArtSigmaPipeline(
        transformer=transformer, vae=kl_vae(), text_encoder=t5_text(), tokenizer=t5_tokenizer(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )  # fmt: skip


def _sana(kind: type, scheduler: Any, **options: Any) -> Any:
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=8,
        num_cross_attention_heads=8, cross_attention_head_dim=8, cross_attention_dim=64, caption_channels=WIDTH,
        sample_size=SIDE // 2, **options,
    )  # fmt: skip
    vae = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        scaling_factor=0.4,
    )  # fmt: skip
    return kind(
        transformer=transformer, vae=vae, text_encoder=gemma_text(1), tokenizer=gemma_tokenizer(), scheduler=scheduler
    )


def _z_image() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=64, n_layers=1, n_refiner_layers=1, n_heads=4,
        n_kv_heads=4, cap_feat_dim=WIDTH, axes_dims=[8, 4, 4], axes_lens=[1024, 32, 32],
    )  # fmt: skip
    return diffusers.ZImagePipeline(
        transformer=transformer, vae=kl_vae(16), text_encoder=qwen3_text(), tokenizer=qwen_tokenizer(),
        scheduler=flow(use_dynamic_shifting=True),
    )  # fmt: skip


def _chroma() -> Any:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip
    return diffusers.ChromaPipeline(
        transformer=transformer, vae=kl_vae(16), text_encoder=t5_text(), tokenizer=t5_tokenizer(), scheduler=flow()
    )


def _lumina_2() -> Any:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=64, num_layers=1, num_refiner_layers=1,
        num_attention_heads=8, num_kv_heads=2, multiple_of=2, scaling_factor=1.0, axes_dim_rope=(4, 2, 2),
        axes_lens=(512, 32, 32), cap_feat_dim=WIDTH,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(
        transformer=transformer, vae=kl_vae(4, 4, shifted=True), text_encoder=gemma_text(), tokenizer=gemma_tokenizer(),
        scheduler=flow(),
    )  # fmt: skip


def _aura_flow() -> Any:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=SIDE // 4, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=2,
        attention_head_dim=16, num_attention_heads=4, joint_attention_dim=WIDTH, caption_projection_dim=64,
        out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip
    transformer.time_step_proj.linear_2.weight.data *= 10  # open gates: text is a few of 256 tokens, the rest zeros
    return diffusers.AuraFlowPipeline(
        transformer=transformer, vae=kl_vae(), text_encoder=umt5_text(), tokenizer=t5_tokenizer(), scheduler=flow()
    )


PIPELINES: dict[str, Callable[[], Any]] = {
    "stable-diffusion": _sd,
    "stable-diffusion-xl": _sdxl,
    "stable-diffusion-3": _sd3,
    "flux": lambda: diffusers.FluxPipeline(**_flux_parts()),
    "flux-schnell": lambda: diffusers.FluxPipeline(**_flux_parts(guided=False)),
    "flux-kontext": lambda: diffusers.FluxKontextPipeline(**_flux_parts()),
    "flux-fill": lambda: diffusers.FluxFillPipeline(**_flux_parts(3 * 64, 64)),
    "flux-2": lambda: diffusers.Flux2Pipeline(**_flux_2_parts("mistral")),
    "flux-2-klein": lambda: diffusers.Flux2KleinPipeline(**_flux_2_parts("qwen")),
    "qwen-image": lambda: diffusers.QwenImagePipeline(**_qwen_parts()),
    "qwen-image-edit": _qwen_edit,
    "pixart-sigma": _pixart,
    "sana": lambda: _sana(diffusers.SanaPipeline, flow()),
    "sana-sprint": lambda: _sana(diffusers.SanaSprintPipeline, diffusers.SCMScheduler(), guidance_embeds=True,
                                 qk_norm="rms_norm_across_heads"),
    "z-image": _z_image,
    "chroma": _chroma,
    "lumina-2": _lumina_2,
    "aura-flow": _aura_flow,
    **MORE,
    **{name: made for name, made in WATCHED.items() if name not in NO_ROW},
}  # fmt: skip
_EDITS = ("flux-kontext", "flux-fill", "qwen-image-edit")


def tiny_pipeline_of(name: str, *, seed: int = 0) -> Any:
    """A pipeline of the family with random weights; projections that start at zero are filled, so that all matters."""
    torch.manual_seed(seed)
    pipe = (PIPELINES | WATCHED)[name]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
            for parameter in part.parameters():
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.05)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def source_picture(seed: int = 0) -> Image.Image:
    """A picture to edit."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(colours.numpy(), "RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def arguments_of(name: str, **more: Any) -> dict[str, Any]:
    """Keyword arguments of a call in two steps that gives pixels (1, 3, 32, 32) in [0, 1]; `more` wins."""
    made: dict[str, Any] = {
        "prompt": "a red fox", "height": SIDE, "width": SIDE, "num_inference_steps": 2, "output_type": "pt",
        "generator": torch.Generator().manual_seed(7),
    }  # fmt: skip
    if name in _EDITS:
        made["image"] = source_picture()
    if name == "flux-fill":
        made["mask_image"] = Image.new("L", (SIDE, SIDE), 255)
    if name.startswith("qwen-image"):
        made["negative_prompt"] = " "
    if name == "longcat-image":
        made["enable_prompt_rewrite"] = False
    return made | options_of(name) | more


def options_of(name: str) -> dict[str, Any]:
    """Further arguments without which a tiny pipeline draws larger pictures, or refuses its size."""
    made: dict[str, Any] = {}
    if name == "flux-kontext":
        made |= {"_auto_resize": False, "max_area": SIDE * SIDE}
    if name.startswith("sana"):
        made["complex_human_instruction"] = None
    if name.startswith(("sana", "pixart", "hunyuan-dit", "prx")):
        made["use_resolution_binning"] = False
    if name in ("wan", "ltx", "mochi", "cogvideox", "allegro"):
        made["num_frames"] = 1
    if name == "latte":
        made["video_length"] = 1
    return made


def draw_with(name: str, pipe: Any, **more: Any) -> torch.Tensor:
    """The picture (1, 3, 32, 32) of a call with `arguments_of`."""
    return torch.stack([torch.as_tensor(one) for one in pictures_of(pipe(**arguments_of(name, **more)))]).float()
