"""LoRA names that families share: diffusers' and peft's dotted prefixes, and kohya's flattened ones."""

from __future__ import annotations

from mm.families.family import LoraNames

_TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")


def unet_names(texts: int = 1, converter: str | None = "StableDiffusionLoraLoaderMixin") -> LoraNames:
    """Names of a family with a UNet and so many text encoders."""
    return _names("unet", ("unet", "diffusion_model"), ("lora_unet_",), texts, converter)


def transformer_names(texts: int = 1, converter: str | None = None) -> LoraNames:
    """Names of a family with a transformer and so many text encoders; trainers call the transformer by many names."""
    aliases = ("transformer", "diffusion_model", "model.diffusion_model", "unet")
    return _names("transformer", aliases, ("lora_unet_", "lora_transformer_"), texts, converter)


def _names(part: str, aliases: tuple[str, ...], kohya: tuple[str, ...], texts: int, converter: str | None) -> LoraNames:
    encoders = _TEXT[:texts]
    flat = {f"lora_te{number}_": name for number, name in enumerate(encoders, 1)}
    first = {"lora_te_": encoders[0]} if encoders else {}
    return LoraNames(
        components=dict.fromkeys(aliases, part) | {name: name for name in encoders},
        kohya=dict.fromkeys(kohya, part) | first | flat,
        converter=converter,
    )
