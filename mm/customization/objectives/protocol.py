"""What training needs of a family: how pictures and prompts become tensors, and what the denoiser is to predict.

Design choices
- One class a family, named by `Family.objective`, so that a new family is one small class and ours need not be known
  here.
- Everything is in float32 around the denoiser, which computes in its own type.

Legend: B pictures, C channels, H x W latents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.adapters.tokens import TokenTable, token_tables
from mm.core.errors import UserError
from mm.customization.objectives.remembered import Remembered, stacked
from mm.families import family_of
from mm.families.family import resolve
from mm.families.sizes import check_side, usual_side

NOUNS: tuple[str, ...] = ("dog", "car", "tree", "cup", "cat", "chair", "apple", "bird")
Edits = Literal["no", "also", "only"]
_WATCHED = "mm.customization.objectives.watched:watched"  # of families that name no class of their own
INSTRUCTIONS: tuple[str, ...] = (
    "make it night", "turn it into a watercolor", "add a dog", "remove the person", "make the sky red",
    "change the season to winter", "make it a pencil drawing", "add snow", "put a hat on the person",
    "make it black and white", "replace the car with a bicycle", "blur the background",
)  # fmt: skip


class Objective(ABC):
    """How a pipeline's denoiser is trained.

    Attributes:
        pipe: the pipeline.
        side: of the training pictures, in pixels.
        parts: components whose linear layers take adapters.
        skipped: patterns over the paths of layers that take none.
        training: values of `TrainingConfig` that suit the family.
        edits: "no", "also" or "only": whether the pipeline changes a source picture.
        pipelines: class names of the pipelines that it trains; none are all of the family's.
        open_vocabulary: any word is read in pieces; otherwise a new word needs a row of its own.
        encoded: number of the prompt that is being encoded, where each is encoded alone.
    """

    parts: tuple[str, ...] = ("transformer",)
    skipped: tuple[str, ...] = ()
    open_vocabulary = True
    encoded: int | None = None
    training: ClassVar[Mapping[str, Any]] = {}
    edits: Edits = "no"
    pipelines: tuple[str, ...] = ()

    def __init__(self, pipe: Any, side: int) -> None:
        self.pipe, self.side = pipe, side
        self._remembered: Remembered | None = None

    # ---- what a family says -----------------------------------------------------------------------------------------

    @abstractmethod
    def encode_pictures(self, pictures_B3SS: Tensor) -> Tensor:
        """Latents (B, C, H, W) as the denoiser sees them, of pictures in [-1, 1]."""

    @abstractmethod
    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) in [-1, 1] of such latents."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        """What the denoiser reads of the prompts, with gradients where they are enabled."""

    def encode_repeated(self, prompt: str, count: int) -> Any:
        """What the denoiser reads of `count` pictures of one prompt, which is encoded once."""
        return self.joined([self.encode_prompts([prompt])] * count)

    def encode_edits(self, instructions: Sequence[str], pictures_B3SS: Tensor, latents_BCHW: Tensor) -> Any:
        """What the denoiser reads of instructions and source pictures, given in [-1, 1] and as clean latents."""
        raise UserError(f"{type(self.pipe).__name__} takes no source picture")

    @property
    def trains_words(self) -> bool:
        """Whether prompts are encoded with gradients, so that rows of words can be learned."""
        return True

    def joined(self, conditions: Sequence[Any]) -> Any:
        """Conditions of one prompt each as one batch."""
        return stacked(conditions)

    def kept_instructions(self, count: int) -> list[str]:
        """Instructions whose results stay as they are while an edit is learned; at most `count`."""
        return list(INSTRUCTIONS[:count])

    def known_nouns(self) -> Sequence[str]:
        """Things that the base draws, of which pictures beside the subject are made."""
        return NOUNS

    def unknown(self, text: str, name: str) -> list[str]:
        """A line for each word of a training text that the model cannot read; none where words are read in pieces.

        Args:
            text: a caption, a prompt or a noun.
            name: of what is learned, which is known.
        """
        return []

    def undrawn(self, prompt: str, name: str, *, edit: bool) -> list[str]:
        """A line for each thing in a prompt, or in an instruction of an edit, that is not drawn."""
        return []

    @abstractmethod
    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Any) -> Tensor:
        """The denoiser's prediction (B, C, H, W) in float32, comparable with `target`."""

    @abstractmethod
    def levels(self, count: int, generator: torch.Generator) -> Tensor:
        """Random noise levels (count,) to train at."""

    @abstractmethod
    def fixed_levels(self, count: int) -> Tensor:
        """Noise levels (count,) spread evenly, for scores."""

    @abstractmethod
    def strength(self, level_B: Tensor) -> Tensor:
        """Noise levels as a share of the highest."""

    @abstractmethod
    def louder(self, level_B: Tensor) -> Tensor:
        """Noise levels brought into the upper half, where the prompt decides more than the picture."""

    @abstractmethod
    def noised(self, clean: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        """Latents at a noise level."""

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        """What is to be predicted."""

    # ---- what the pipeline's own call holds -------------------------------------------------------------------------

    @abstractmethod
    def level_of(self, timestep: float) -> Tensor:
        """The noise level (1,) of a timestep of the pipeline's scheduler."""

    def packed(self, latents_BCHW: Tensor) -> Tensor:
        """Latents in the layout that the pipeline's call gives to its step callback."""
        return latents_BCHW

    def noised_in_call(self, clean: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        """Latents at a noise level, in the layout and at the scale that the step callback gets."""
        return self.packed(self.noised(clean, noise, level_B))

    # ---- prompts, encoded once each ---------------------------------------------------------------------------------

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Within the context `conditions` and `edit_conditions` encode a prompt once: nothing that reads it changes."""
        before, self._remembered = self._remembered, Remembered(self.device, self.joined)
        try:
            yield
        finally:
            self._remembered = before

    @property
    def remembers(self) -> bool:
        """Whether each prompt is encoded once."""
        return self._remembered is not None

    def conditions(self, prompts: Sequence[str]) -> Any:
        """As `encode_prompts`; within `remembering` without gradients."""
        if self._remembered is None:
            return self.encode_prompts(prompts)
        return self._remembered(list(prompts), lambda k: self.encode_prompts([prompts[k]]))

    def edit_conditions(
        self, instructions: Sequence[str], pictures_B3SS: Tensor, latents_BCHW: Tensor, numbers: Sequence[int]
    ) -> Any:
        """As `encode_edits`, of source pictures with these numbers."""
        if self._remembered is None:
            return self.encode_edits(instructions, pictures_B3SS, latents_BCHW)
        return self._remembered(
            list(zip(instructions, numbers, strict=True)),
            lambda k: self.encode_edits([instructions[k]], pictures_B3SS[k : k + 1], latents_BCHW[k : k + 1]),
        )

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """One feature vector (B, D) a prompt: the mean over what the denoiser reads of it."""
        condition = self.conditions(prompts)
        states = condition.get("encoder_hidden_states")
        if not torch.is_tensor(states):
            raise UserError(f"{type(self).__name__} gives no text features; choose another method")
        return states.float().mean(1)

    # ---- the same for all -------------------------------------------------------------------------------------------

    @property
    def tables(self) -> tuple[TokenTable, ...]:
        """Tokenizers and embeddings that read prompts."""
        return token_tables(self.pipe)

    @property
    def device(self) -> torch.device:
        """Of the denoiser."""
        return next(self.modules()[self.parts[0]].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """In which the denoiser computes."""
        kinds = [p.dtype for p in self.modules()[self.parts[0]].parameters() if p.is_floating_point()]
        return kinds[0] if kinds else torch.float32

    def modules(self) -> dict[str, nn.Module]:
        """The components that take adapters, by name."""
        return {name: cast(nn.Module, self.pipe.components[name]) for name in self.parts}


def objective_of(pipe: Any, side: int | None = None, *, edit: bool = False) -> Objective:
    """The objective of a pipeline's family.

    Args:
        pipe: the pipeline.
        side: of the training pictures in pixels; None takes the family's usual size.
        edit: whether pairs of pictures are learned.

    Raises:
        UserError: for a pipeline of no family, one whose call does what `mm.customization.objectives.watched` does not
            suit, and one that takes no source picture, or always one.
    """
    family = family_of(pipe)
    if family is None:
        raise UserError(
            f"{type(pipe).__name__} cannot be customized yet; docs/customization.md lists the families, and says how "
            "to add one"
        )
    kind = resolve(family.objective or _WATCHED)
    wanted = getattr(kind, "pipelines", ())
    if wanted and not {base.__name__ for base in type(pipe).__mro__} & set(wanted):
        those = " and ".join(wanted)
        raise UserError(f"{type(pipe).__name__} cannot be customized; of the family {family.name}, {those} can")
    if side is None:
        side = usual_side(pipe)
    else:
        check_side(pipe, side)
    made: Objective = kind(pipe, side)
    if edit and made.edits == "no":
        raise UserError(
            f"{type(pipe).__name__} takes no source picture, so no edit can be learned; give an editing pipeline "
            "(mm.ImageEditPipeline, FluxKontextPipeline, Flux2Pipeline, QwenImageEditPipeline)"
        )
    if not edit and made.edits == "only":
        raise UserError(f"{type(pipe).__name__} draws from a source picture only; it learns kind='edit' alone")
    return made


def weighted_mse(prediction: Tensor, target: Tensor, mask_B1HW: Tensor | None) -> Tensor:
    """Mean squared error of each row (B,); under a mask the mean over what it shows."""
    squares = (prediction.float() - target.float()).square()
    if mask_B1HW is None:
        return squares.flatten(1).mean(1)
    weights = mask_B1HW.expand_as(squares)
    return (squares * weights).flatten(1).sum(1) / weights.flatten(1).sum(1).clamp_min(1e-6)


def at_latents(mask_B1SS: Tensor, latents: Tensor) -> Tensor:
    """A mask of pixels, averaged to the latents' grid."""
    return F.adaptive_avg_pool2d(mask_B1SS, (latents.shape[-2], latents.shape[-1]))
