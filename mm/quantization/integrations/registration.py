"""Enters mm's methods into the tables of diffusers and transformers; called when those are imported."""

from __future__ import annotations

from typing import Any

from mm.quantization.config import SVDQuantConfig
from mm.quantization.layout import add_recorder


def register_diffusers() -> None:
    """Adds "svdquant", and a reader of nunchaku_lite folders where diffusers' own would raise (on CPUs)."""
    from diffusers.quantizers import auto

    from mm.quantization.integrations import diffusers_quantizer

    auto.AUTO_QUANTIZER_MAPPING["nunchaku_lite"] = _nunchaku_lite
    auto.AUTO_QUANTIZER_MAPPING[SVDQuantConfig.METHOD] = diffusers_quantizer.DiffusersSVDQuant
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[SVDQuantConfig.METHOD] = SVDQuantConfig
    add_recorder("diffusers", diffusers_quantizer.record)


def _nunchaku_lite(quantization_config: Any, **kwargs: Any) -> Any:
    from mm.quantization.integrations.nunchaku_lite import quantizer

    return quantizer(quantization_config, **kwargs)


def register_transformers() -> None:
    """Adds "svdquant", for text encoders and language models."""
    from transformers.quantizers import auto

    from mm.quantization.integrations import transformers_quantizer

    if SVDQuantConfig.METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(SVDQuantConfig.METHOD)(transformers_quantizer.TransformersSVDQuant)
    # register_quantization_config takes subclasses of transformers' mixin only; this config is diffusers' as well.
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[SVDQuantConfig.METHOD] = SVDQuantConfig
    add_recorder("transformers", transformers_quantizer.record)
