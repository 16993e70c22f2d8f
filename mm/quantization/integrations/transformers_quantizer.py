"""SVDQuant as one of transformers' quantization methods, for text encoders and language models.

Design choices
- As for diffusers: saved 4-bit layers are loaded as they are, 16-bit models are quantized without data after loading.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from transformers.quantizers.base import HfQuantizer

from mm.core.model_files import check_loaded
from mm.quantization.config import SVDQuantConfig


class TransformersSVDQuant(HfQuantizer):
    """What transformers asks while it loads and saves."""

    requires_calibration = False
    requires_parameters_quantization = False

    def __init__(self, quantization_config: SVDQuantConfig, **kwargs: Any) -> None:
        self.quantization_config: Any = quantization_config
        self.modules_to_not_convert: list[str] = []
        self.on_disk = self.plain = False
        self.pre_quantized = bool(kwargs.pop("pre_quantized", True)) and bool(quantization_config.layers)

    def update_dtype(self, dtype: Any) -> Any:
        """The type that 16-bit tensors get; kept for the empty layers."""
        self.dtype = dtype
        return dtype

    def update_device_map(self, device_map: Any) -> Any:
        """Notes whether parts stay on the disk: their tensors are on the meta device after loading."""
        self.on_disk = isinstance(device_map, dict) and "disk" in device_map.values()
        return device_map

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            from mm.quantization.layout import prepare, quantized
            from mm.quantization.saved_layers import all_plain, check_stored, names_in

            files = kwargs.get("checkpoint_files") or ()
            self.plain = bool(files) and all_plain(self.quantization_config.layers, names_in(files))
            self.pre_quantized = not self.plain
        if self.pre_quantized:
            prepare(model, self.quantization_config.layers, getattr(self, "dtype", None))
            # What is in no file is filled by transformers with memory that nobody wrote; afterwards nothing shows it.
            check_stored(quantized(model), files)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from mm.quantization.layout import align, ready
        from mm.quantization.saved_layers import plain_notice

        if self.pre_quantized:
            if not self.on_disk:
                check_loaded(model, f"the saved {type(model).__name__}")
            ready(model)
            model.mm_base_hash = self.quantization_config.base
        elif self.plain:  # a model made from the config of a quantized one
            align(model)
            del model.config.quantization_config
            warnings.warn(plain_notice(model), stacklevel=2)
        else:
            from mm.quantization.quantize import quantize

            align(model)
            quantize(model, dataclasses.replace(self.quantization_config, data_free=True), progress=False)
            self.quantization_config = model.config.quantization_config
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        from mm.quantization.dequantize import dequantize

        return dequantize(model, dtype)

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def record(model: Any, config: SVDQuantConfig) -> None:
    """Makes a model that was quantized in place save as one that was loaded quantized."""
    model.config.quantization_config = config
    model.hf_quantizer = TransformersSVDQuant(config, pre_quantized=True)
