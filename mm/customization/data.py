"""The training pictures: a folder of pictures with captions, masks and repeats, read and checked as a whole.

Design choices
- Which files are what is said by `mm.customization.folders`, what is done with captions by `mm.customization.captions`.
- A mask is what hides something in the alpha channel, or a mask file.
- One unreadable picture among several is left out with a warning; a folder in which none can be read is an error.

Legend: N pictures, S side of the square pictures that are trained on.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mm.core.errors import UserError
from mm.core.nouns import counted
from mm.core.pictures import alpha_of, as_mask, flattened, read_picture
from mm.customization.captions import default_caption, fill, has_trigger, names, other_word, read_caption
from mm.customization.folders import Found, pairs_in, pictures_in

Kind = Literal["subject", "style", "edit", "slider"]
KINDS: tuple[Kind, ...] = ("subject", "style", "edit", "slider")
_SHAPES = 0.05  # by which the shapes of a pair may differ


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One picture to learn from.

    Attributes:
        path: of the picture.
        caption: with the subject's name in it.
        picture: RGB.
        mask: grey, white where the loss counts; None counts everywhere.
        before: the source of an edit.
        repeats: how often the picture counts.
    """

    path: Path
    caption: str
    picture: Image.Image
    mask: Image.Image | None = None
    before: Image.Image | None = None
    repeats: int = 1


def read_folder(folder: str | Path, *, name: str, kind: Kind = "subject", noun: str = "") -> list[Example]:
    """Reads the pictures of a folder.

    Args:
        folder: with pictures, or with folders such as `10_mug` that hold them.
        name: of the subject, which `[trigger]` stands for.
        kind: "edit" reads pairs.
        noun: the subject's class, which stands behind the name in captions that mm writes.

    Returns:
        The examples, in the order of their names.

    Raises:
        UserError: where there is no picture that can be read, a pair is incomplete, or the folder holds two subjects.
    """
    root = _folder(folder, "a few pictures")
    found = pairs_in(root) if kind == "edit" else pictures_in(root)
    default = default_caption(kind, noun)

    def read(one: Found) -> Example:
        made = _example(one, default)
        return replace(made, caption=fill(made.caption, name))

    examples = _readable(root, found, read, "pair" if kind == "edit" else "picture")
    for example in examples:
        if (other := other_word(example.caption, name)) is not None:
            raise UserError(
                f"{folder} holds two subjects: the caption of {example.path.name} names {other}, and the name is "
                f"{name}; customize each in a folder of its own"
            )
    return examples


def read_regularization(folder: str | Path, *, noun: str, name: str = "") -> list[Example]:
    """Reads pictures of the subject's class, which keep what the model knows of it.

    Args:
        folder: with pictures, or with folders such as `1_mug` that hold them.
        noun: the class, the caption of pictures without a text file.
        name: of the subject, which these pictures do not show.

    Raises:
        UserError: where no picture can be read, there is neither a text file nor a class, or a caption names the
            subject.
    """
    root = _folder(folder, "pictures of the class")

    def read(one: Found) -> Example:
        made = _example(one, f"a photo of a {noun}" if noun else "")
        if not made.caption:
            raise UserError(
                f"{made.path} has no caption, and no class is given; give noun='mug' (--noun) or text files"
            )
        if has_trigger(made.caption) or names(made.caption, name):
            raise UserError(
                f"the caption of {made.path} names the subject, and regularization pictures show others of its class; "
                "write the class there"
            )
        return made

    return _readable(root, pictures_in(root), read, "picture")


def _folder(folder: str | Path, of: str) -> Path:
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is no folder; give a folder with {of}")
    return Path(folder)


class _UnreadableError(Exception):
    """A picture that is left out."""


def _readable(root: Path, found: Sequence[Found], read: Callable[[Found], Example], what: str) -> list[Example]:
    """What can be read. Warns of the rest, and raises UserError where nothing can."""
    examples, errors = [], []
    for one in found:
        try:
            examples.append(read(one))
        except _UnreadableError as error:
            errors.append(str(error))
    if not examples:
        raise UserError(f"none of {counted(len(found), what)} in {root} can be read: {errors[0]}")
    for why in errors:
        verb = "is" if len(examples) == 1 else "are"
        warnings.warn(f"{why}; the other {counted(len(examples), what)} {verb} used", stacklevel=4)
    return examples


def _example(found: Found, default: str) -> Example:
    """A picture with its mask and source; the caption is as the file has it."""
    picture, mask = _read(found.picture)
    if found.mask is not None:
        mask = as_mask(_opened(found.mask))
        if mask.size != picture.size:
            raise UserError(
                f"{found.mask} is {mask.size[0]} x {mask.size[1]} and its picture {picture.size[0]} x "
                f"{picture.size[1]}; give both the same size"
            )
    if mask is not None and not np.asarray(square(mask)).any():
        where = "black everywhere" if not np.asarray(mask).any() else "black in the middle square, which is learned"
        raise UserError(f"the mask of {found.picture} is {where}, so nothing would be learned; paint the subject white")
    before = None if found.before is None else _read(found.before)[0]
    if before is not None and abs(_shape(before) / _shape(picture) - 1) > _SHAPES:
        warnings.warn(
            f"{found.before} and {found.picture} have different shapes, and of each the middle square is learned; "
            "give pictures that lie on each other",
            stacklevel=5,
        )
    caption = default if found.caption is None else read_caption(found.caption, default)
    return Example(
        path=found.picture, caption=caption, picture=picture, mask=mask, before=before, repeats=found.repeats
    )


def _shape(picture: Image.Image) -> float:
    return picture.width / picture.height


def _opened(path: Path) -> Image.Image:
    try:
        return read_picture(path)
    except UserError as error:
        raise _UnreadableError(str(error)) from error


def _read(path: Path) -> tuple[Image.Image, Image.Image | None]:
    """A picture as RGB, and its alpha channel where that hides anything."""
    picture = _opened(path)
    alpha = alpha_of(picture)
    hides = alpha is not None and np.asarray(alpha).min() < 255
    return flattened(picture), alpha if hides else None


def fingerprint(examples: Sequence[Example]) -> str:
    """A hash of pictures, masks, sources and captions, by which a stopped run recognizes its data."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.caption}\0{example.repeats}\0".encode())
        for picture in (example.picture, example.mask, example.before):
            digest.update(b"-" if picture is None else picture.tobytes())
    return digest.hexdigest()


def to_tensor(picture: Image.Image, side: int) -> Tensor:
    """The middle square of a picture, in [-1, 1]: (3, S, S), or (1, S, S) of a grey one."""
    return whole_tensor(square(picture).resize((side, side), Image.Resampling.LANCZOS))


def whole_tensor(picture: Image.Image) -> Tensor:
    """A picture in [-1, 1]: (3, H, W), or (1, H, W) of a grey one."""
    values = torch.from_numpy(np.asarray(picture, dtype=np.float32).copy()) / 127.5 - 1
    return values[None] if values.ndim == 2 else values.movedim(-1, 0)


def square(picture: Image.Image) -> Image.Image:
    """The middle square of a picture."""
    short = min(picture.size)
    left, top = (picture.size[0] - short) // 2, (picture.size[1] - short) // 2
    return picture.crop((left, top, left + short, top + short))
