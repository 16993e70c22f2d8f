"""What the cells of `mm.evaluation.customize_cells` share: models, the judge, adapters kept in a folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm.adapters.patch import Patch
from mm.customization.apart import draw_apart
from mm.customization.customize import customize
from mm.evaluation.compose import picture_seed
from mm.evaluation.customize_subjects import GROUNDS, write_pictures
from mm.world import vocabulary as v
from mm.world.judge import Judge, Reading

SUBJECTS = v.HELD_OUT_OBJECTS
ORTHOGONAL = "orthogonal"
GROUND = "beach"  # of all training pictures where a background's leakage is measured
_TOGETHER = 8  # prompts in one call


@dataclass
class Bench:
    """Models, judge and adapters that cells share.

    Attributes:
        work: folder of adapters and training pictures.
        model: name or folder.
        pictures: drawn of each prompt.
        settings: of training; empty for the family's own.
        steps: of drawing; None takes the family's own.
        prompts: at most so many a cell; None: all. For trials.
        progress: called with a text.
    """

    work: Path
    model: str = "mm-tiny"
    pictures: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    prompts: int | None = None
    progress: Callable[[str], None] = print

    @cached_property
    def pipe(self) -> Any:
        """The 16-bit pipeline."""
        return self._loaded(None)

    @cached_property
    def four(self) -> Any:
        """The 4-bit pipeline."""
        return self._loaded(4)

    @cached_property
    def judge(self) -> Judge:
        """Knows the subjects."""
        return Judge.from_pretrained()

    def _loaded(self, bits: int | None) -> Any:
        import mm

        pipe = mm.load(self.model, bits=bits).pipeline
        pipe.set_progress_bar_config(disable=True)
        return pipe

    # ---- adapters ---------------------------------------------------------------------------------------------------

    def adapter(self, method: str, subject: str, *, variant: str = "", pipe: Any = None, **settings: Any) -> Patch:
        """An adapter of a subject, from the folder or trained and kept there."""
        folder = self.work / f"{subject}-pictures{'-' + GROUND if variant == GROUND else ''}"
        grounds = (GROUND,) * len(GROUNDS) if variant == GROUND else GROUNDS

        def pictures() -> Path:
            return write_pictures(folder, subject, grounds, captions=variant != GROUND)

        slot = {"slot": SUBJECTS.index(subject)} if method == ORTHOGONAL else {}
        return self.trained(
            "-".join(filter(None, (method, subject, variant))), pictures, pipe=pipe,
            **{"name": f"<{subject}>", "method": method} | slot | settings,
        )  # fmt: skip

    def trained(self, key: str, pictures: Callable[[], Path], *, pipe: Any = None, **given: Any) -> Patch:
        """The adapter of a key, from the folder or trained on what `pictures` writes."""
        file = self.work / f"{key}.safetensors"
        if file.is_file():
            return Patch.load(file)
        self.progress(f"{key}: learning")
        started, busy = time.monotonic(), time.process_time()
        patch = customize(self.pipe if pipe is None else pipe, pictures(), samples=(), **{**self.settings, **given})
        patch.report["seconds"] = round(time.monotonic() - started, 1)
        patch.report["cpu_seconds"] = round(time.process_time() - busy, 1)
        patch.save(file)
        return patch

    # ---- pictures ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def drawn(
        self, texts: Sequence[str], salt: str, *patches: Patch, pipe: Any = None, times: int | None = None
    ) -> Tensor:
        """uint8 pictures of prompts with patches on, each prompt's in a row; seeds depend on prompt and salt alone."""
        target = self.pipe if pipe is None else pipe
        each = [(t, k) for t in texts for k in range(self.pictures if times is None else times)]
        more = {} if self.steps is None else {"num_inference_steps": self.steps}
        parts = []
        for patch in patches:
            patch.apply(target)
        try:
            for start in range(0, len(each), _TOGETHER):
                part = each[start : start + _TOGETHER]
                seeds = [_seed(salt, text, k) for text, k in part]
                made = target(
                    [text for text, _ in part], generator=[torch.Generator().manual_seed(s) for s in seeds],
                    output_type="pt", **more,
                ).images  # fmt: skip
                parts.append((made * 255).round().to(torch.uint8).cpu())
        finally:
            for patch in reversed(patches):
                patch.undo(target)
        return torch.cat(parts)

    def drawn_apart(self, texts: Sequence[str], salt: str, patches: Sequence[Patch], times: int) -> Tensor:
        """As `drawn`, with each patch's subject in a place of its own."""
        more: dict[str, Any] = {} if self.steps is None else {"num_inference_steps": self.steps}
        made = [
            draw_apart(self.pipe, text, adapters=patches, seed=_seed(salt, text, k), **more).picture
            for text in texts
            for k in range(times)
        ]
        return torch.stack([torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) for picture in made])

    def read(self, pictures: Tensor) -> list[Reading]:
        """What the judge sees."""
        return self.judge.read(pictures)

    def few(self, prompts: Sequence[Any]) -> Sequence[Any]:
        """The prompts of a trial."""
        return prompts if self.prompts is None else prompts[: self.prompts]


def _seed(salt: str, text: str, number: int) -> int:
    return picture_seed(0, f"claims {salt} {text}", number)
