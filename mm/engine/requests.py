"""What a run is asked for: typed, frozen requests. Values are checked here once; the model's limits in `capabilities`.

Design choices
- None means the model's own default (steps, guidance, size, mode), which its family file names.
- Pictures are PIL images; reading files is the caller's work (`mm.core.pictures`).
- A request holds everything that a picture depends on apart from the model and its adapters, so that its settings can
  be kept in the PNG and drawn again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from mm.core.checks import MAX_SEED, MAX_SIDE, number, shown, whole
from mm.core.errors import UserError
from mm.core.nouns import with_article
from mm.core.pictures import as_mask
from mm.engine.prompts import LORA_TAG

MAX_COUNT = 10_000
MAX_STEPS = 1000
MAX_TRIES = 64
MAX_BATCH = 256  # pictures of a call
MAX_GUIDANCE = 100.0
_SHAPES = 0.05  # by which a mask and its picture may differ
MAX_PROMPT = 20_000  # characters; longer texts only keep the tokenizer busy


def text(name: str, value: object, *, empty: bool = False) -> None:
    """Raises UserError unless `value` is a text of bounded length that is not blank, or may be with `empty`, and names
    no LoRA file."""
    if not isinstance(value, str):
        raise UserError(f"{name} is {shown(value)}; give a text")
    if len(value) > MAX_PROMPT:
        raise UserError(f"{name} has {len(value)} characters; give at most {MAX_PROMPT}")
    if not empty and not value.strip():
        raise UserError(f"{name} is empty; say in words what is wanted")
    if tag := LORA_TAG.search(value):
        raise UserError(
            f"{name} holds {tag[0].strip()}, which only A1111 and programs like it read; leave it out, and give the "
            "file as an adapter (--lora FILE:SCALE)"
        )


def picture(name: str, value: object) -> None:
    """Raises UserError unless `value` is a PIL image."""
    if not isinstance(value, Image.Image):
        raise UserError(f"{name} is {with_article(type(value).__name__)}; give a PIL image")


def size_in_pixels(value: object) -> None:
    """Raises UserError unless `value` is None or (width, height) in pixels."""
    if value is None:
        return
    if not isinstance(value, tuple) or len(value) != 2:
        raise UserError(f"size is {shown(value)}; give (width, height) in pixels")
    for side, pixels in zip(("width", "height"), value, strict=True):
        whole(side, pixels, 8, MAX_SIDE)


def stand_ins(texts: Iterable[str], said: str) -> dict[str, str]:
    """`Draw.apart` of texts such as "<mug>=cup".

    Args:
        texts: a word and a thing each.
        said: what gives them, in messages.

    Raises:
        UserError: for a text without one of the two, and a word that is given twice.
    """
    things: dict[str, str] = {}
    for given in texts:
        word, _, thing = (part.strip() for part in given.partition("="))
        if not word or not thing:
            raise UserError(f"{said} is {given!r}; give a word and a thing, for example '<mug>=cup'")
        if word in things:
            raise UserError(f"{said} is given twice for {word}; one thing stands in for it")
        things[word] = thing
    return things


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How pictures are drawn, whatever they are drawn from.

    Args:
        count: number of pictures; picture k has seed + k.
        seed: of the first picture; None draws one at random.
        steps: sampling steps; None is the model's default.
        guidance: scale of classifier-free guidance, 1 = off; None is the model's default.
        mode: one of the model's modes ("flow", "codes"); None is its first.
        scheduler: name of a diffusers scheduler class that the model can take; None keeps the model's own.
        batch_size: pictures drawn in one call; changes no picture.
        best_of: the most times that a picture is drawn, for models that read back what they drew.
        fast: less work a picture (docs/fast.md): True is the model's measured mix, a mapping names single settings.
        strict: for models that read their prompts by a list of words: True refuses words that are not known, False
            refuses nothing, None what leaves nothing to do.
        options: further keyword arguments for the pipeline's call, under its own names.
    """

    count: int = 1
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    mode: str | None = None
    scheduler: str | None = None
    batch_size: int = 1
    best_of: int = 1
    fast: bool | Mapping[str, Any] = False
    strict: bool | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        whole("count", self.count, 1, MAX_COUNT)
        whole("batch_size", self.batch_size, 1, MAX_BATCH)
        whole("best_of", self.best_of, 1, MAX_TRIES)
        if self.seed is not None:
            whole("seed", self.seed, 0, MAX_SEED - self.count + 1)
        if self.steps is not None:
            whole("steps", self.steps, 1, MAX_STEPS)
        if self.guidance is not None:
            number("guidance", self.guidance, 0, MAX_GUIDANCE)
        if not isinstance(self.fast, bool | Mapping):
            raise UserError(f"fast is {shown(self.fast)}; give true, false or settings by name")
        if self.strict is not None and not isinstance(self.strict, bool):
            raise UserError(f"strict is {shown(self.strict)}; give true or false, or leave it out")


@dataclass(frozen=True, kw_only=True)
class Draw(Sampling):
    """Pictures from a prompt, with `image` from a picture, with `mask` in a part of one.

    Args:
        prompt: what to draw.
        negative: what to avoid; None leaves the model's own.
        size: (width, height) in pixels; None is the model's default.
        image: a picture to start from (image-to-image), or with `mask` to fill in.
        mask: white where `image` is drawn anew (inpainting).
        strength: share of the steps that image-to-image redraws, 0 to 1; None is the pipeline's default.
        apart: True has each adapter draw its subject in a place of its own (`mm.customization.apart`); a mapping names
            known things, by word, that the base draws there first.
        refine: share of the noise, 0 to 1, from which each subject that is drawn apart is drawn again at the picture's
            size; 0 leaves that out, None is the usual share.
    """

    prompt: str
    negative: str | None = None
    size: tuple[int, int] | None = None
    image: Image.Image | None = None
    mask: Image.Image | None = None
    strength: float | None = None
    apart: bool | Mapping[str, str] = False
    refine: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        text("prompt", self.prompt, empty=True)  # an empty prompt is the unconditional picture
        if self.negative is not None:
            text("negative", self.negative, empty=True)
        size_in_pixels(self.size)
        for name in ("image", "mask"):
            if getattr(self, name) is not None:
                picture(name, getattr(self, name))
        if self.mask is not None and self.image is None:
            raise UserError("mask is given without image; a mask says which part of a picture is drawn anew")
        if self.mask is not None and self.image is not None:
            _check_shapes(self.mask.size, self.image.size)
            _check_white(self.mask)
        if self.strength is not None:
            number("strength", self.strength, 0, 1)
            if self.image is None:
                raise UserError(f"strength is {self.strength:g} without image; it only acts on a picture that is given")
        self._check_apart()

    def _check_apart(self) -> None:
        if not isinstance(self.apart, bool | Mapping):
            raise UserError(f"apart is {shown(self.apart)}; give true, false or known things by word")
        if self.refine is not None:
            number("refine", self.refine, 0, 1)
            if self.apart is False:
                raise UserError(f"refine is {self.refine:g} without apart; it acts on subjects that are drawn apart")
        if self.apart is False:
            return
        for word, thing in self.apart.items() if isinstance(self.apart, Mapping) else ():
            text(f"what stands in for {word}", thing)
        for name, there in (("image", self.image is not None), ("best_of", self.best_of > 1)):
            if there:
                raise UserError(f"{name} is given, and adapters cannot be kept apart with it; leave one of them out")


def _check_shapes(mask: tuple[int, int], image: tuple[int, int]) -> None:
    """Raises UserError where a mask would be stretched over its picture, and cover other things in it."""
    if abs(mask[0] * image[1] / (mask[1] * image[0]) - 1) > _SHAPES:
        raise UserError(
            f"the mask is {mask[0]} x {mask[1]} and the picture {image[0]} x {image[1]}; give both the same shape"
        )


def _check_white(mask: Image.Image) -> None:
    """Raises UserError where a mask lets nothing change."""
    if as_mask(mask).getbbox() is None:
        raise UserError("the mask is black everywhere, so nothing may change; paint white where it may")


@dataclass(frozen=True, kw_only=True)
class Edit(Sampling):
    """A picture changed by an instruction.

    Args:
        image: the picture to change.
        instruction: what to change.
        negative: what to avoid.
        mask: white where the picture may change; None is everywhere.
        image_guidance: how strictly the source is kept, for models that have a guidance of its own.
        size: (width, height) in pixels; None is the model's choice.
    """

    image: Image.Image
    instruction: str
    negative: str | None = None
    mask: Image.Image | None = None
    image_guidance: float | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        size_in_pixels(self.size)
        picture("image", self.image)
        text("instruction", self.instruction)
        if self.negative is not None:
            text("negative", self.negative, empty=True)
        if self.mask is not None:
            picture("mask", self.mask)
            _check_white(self.mask)
        if self.image_guidance is not None:
            number("image_guidance", self.image_guidance, 0, MAX_GUIDANCE)


@dataclass(frozen=True, kw_only=True)
class Describe:
    """A question about a picture, or with `question` None a description of it.

    `max_words`: the longest answer; None is the model's default.
    """

    image: Image.Image
    question: str | None = None
    max_words: int | None = None

    def __post_init__(self) -> None:
        picture("image", self.image)
        if self.max_words is not None:
            whole("max_words", self.max_words, 1, 4096)
        if self.question is not None:
            text("question", self.question)


@dataclass(frozen=True, kw_only=True)
class Turn(Sampling):
    """A user's turn in a conversation that `Engine.converse` began."""

    conversation: Any
    words: str
    image: Image.Image | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        text("words", self.words)
        if self.image is not None:
            picture("image", self.image)


Request = Draw | Edit | Describe | Turn
