"""Several learned subjects in one picture, each drawn by its own adapter in a place of its own.

Adapters that act together pass features of one subject on to the other, summed or merged. Here no adapter meets the
subject of another one: the base draws the picture with known things in the place of the subjects, and each adapter then
draws its subject over one of them, in a run of its own in which the other things are still those of the base. Outside
the subject's place, this run takes the base's latents after every step (as the known part of a picture is kept in
Lugmayr et al. 2022, RePaint, arXiv 2201.09865). That each adapter draws a region of its own is from Gu et al. 2023,
Mix-of-Show, arXiv 2305.18292, where the adapters are merged, and share one run. At last each adapter draws its subject
again in full size (`mm.customization.refining`).

Design choices
- Only latents after each step are read and changed, by the step callback of diffusers or by the scheduler
  (`mm.families.stepping`), so that every pipeline that samples in steps can draw so. N subjects cost 2 N + 1 pictures;
  nothing is trained or merged.
- Places are found in the base's picture by its predictions (`mm.customization.places`). Where things are close to each
  other, the base draws again, other things from another seed, and the picture is taken whose things have most space
  (`mm.customization.layouts`). Words of the prompt say where subjects are ("left of").
- Patches whose word is not in the prompt (styles, erasures) act in every run.

Legend: B pictures, C channels, H x W latents, L tokens of packed latents.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from mm.adapters.patch import Patch
from mm.adapters.stack import stack_of
from mm.core.checks import MAX_SEED, number, shown
from mm.core.errors import UserError
from mm.customization.apart_base import (
    Base,
    Call,
    OnLatents,
    Subjects,
    at_size_of,
    base_picture,
    objective_at,
    things_of,
)
from mm.customization.batches import hash_of
from mm.customization.layouts import Layouts
from mm.customization.objectives.protocol import Objective
from mm.customization.places import Box, Noised, between, in_whole, middle_levels, share_inside
from mm.customization.refining import refined
from mm.families.frames import one_frame, pictures_of
from mm.families.sources import draws_from_text
from mm.families.stepping import gives_latents, stepping

# Options of a pipeline's call that have no place here, with the value that says what is done anyway.
_OF_NO_USE = {
    "callback_on_step_end": None, "output_type": "pil", "generator": None, "latents": None, "num_images_per_prompt": 1,
    "best_of": 1,
}  # fmt: skip
_TRIES = 4  # pictures with the subjects, until each of them is seen in its place
_SEEN = 0.5  # share of a word's effect that lies in its subject's place
REFINE = 0.45  # share of the noise from which subjects are drawn again


class Named(Protocol):
    """A patch on a model, or a file of one."""

    @property
    def name(self) -> str:
        """Of the patch."""
        ...

    @property
    def word(self) -> str:
        """What its subject is called; "" where it does not say."""
        ...

    @property
    def scale(self) -> float:
        """How strongly it acts."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class ApartOutput:
    """A picture of several subjects.

    Attributes:
        picture: as the pipeline gives it.
        places: of the subjects, by word.
        stand_ins: what the base drew in their places, by word.
        plain: the base's prompt.
    """

    picture: Image.Image
    places: dict[str, Box]
    stand_ins: dict[str, str]
    plain: str


def draw_apart(
    pipe: Any, prompt: str, *, adapters: Sequence[Patch] = (), seed: int = 0,
    stand_ins: Mapping[str, str] | None = None, refine: float = REFINE, **options: Any,
) -> ApartOutput:  # fmt: skip
    """Draws several learned subjects in one picture, each by its own adapter in a place of its own.

    Args:
        pipe: a text-to-image pipeline of diffusers or of mm, with adapters on it; it is left as it was.
        prompt: with the words of their subjects, as in "a <mug> and a <robot> on grass". Adapters whose word is not in
            it act everywhere.
        adapters: that are put on for this picture.
        seed: of the noise.
        stand_ins: known things, by word, that the base draws in the place of subjects, such as {"<mug>": "cup"}; those
            of other words are chosen by the seed.
        refine: share of the noise, from 0 to 1, from which each adapter at last draws its subject again at the
            picture's size; 0 leaves that out.
        options: of the pipeline's call.

    Raises:
        UserError: where no adapter's word is in the prompt, or one is there twice, for a family without an objective
            (`mm.customization.objectives`), and for a pipeline that does not sample in steps.
    """
    takes = inspect.signature(type(pipe).__call__).parameters
    if not gives_latents(pipe):
        raise UserError(
            f"{type(pipe).__name__} has neither a step callback nor a scheduler, by which adapters are kept apart"
        )
    if not draws_from_text(pipe):
        raise UserError(f"{type(pipe).__name__} draws from a source picture only; adapters are kept apart from text")
    check_options(getattr(pipe, "modes", ()), options)
    number("refine", refine, 0, 1)
    given = one_frame(takes) | options

    def call(text: str, seed: int, on_latents: OnLatents) -> Image.Image:
        arguments = given | {"prompt": text, "generator": torch.Generator().manual_seed(seed)}
        with stepping(pipe, arguments, on_latents):
            made = pipe(**arguments)
        picture: Image.Image = pictures_of(made)[0]
        return picture

    with ExitStack() as stack:
        for patch in adapters:
            patch.apply(pipe)
            stack.callback(patch.undo, pipe)
        words = words_of(stack_of(pipe).list())
        asked = Subjects(prompt=prompt, words=tuple(words), seed=seed, stand_ins=stand_ins or {})
        return compose(pipe, asked, call, words, refine=refine, size=size_in(given))


def check_options(modes: Sequence[str], options: Mapping[str, Any]) -> None:
    """Raises UserError for options of a pipeline's call with which adapters cannot be kept apart.

    Args:
        modes: of the pipeline, the first one being that in which they can.
        options: of the call, by name.
    """
    for name, usual in _OF_NO_USE.items():
        if options.get(name) is not None and (usual is None or options[name] != usual):
            raise UserError(f"{name} is of no use for pictures that are drawn apart; leave it out")
    if options.get("mode") not in (None, *modes[:1]):
        wanted = f"the mode {modes[0]}" if modes else "no mode"
        raise UserError(f"mode is {shown(options['mode'])}; adapters are kept apart in {wanted} only")


def size_in(arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    """Width and height in the arguments of a call; None where it leaves one of them out."""
    width, height = arguments.get("width"), arguments.get("height")
    return (width, height) if isinstance(width, int) and isinstance(height, int) else None


def words_of(patches: Iterable[Named]) -> dict[str, str]:
    """The names of the patches that say what their subject is called, by that word.

    Raises:
        UserError: where two have the same word.
    """
    found: dict[str, str] = {}
    for item in patches:
        if item.word in found:
            raise UserError(f"the adapters {found[item.word]!r} and {item.name!r} have the same word {item.word}")
        if item.word:
            found[item.word] = item.name
    return found


def check_apart(objective: Objective, asked: Subjects, patches: Iterable[Named]) -> None:
    """Raises UserError for what cannot be drawn apart, as far as it is known before anything is drawn.

    Args:
        objective: of the pipeline.
        asked: what to draw.
        patches: on the pipeline.
    """
    for item in patches:
        if item.scale == 0 and item.word in asked.words:
            raise UserError(
                f"the adapter {item.name!r} has a scale of 0, so that {item.word} would not be drawn; give a scale"
            )
    middle_levels(objective)
    things_of(objective, asked, 0)


@contextmanager
def _only(pipe: Any, asked: Subjects, words: Mapping[str, str], word: str | None) -> Iterator[None]:
    """Within the context, of the subjects' patches on a pipeline only that of `word` acts, as strongly as before; None:
    none of them."""
    stack = stack_of(pipe)
    scales = {item.name: item.scale for item in stack.list()}
    patches = [words[each] for each in asked.words]
    try:
        for each in patches:
            stack.scale(each, scales[each] if word is not None and each == words[word] else 0.0)
        yield
    finally:
        for each in patches:
            stack.scale(each, scales[each])


def compose(
    pipe: Any, asked: Subjects, call: Call, words: Mapping[str, str], *, refine: float = REFINE,
    size: tuple[int, int] | None = None,
) -> ApartOutput:  # fmt: skip
    """The picture, by a run of the base and one of each subject's adapter; the best of several where one is not seen.

    Args:
        pipe: with the patches on it; its objective finds places.
        asked: what to draw.
        call: draws a picture with a seed, and passes the latents of each step on.
        words: names of the patches, by word.
        refine: share of the noise from which subjects are drawn again; 0 leaves that out.
        size: width and height of the picture, where they are known.

    Raises:
        UserError: as `check_apart` and `draw_apart`.
    """
    objective = objective_at(pipe, size)
    check_apart(objective, asked, stack_of(pipe).list())
    layouts = Layouts(lambda number: base_picture(objective, asked, call, number))
    best, shares = None, [-1.0]
    for _ in range(_TRIES):
        with _only(pipe, asked, words, None):
            base = layouts.next()
        picture = _with_subjects(pipe, asked, base, call, words)
        with _only(pipe, asked, words, None):
            noised = Noised.of(at_size_of(objective, picture), picture)
        found = [_seen(pipe, asked, base, noised, word, words) for word in asked.words]
        if min(found) > min(shares):
            best, shares = (base, picture), found
        if min(shares) >= _SEEN:
            break
    assert best is not None
    base, picture = best
    if refine:
        picture = _refined(pipe, asked, base, picture, call, words, refine)
    if unseen := [word for word, share in zip(asked.words, shares, strict=True) if share < _SEEN]:
        warnings.warn(
            f"not seen in a place of its own in any of {_TRIES} tries (seed {asked.seed}): {', '.join(unseen)}; check "
            "the picture, or give another seed or other stand-ins",
            stacklevel=3,
        )
    places = {word: in_whole(box, *picture.size) for word, box in base.places.items()}
    return ApartOutput(picture=picture, places=places, stand_ins=base.things, plain=asked.prompt_with(base.things))


def _with_subjects(
    pipe: Any, asked: Subjects, base: Base, call: Call, words: Mapping[str, str]
) -> Image.Image:  # fmt: skip
    """The base's picture, with each subject drawn by its adapter."""
    picture = base.picture
    kept: list[Tensor] = []  # each subject's own latents at the last step
    inside = base.masks(base.latents[0])
    for place, word in enumerate(asked.words):

        def outside_from_base(step: int, latents: Tensor, timestep: float, place: int = place) -> Tensor:
            mine = torch.where(inside[place], latents, base.latents[step].to(latents))
            if step + 1 < len(base.latents):
                return mine
            kept.append(latents)
            if place + 1 < len(asked.words):
                return mine
            for mask, each in zip(inside, kept, strict=True):  # the last run's picture is that of all
                mine = torch.where(mask, each.to(latents), mine)
            return mine

        with _only(pipe, asked, words, word):
            picture = call(asked.prompt_with(base.without(word)), base.seed, outside_from_base)
    return picture


def _refined(
    pipe: Any, asked: Subjects, base: Base, picture: Image.Image, call: Call, words: Mapping[str, str], strength: float
) -> Image.Image:  # fmt: skip
    """The picture with each subject drawn again by its adapter, one after another."""
    places = [in_whole(base.places[word], *picture.size) for word in asked.words]
    for place, word in enumerate(asked.words):
        with _only(pipe, asked, words, word):
            picture = refined(
                objective_at(pipe, picture.size), picture, places, place, asked.prompt_about(word), call,
                seed=hash_of(base.seed, place) % (MAX_SEED + 1), timesteps=base.timesteps, like=base.latents[-1],
                strength=strength,
            )  # fmt: skip
    return picture


def _seen(
    pipe: Any, asked: Subjects, base: Base, noised: Noised, word: str, words: Mapping[str, str]
) -> float:  # fmt: skip
    """Share of what a subject's word makes its adapter predict otherwise that lies in the subject's place."""
    others = base.without(word)
    with _only(pipe, asked, words, word):
        found_HW = between(
            noised.predictions(asked.read_with(others)),
            noised.predictions(asked.read_with(others | {word: base.other})),
        )  # fmt: skip
    return share_inside(found_HW, base.places[word])
