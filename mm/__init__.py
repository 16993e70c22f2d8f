"""mm draws from text; its models can be erased, customized and squeezed, and still work.

Design choices:
- Public names are loaded on first use: `import mm` costs milliseconds and no torch.
- The torchvision hook goes in first, since a later import of transformers or peft may need it.
- Quantization methods are entered into diffusers' and transformers' tables when those come up, not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mm._hooks import after_import
from mm._lazy import loader
from mm._torchvision import install

if TYPE_CHECKING:
    from mm.pipelines.image_edit import ImageEditPipeline
    from mm.pipelines.interleaved import InterleavedPipeline
    from mm.pipelines.text_to_image import TextToImagePipeline
    from mm.pipelines.understanding import UnderstandingPipeline
    from mm.quantization.config import SVDQuantConfig
    from mm.quantization.nunchaku import load_nunchaku, read_nunchaku
    from mm.quantization.quantize import quantize

install()


def _open_clip_is_there() -> None:
    from mm.models.open_clip_plugin import register

    register()


def _diffusers_is_there() -> None:
    from mm.quantization.diffusers_plugin import register

    register()


def _transformers_is_there() -> None:
    from mm.quantization.transformers_plugin import register

    register()


after_import("open_clip.factory", _open_clip_is_there)
after_import("diffusers.quantizers.auto", _diffusers_is_there)
after_import("transformers.quantizers.auto", _transformers_is_there)

__version__ = "0.1.0"
__all__ = [
    "ImageEditPipeline",
    "InterleavedPipeline",
    "SVDQuantConfig",
    "TextToImagePipeline",
    "UnderstandingPipeline",
    "__version__",
    "load_nunchaku",
    "quantize",
    "read_nunchaku",
]
__getattr__ = loader(
    "mm",
    {
        "ImageEditPipeline": "pipelines.image_edit",
        "InterleavedPipeline": "pipelines.interleaved",
        "SVDQuantConfig": "quantization.config",
        "TextToImagePipeline": "pipelines.text_to_image",
        "UnderstandingPipeline": "pipelines.understanding",
        "load_nunchaku": "quantization.nunchaku",
        "quantize": "quantization.quantize",
        "read_nunchaku": "quantization.nunchaku",
    },
)
