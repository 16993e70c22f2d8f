"""`from_pretrained` of diffusers' nunchaku_lite folders on machines that diffusers' own quantizer refuses.

Design choices
- Where that one runs (a recent consumer GPU and its kernels), it does; elsewhere, CPUs and Hopper among it, the same
  call gives branched layers instead of an error. Importing mm is all it takes.
- Packed tensors are loaded by diffusers into stand-ins, and turned into layers afterwards. What is missing in the
  folder, or there without a place, is named.
- A model read so is one of mm's: saved, it is an SVDQuant folder.
- What the packed tensors mean is in `nunchaku_layer`.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.nunchaku import NunchakuLiteQuantizer
from torch import Tensor, nn

from mm.core.errors import UserError
from mm.core.model_files import check_loaded
from mm.core.nouns import with_article
from mm.layers.linear import ActivationRule
from mm.layers.surgery import swap
from mm.quantization.config import SVDQuantConfig
from mm.quantization.integrations import nunchaku_layer as layer
from mm.quantization.integrations.diffusers_quantizer import DiffusersSVDQuant
from mm.quantization.layout import record


def quantizer(quantization_config: Any, **kwargs: Any) -> DiffusersQuantizer:
    """diffusers' own quantizer where it runs, ours where it does not."""
    theirs = NunchakuLiteQuantizer(quantization_config, **kwargs)
    try:
        theirs.validate_environment()
    except (ImportError, ValueError):
        return DiffusersNunchakuLite(quantization_config)
    return theirs


class _Packed(nn.Module):
    """Takes the place of a linear layer and holds its packed tensors."""

    def __init__(self, linear: nn.Linear, tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.types = {name: dtype for name, (_, dtype) in tensors.items()}
        for name, (shape, dtype) in tensors.items():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def check(self, path: str) -> None:
        """Raises UserError where a loaded tensor has another type than its place, which diffusers lets pass."""
        for name, tensor in self._parameters.items():
            if tensor is not None and tensor.dtype != self.types[name]:
                raise UserError(f"{path}.{name} of the folder is of type {tensor.dtype}, not {self.types[name]}")

    def read(self) -> layer.Piece:
        names = set(self._parameters)

        def get(name: str) -> Tensor:
            return getattr(self, name)

        if "wzeros" in names:
            return layer.read_awq(get, names, self.out_features, self.in_features, splits=1)
        return layer.read_w4a4(get, names, self.out_features, self.in_features, after_gelu=False)


class DiffusersNunchakuLite(DiffusersSVDQuant):
    """What diffusers asks while it loads such a folder."""

    def __init__(self, quantization_config: Any) -> None:
        self.quantization_config = quantization_config
        self.modules_to_not_convert = []
        self.pre_quantized, self.on_disk = True, False
        self.dtype: torch.dtype = quantization_config.compute_dtype
        if not self.dtype.is_floating_point:
            raise UserError(f"compute_dtype of the nunchaku_lite folder is {self.dtype}; a floating type is needed")
        self.loaded: list[str] = []

    def update_torch_dtype(self, torch_dtype: Any) -> Any:
        if torch_dtype is not None:
            self.dtype = torch_dtype
        return self.dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Any) -> list[str]:
        self.loaded = list(loaded_keys)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for section in ("svdq_w4a4", "awq_w4a16"):
            settings = getattr(self.quantization_config, section) or {"targets": []}
            for path in settings["targets"]:
                swap(model, path, self._stand_in(model, path, settings, awq=section == "awq_w4a16"))
        wanted, given = set(model.state_dict()), set(self.loaded)
        bad = [f"{key} is not in the folder" for key in sorted(wanted - given)]
        bad += [f"{key} (no such tensor in this model)" for key in sorted(given - wanted)]
        if bad:
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            raise UserError(f"the nunchaku_lite folder does not fit {type(model).__name__}: {'; '.join(bad[:3])}{more}")
        return model

    def _stand_in(self, model: Any, path: str, settings: dict[str, Any], *, awq: bool) -> _Packed:
        try:
            linear = model.get_submodule(path)
        except AttributeError as error:
            raise UserError(f"the folder quantizes {path}, which {type(model).__name__} does not have") from error
        if not isinstance(linear, nn.Linear):
            raise UserError(f"the folder quantizes {path}, which is {with_article(type(linear).__name__)} here")
        outputs, inputs = linear.out_features, linear.in_features
        fp4 = settings["precision"] == "nvfp4"
        if awq:
            shapes = layer.awq_shapes(outputs, inputs)
        else:
            shapes = layer.w4a4_shapes(outputs, inputs, rank=settings["rank"], fp4=fp4)
        left_out = set() if linear.bias is not None else {"bias"}
        left_out |= set() if fp4 else {"wcscales", "wtscale"}
        types: dict[str, torch.dtype] = {"qweight": torch.int32 if awq else torch.int8}
        types |= {"wscales": torch.float8_e4m3fn} if fp4 else {}
        return _Packed(linear, {n: (s, types.get(n, self.dtype)) for n, s in shapes.items() if n not in left_out})

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        check_loaded(model, f"the nunchaku_lite {type(model).__name__}")
        packed = [(path, module) for path, module in model.named_modules() if isinstance(module, _Packed)]
        with torch.no_grad():
            for path, module in packed:
                module.check(path)
                piece = module.read()
                weight_only = piece.bits == 8 or "wzeros" in module._parameters
                rule = ActivationRule(bits=16) if weight_only else ActivationRule(bits=4, group=layer.GROUP)
                device = module.get_parameter("qweight").device
                swap(model, path, layer.build(piece, rule, self.dtype, device))
        rank = (self.quantization_config.svdq_w4a4 or {"rank": 0})["rank"]
        record(model, SVDQuantConfig(rank=rank, activation_bits=4), base="")
        self.quantization_config = model.config.quantization_config
        return model
