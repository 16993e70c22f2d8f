"""Tiny random denoisers of diffusers' real classes, with the inputs of one call.

`TINY["FluxTransformer2DModel"]()` gives (model, inputs), and `model(**inputs)` runs. Weights are seeded, and those that
start at zero are filled. Text has `WORDS` tokens everywhere, which no picture here has. Builders lie by kind in
`tiny_joint_attention`, `tiny_cross_attention`, `tiny_videos` and `tiny_unets`.
"""

from __future__ import annotations

from importlib import import_module

from tiny_builders import TINY as TINY
from tiny_builders import WORDS as WORDS

for _kind in ("joint_attention", "cross_attention", "videos", "unets"):
    import_module(f"tiny_{_kind}")
