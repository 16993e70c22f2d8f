"""diffusers-style pipelines.

The code lies in the root folder `pipelines/`, or beside this file in an installed wheel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mm._lazy import adopt, loader

adopt(__path__, "pipelines")

if TYPE_CHECKING:
    from mm.pipelines.text_to_image import TextToImagePipeline

__all__ = ["TextToImagePipeline"]
__getattr__ = loader("mm.pipelines", {"TextToImagePipeline": "text_to_image"})
