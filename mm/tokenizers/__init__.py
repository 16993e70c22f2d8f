"""Vision tokenizers behind one protocol: pictures to latents or codes, and back.

The code lies in the root folder `tokenizers/`, or beside this file in an installed wheel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mm.core.lazy import adopt, loader

adopt(__path__, "tokenizers")

if TYPE_CHECKING:
    from mm.tokenizers.autoencoder import Autoencoder
    from mm.tokenizers.bridge import Bridge
    from mm.tokenizers.protocol import VisionTokenizer

__all__ = ["VisionTokenizer", "Autoencoder", "Bridge"]
__getattr__ = loader("mm.tokenizers", {"VisionTokenizer": "protocol", "Autoencoder": "autoencoder", "Bridge": "bridge"})
