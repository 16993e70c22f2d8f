"""mm draws from text; its models can be erased, customized and squeezed, and still work.

Design choices:
- Public names are loaded on first use (PEP 562): `import mm` costs milliseconds and no torch.
- The torchvision hook goes in first, since a later import of transformers or peft may already need it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from mm._torchvision import install

if TYPE_CHECKING:
    from mm.pipelines.text_to_image import TextToImagePipeline as TextToImagePipeline

install()

__version__ = "0.1.0"

# public name -> module that defines it
_PUBLIC = {"TextToImagePipeline": "mm.pipelines.text_to_image"}

__all__ = ["TextToImagePipeline", "__version__"]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mm' has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
