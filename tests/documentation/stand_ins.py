"""Small stand-ins for what the pages name: models of the Hugging Face hub, LoRA files, Nunchaku files, photos, jobs.

They are made by the libraries that make the real ones: diffusers and transformers save the models, peft the LoRAs.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from nunchaku_files import flux, published, write
from PIL import Image
from subject_pictures import subject_folder
from tiny_text_encoders import clip_text, t5_text
from tiny_tokenizers import clip_tokenizer, t5_tokenizer
from tiny_unified import save_emu3, save_janus

ROOT = Path(__file__).resolve().parents[2]
FLUX = "black-forest-labs/FLUX.1-schnell"
_COMMIT = "0" * 40


def flux_pipeline() -> Any:
    """FLUX with random weights, of the sizes of the stand-in for Nunchaku's file. 32 x 32 pixels are 8 x 8 latents."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8), latent_channels=1, norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        transformer=flux(), vae=vae, text_encoder=clip_text(width=32), tokenizer=clip_tokenizer(),
        text_encoder_2=t5_text(32), tokenizer_2=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def fill_hub(home: Path) -> Path:
    """A HF_HOME whose cache holds the models that pages load by name."""
    flux_pipeline().save_pretrained(_snapshot(home, FLUX))
    save_janus(_snapshot(home, "deepseek-community/Janus-Pro-1B"))
    save_emu3(_snapshot(home, "BAAI/Emu3-Chat-hf"))
    return home


def _snapshot(home: Path, name: str) -> Path:
    """The folder of a model's files in the layout of huggingface_hub's cache."""
    model = home / "hub" / f"models--{name.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(_COMMIT, encoding="utf-8")
    folder = model / "snapshots" / _COMMIT
    folder.mkdir(parents=True)
    return folder


def write_files(folder: Path) -> Path:
    """Files that pages read, by the names that the pages use."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(("style", "subject", "flux-style")):
        _flux_lora(seed, folder, f"{name}.safetensors")
    write(folder / "svdq-int4_r32-flux.1-schnell.safetensors", *published())
    photo = torch.randint(0, 256, (6, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(photo.numpy()).resize((200, 150)).save(folder / "photo.jpg")
    for name in ("photos", "cat-photos"):
        subject_folder(folder / name, 2)
    shutil.copytree(ROOT / "examples", folder / "examples")
    return folder


def write_mm_tiny_lora(path: Path) -> Path:
    """A LoRA for mm-tiny, in peft's format."""
    import mm

    generator = torch.Generator().manual_seed(0)
    trunk = mm.TextToImagePipeline.from_pretrained("mm-tiny").trunk
    tensors = {}
    for name, layer in trunk.named_modules():
        if name.endswith(("to_k_pic", "to_v_pic")):
            tensors[f"trunk.{name}.lora_A.weight"] = torch.randn(2, layer.in_features, generator=generator) / 16
            tensors[f"trunk.{name}.lora_B.weight"] = torch.randn(layer.out_features, 2, generator=generator) / 16
    from safetensors.torch import save_file

    save_file(tensors, path)
    return path


def _flux_lora(seed: int, folder: Path, name: str) -> None:
    """peft makes the adapter on diffusers' transformer; the pipeline class writes its file."""
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(seed)
    transformer: Any = flux()
    transformer.add_adapter(
        LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    )
    layers = get_peft_model_state_dict(transformer)
    diffusers.FluxPipeline.save_lora_weights(folder, transformer_lora_layers=layers, weight_name=name)
