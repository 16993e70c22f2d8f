"""mm draws from text; its models can be erased, customized and squeezed, and still work.

Design choices:
- Public names are loaded on first use: `import mm` costs milliseconds and no torch.
- The torchvision hook goes in first, since a later import of transformers or peft may need it.
- Quantization methods are entered into diffusers' and transformers' tables when those come up, not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mm.adapters.registration import register as register_adapters
from mm.core.import_hooks import after_import
from mm.core.lazy import loader
from mm.core.torchvision_schemas import install
from mm.version import __version__ as __version__

if TYPE_CHECKING:
    from mm.adapters.formats.reader import read_lora
    from mm.adapters.formats.writer import write_lora
    from mm.adapters.patch import Patch
    from mm.customization.apart import draw_apart
    from mm.customization.customize import customize
    from mm.customization.merging.merge import merge
    from mm.customization.sliders import SliderPrompts
    from mm.engine.loading import load
    from mm.erasure.erase import erase
    from mm.pipelines.image_edit import ImageEditPipeline
    from mm.pipelines.interleaved import InterleavedPipeline
    from mm.pipelines.text_to_image import TextToImagePipeline
    from mm.pipelines.understanding import UnderstandingPipeline
    from mm.quantization.config import SVDQuantConfig
    from mm.quantization.integrations.nunchaku import load_nunchaku, read_nunchaku
    from mm.quantization.quantize import quantize

install()


def _open_clip_is_there() -> None:
    from mm.models.open_clip_registration import register

    register()


def _diffusers_is_named() -> None:
    from mm.pipelines.registration import register

    register()


def _diffusers_is_there() -> None:
    from mm.quantization.integrations.registration import register_diffusers

    register_diffusers()


def _transformers_is_there() -> None:
    from mm.quantization.integrations.registration import register_transformers

    register_transformers()


after_import("open_clip.factory", _open_clip_is_there)
after_import("diffusers", _diffusers_is_named)
after_import("diffusers.quantizers.auto", _diffusers_is_there)
after_import("transformers.quantizers.auto", _transformers_is_there)
register_adapters()

__all__ = [
    "ImageEditPipeline",
    "InterleavedPipeline",
    "Patch",
    "SVDQuantConfig",
    "SliderPrompts",
    "TextToImagePipeline",
    "UnderstandingPipeline",
    "__version__",
    "customize",
    "draw_apart",
    "erase",
    "load",
    "load_nunchaku",
    "merge",
    "quantize",
    "read_lora",
    "read_nunchaku",
    "write_lora",
]
__getattr__ = loader(
    "mm",
    {
        "ImageEditPipeline": "pipelines.image_edit",
        "InterleavedPipeline": "pipelines.interleaved",
        "Patch": "adapters.patch",
        "SVDQuantConfig": "quantization.config",
        "SliderPrompts": "customization.sliders",
        "TextToImagePipeline": "pipelines.text_to_image",
        "UnderstandingPipeline": "pipelines.understanding",
        "customize": "customization.customize",
        "draw_apart": "customization.apart",
        "erase": "erasure.erase",
        "load": "engine.loading",
        "load_nunchaku": "quantization.integrations.nunchaku",
        "merge": "customization.merging.merge",
        "quantize": "quantization.quantize",
        "read_lora": "adapters.formats.reader",
        "read_nunchaku": "quantization.integrations.nunchaku",
        "write_lora": "adapters.formats.writer",
    },
)
