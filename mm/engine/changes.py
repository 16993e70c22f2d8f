"""Whether an edit changed anything."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

from mm.core.pictures import flattened

_SHARE, _STEP = 0.002, 48  # of the pixels; of 255 in one channel


def unchanged(source: Image.Image, made: Image.Image) -> bool:
    """Whether two pictures show the same.

    A model draws the whole picture again, so that small differences are everywhere. What counts is a patch of 4 x 4
    pixels whose mean colour moved by 48 of 255 or more; where less than .2 % of the picture did, nothing was changed.

    Args:
        source: of any size; its middle is compared where the shapes differ.
        made: the result.
    """
    size = made.size
    before = flattened(source)
    before = before if before.size == size else ImageOps.fit(before, size, Image.Resampling.LANCZOS)
    small = (max(1, size[0] // 4), max(1, size[1] // 4))
    one, other = (np.asarray(p.resize(small, Image.Resampling.BOX)).astype(int) for p in (before, flattened(made)))
    return float((abs(one - other).max(-1) >= _STEP).mean()) < _SHARE
