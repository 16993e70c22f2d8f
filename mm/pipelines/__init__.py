"""diffusers-style pipelines.

The code lies in the root folder `pipelines/`, or beside this file in an installed wheel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mm.core.lazy import adopt, loader

adopt(__path__, "pipelines")

if TYPE_CHECKING:
    from mm.pipelines.image_edit import ImageEditPipeline
    from mm.pipelines.interleaved import InterleavedPipeline
    from mm.pipelines.text_to_image import TextToImagePipeline
    from mm.pipelines.understanding import UnderstandingPipeline

__all__ = ["ImageEditPipeline", "InterleavedPipeline", "TextToImagePipeline", "UnderstandingPipeline"]
__getattr__ = loader(
    "mm.pipelines",
    {
        "ImageEditPipeline": "image_edit",
        "InterleavedPipeline": "interleaved",
        "TextToImagePipeline": "text_to_image",
        "UnderstandingPipeline": "understanding",
    },
)
