"""The world's judge as a judge of labels, for measuring what a model draws after an erasure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torchvision.transforms.functional import pil_to_tensor

from mm.world.judge import Judge, Reading

Labels = frozenset[str] | None


def labels_of(reading: Reading) -> Labels:
    """Objects, colours with their object ("red car"), style and background; None for an unreadable picture."""
    if not reading.readable:
        return None
    found = {reading.style, reading.background, *[f.object for f in reading.objects]}
    found |= {f"{colour} {f.object}" for f in reading.objects for colour in f.colours if colour}
    return frozenset(found)


def label_judge(judge: Judge | None = None) -> Callable[[Sequence[Any]], list[Labels]]:
    """A callable from PIL pictures to labels; `judge` None takes the shipped one."""
    reads = judge or Judge.from_pretrained()

    def labels(pictures: Sequence[Any]) -> list[Labels]:
        stacked = torch.stack([pil_to_tensor(p.convert("RGB")) for p in pictures])
        return [labels_of(r) for r in reads.read(stacked)]

    return labels
