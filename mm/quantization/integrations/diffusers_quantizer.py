"""SVDQuant as one of diffusers' quantization methods: `quantization_config=mm.SVDQuantConfig(...)`.

Design choices
- A folder that holds 4-bit layers is loaded as it is; a 16-bit one is quantized after loading, layer by layer and
  without data: loading has no prompts. For the full search call `mm.quantize` and save.
- diffusers' `from_config` copies the settings of a quantized model into one with plain weights. Its folder is loaded at
  16 bits with a warning, and the settings are removed.
- Registered in diffusers' own tables when diffusers is imported (`mm.core.import_hooks`): `import mm` is enough.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.base import DiffusersQuantizer

from mm.core.model_files import check_loaded
from mm.quantization.config import SVDQuantConfig


class DiffusersSVDQuant(DiffusersQuantizer):
    """What diffusers asks while it loads and saves."""

    requires_calibration = False
    required_packages = ()

    def __init__(self, quantization_config: SVDQuantConfig, **kwargs: Any) -> None:
        self.quantization_config: Any = quantization_config
        self.modules_to_not_convert: list[str] = []
        self.on_disk = self.plain = False
        self.pre_quantized = bool(kwargs.pop("pre_quantized", True)) and bool(quantization_config.layers)

    def update_torch_dtype(self, torch_dtype: Any) -> Any:
        """The type that 16-bit tensors get; kept for the empty layers."""
        self.dtype = torch_dtype
        return torch_dtype

    def update_device_map(self, device_map: Any) -> Any:
        """Notes whether parts stay on the disk: their tensors are on the meta device after loading."""
        self.on_disk = isinstance(device_map, dict) and "disk" in device_map.values()
        return device_map

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Sees the names of the stored tensors: where all layers have plain weights, nothing is prepared."""
        if self.pre_quantized:
            from mm.quantization.saved_layers import all_plain

            self.plain = all_plain(self.quantization_config.layers, frozenset(loaded_keys))
            self.pre_quantized = not self.plain
        return loaded_keys

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            from mm.quantization.layout import prepare

            prepare(model, self.quantization_config.layers, getattr(self, "dtype", None))
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from mm.quantization.layout import align, ready
        from mm.quantization.saved_layers import plain_notice

        if self.pre_quantized:
            if not self.on_disk:
                check_loaded(model, f"the saved {type(model).__name__}")
            ready(model)
            model.mm_base_hash = self.quantization_config.base
        elif self.plain:
            align(model)
            unmark(model)
            warnings.warn(plain_notice(model), stacklevel=2)
        else:
            from mm.quantization.quantize import quantize

            if not self.on_disk:
                check_loaded(model, f"the saved {type(model).__name__}")
            align(model)
            quantize(model, dataclasses.replace(self.quantization_config, data_free=True), progress=False)
            self.quantization_config = model.config.quantization_config
        return model

    def _dequantize(self, model: Any) -> Any:
        from mm.quantization.dequantize import dequantize

        dequantize(model)
        unmark(model)
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # branches and adapters are; integers are not

    @property
    def is_compileable(self) -> bool:
        return True


def record(model: Any, config: SVDQuantConfig) -> None:
    """Makes a model that was quantized in place save as one that was loaded quantized."""
    model.register_to_config(quantization_config=config)
    model.hf_quantizer = DiffusersSVDQuant(config, pre_quantized=True)


def unmark(model: Any) -> None:
    """Takes the quantization settings out of a model's config, so that it saves as a plain one."""
    model._internal_dict = FrozenDict({k: v for k, v in model.config.items() if k != "quantization_config"})
