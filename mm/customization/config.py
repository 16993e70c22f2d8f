"""How long and how fast an adapter is trained."""

from __future__ import annotations

from dataclasses import dataclass

from mm.core.checks import MAX_SEED, MAX_SIDE, number, whole
from mm.core.errors import UserError

MAX_SETTING = 10**9  # a number that no run reaches


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of a run.

    Attributes:
        steps: at most so many.
        batch_size: pictures a step.
        learning_rate: of layers.
        row_rate: of rows of embeddings, as a share of the rows' standard deviation.
        warmup: steps in which the rates rise linearly; over the last half they fall to a tenth (cosine).
        preserve: weight of the preservation against the frozen base; 0 leaves it out.
        preserve_batch: unrelated prompts at once.
        preserve_every: steps between two times that they are held to the base.
        guard_batch: guarded prompts each time that unrelated ones are held to the base.
        guard_weight: of a guarded prompt, as a multiple of an unrelated one; 0 only measures.
        strangers: prompts with other new words each time that unrelated ones are held to the base, so that adapters
            merge (`mm.customization.strangers`); 0 for none.
        regularize: weight of regularization pictures, where some are given.
        caption_dropout: share of pictures that are learned without their caption, where the noise leaves them visible.
            Guidance compares with the empty prompt, whose prediction has to know the subject when it sees it.
        weight_decay: decoupled.
        clip: largest norm of the gradient.
        seed: of starting values, noise and order.
        preview_every: steps between two previews, which score the run and may stop it.
        patience: previews without a better score after which the run stops.
        save_every: steps between two saves of the state.
        slider_pictures: that the base draws for a slider without a folder.
        companions: pictures of the subject beside something known, made of the user's and of what the base draws
            (`mm.customization.companions`); 0 for none.
        recoloured: pictures of other things in a style's colours (`mm.customization.recoloured`); 0 for none.
        size: side of the training pictures in pixels; None takes the family's.
        checkpointing: whether the denoiser's blocks are computed again for the gradient instead of kept: far less
            memory, a third more time (`mm.layers.checkpointing`); None: where it has a billion parameters.
    """

    steps: int = 800
    batch_size: int = 4
    learning_rate: float = 1e-4
    row_rate: float = 0.07
    warmup: int = 10
    preserve: float = 2.0
    preserve_batch: int = 2
    preserve_every: int = 2
    guard_batch: int = 1
    guard_weight: float = 4.0
    strangers: int = 0
    regularize: float = 1.0
    caption_dropout: float = 0.25
    weight_decay: float = 1e-4
    clip: float = 1.0
    seed: int = 0
    preview_every: int = 100
    patience: int = 4
    save_every: int = 25
    slider_pictures: int = 16
    companions: int = 0
    recoloured: int = 0
    size: int | None = None
    checkpointing: bool | None = None

    def __post_init__(self) -> None:
        for name in (
            "steps", "batch_size", "preserve_batch", "preserve_every", "preview_every", "patience", "save_every",
            "slider_pictures", "guard_batch",
        ):  # fmt: skip
            whole(name, getattr(self, name), 1, MAX_SETTING)
        for name in ("warmup", "companions", "recoloured", "strangers"):
            whole(name, getattr(self, name), 0, MAX_SETTING)
        whole("seed", self.seed, 0, MAX_SEED)
        for name in ("learning_rate", "row_rate", "clip"):
            number(name, getattr(self, name), 1e-12, MAX_SETTING)
        for name in ("preserve", "weight_decay", "guard_weight", "regularize"):
            number(name, getattr(self, name), 0, MAX_SETTING)
        number("caption_dropout", self.caption_dropout, 0, 0.99)
        if self.checkpointing not in (None, True, False):
            raise UserError(f"checkpointing is {self.checkpointing!r}; give True, False or None")
        if self.size is not None:
            whole("size", self.size, 8, MAX_SIDE)
