"""The training pictures: a folder of pictures with captions, masks and repeats, read and checked as a whole.

Design choices
- The layouts of common trainers: a picture and a text file of the same name; kohya's folders `10_name`, whose pictures
  count ten times; masks in the alpha channel or in `NAME-masklabel.png` (OneTrainer); pairs for edits as
  `NAME_before.png` and `NAME_after.png`, or as the same names in the folders `before` and `after`.
- `[trigger]` in a caption stands for the name of the subject. A caption without it gets the name in front.
- One unreadable picture among several is left out with a warning; a folder in which none can be read is an error.

Legend: N pictures, S side of the square pictures that are trained on.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mm.core.errors import UserError
from mm.core.files import read_regular
from mm.core.nouns import counted
from mm.core.pictures import read_picture

Kind = Literal["subject", "style", "edit", "slider"]
KINDS: tuple[Kind, ...] = ("subject", "style", "edit", "slider")
TRIGGER = "[trigger]"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_MASK = "-masklabel"
_REPEATS = re.compile(r"(\d+)_(.+)")
_TOKEN = re.compile(r"<[A-Za-z0-9_-]+>")
_MOST_CAPTION = 1 << 16  # bytes


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
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{folder} is no folder; give a folder with a few pictures")
    if kind == "edit":
        return _pairs(root, name)
    places = _places(root, name)
    found = [(path, repeats) for place, repeats in places for path in _pictures(place)]
    if not found:
        raise UserError(f"{folder} holds no picture ({', '.join(SUFFIXES)}); put a few into it")
    _warn_of_stray_captions([place for place, _ in places])
    default = _default_caption(kind, noun)
    examples, errors = [], []
    for path, repeats in found:
        try:
            examples.append(_example(path, repeats, name, default))
        except _UnreadableError as error:
            errors.append(str(error))
    if not examples:
        raise UserError(f"none of {counted(len(found), 'picture')} in {folder} can be read: {errors[0]}")
    for why in errors:
        warnings.warn(
            f"{why}; the other {counted(len(examples), 'picture')} {'is' if len(examples) == 1 else 'are'} used",
            stacklevel=3,
        )
    _check_one_subject(examples, name, folder)
    return examples


def read_regularization(folder: str | Path, *, noun: str) -> list[Example]:
    """Reads pictures of the subject's class, which keep what the model knows of it.

    Args:
        folder: with pictures, or with folders such as `1_mug` that hold them.
        noun: the class, the caption of pictures without a text file.

    Raises:
        UserError: where no picture can be read, or there is neither a text file nor a class.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{folder} is no folder; give a folder with pictures of the class")
    found = [(path, repeats) for place, repeats in _places(root, noun) for path in _pictures(place)]
    examples = []
    for path, repeats in found:
        caption = _caption(path.with_suffix(".txt"), f"a photo of a {noun}" if noun else "")
        if not caption:
            raise UserError(f"{path} has no caption, and no class is given; give noun='mug' (--noun) or text files")
        try:
            examples.append(Example(path=path, caption=caption, picture=_read(path)[0], repeats=repeats))
        except _UnreadableError as error:
            warnings.warn(f"{error}; it is not used", stacklevel=3)
    if not examples:
        raise UserError(f"{folder} holds no picture that can be read ({', '.join(SUFFIXES)})")
    return examples


def _default_caption(kind: Kind, noun: str) -> str:
    if kind == "style":
        return f"a picture in the style of {TRIGGER}"
    return f"a photo of a {TRIGGER} {noun}".strip()


class _UnreadableError(Exception):
    """A picture that is left out."""


def _places(root: Path, name: str) -> list[tuple[Path, int]]:
    """The folders that hold pictures, each with its repeats."""
    own = _REPEATS.fullmatch(root.name)
    places = [(root, int(own[1]) if own else 1)] if _pictures(root) else []
    subjects: dict[str, Path] = {}
    for inner in sorted(path for path in root.iterdir() if path.is_dir()):
        match = _REPEATS.fullmatch(inner.name)
        if match and _pictures(inner):
            if int(match[1]) < 1:
                raise UserError(f"{inner} says 0 repeats; give 1 or more, or move the folder away")
            places.append((inner, int(match[1])))
            subjects[match[2].split()[0].lower()] = inner
    if len(subjects) > 1:
        names = ", ".join(str(path) for path in subjects.values())
        raise UserError(f"{root} holds {len(subjects)} subjects ({names}); customize each folder with its own name")
    return places


def _pictures(place: Path) -> list[Path]:
    files = sorted(path for path in place.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    return [path for path in files if not path.stem.endswith(_MASK)]


def _warn_of_stray_captions(places: Sequence[Path]) -> None:
    for place in places:
        stems = {path.stem for path in _pictures(place)}
        lost = sorted(path.name for path in place.glob("*.txt") if path.stem not in stems)
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            warnings.warn(f"{place / lost[0]}{more} has no picture of the same name and is not used", stacklevel=4)


def _example(path: Path, repeats: int, name: str, default: str) -> Example:
    picture, mask = _read(path)
    label = path.with_name(f"{path.stem}{_MASK}.png")
    if label.is_file():
        mask = _read(label)[0].convert("L")
        if mask.size != picture.size:
            raise UserError(
                f"{label} is {mask.size[0]} x {mask.size[1]} and its picture {picture.size[0]} x {picture.size[1]}; "
                "give both the same size"
            )
    if mask is not None and not np.asarray(mask).any():
        raise UserError(f"the mask of {path} is black everywhere, so nothing would be learned; paint the subject white")
    caption = _caption(path.with_suffix(".txt"), default)
    return Example(path=path, picture=picture, mask=mask, caption=fill(caption, name), repeats=repeats)


def _read(path: Path) -> tuple[Image.Image, Image.Image | None]:
    """A picture as RGB, and its alpha channel where that hides anything."""
    try:
        picture = read_picture(path)
    except UserError as error:
        raise _UnreadableError(str(error)) from error
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return picture.convert("RGB"), None
    full = picture.convert("RGBA")
    alpha = full.getchannel("A")
    ground = Image.new("RGBA", full.size, "white")
    ground.alpha_composite(full)
    hidden = np.asarray(alpha).min() < 255
    return ground.convert("RGB"), alpha if hidden else None


def _caption(path: Path, default: str) -> str:
    if not path.is_file():
        return default
    try:
        text = read_regular(path, "caption", most=_MOST_CAPTION).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text (byte {error.start}); save the caption as UTF-8") from error
    return " ".join(text.split()) or default


def fill(caption: str, name: str) -> str:
    """A caption with the subject's name in it: in place of `[trigger]`, or in front where it has neither."""
    if TRIGGER in caption:
        return caption.replace(TRIGGER, name)
    return caption if name in caption else f"{name}, {caption}"


def _check_one_subject(examples: Sequence[Example], name: str, folder: str | Path) -> None:
    """Raises where a caption names another new word than the subject's."""
    for example in examples:
        other = next((t for t in _TOKEN.findall(example.caption) if t != name), None)
        if other is not None:
            raise UserError(
                f"{folder} holds two subjects: the caption of {example.path.name} names {other}, and the name is "
                f"{name}; customize each in a folder of its own"
            )


def _pairs(root: Path, name: str) -> list[Example]:
    """Pairs of an edit, with the instruction as caption."""
    pairs: list[tuple[Path, Path, Path]] = []
    if (root / "before").is_dir() and (root / "after").is_dir():
        sources = {path.stem: path for path in _pictures(root / "before")}
        for after in _pictures(root / "after"):
            pairs.append((sources.pop(after.stem, Path()), after, after.with_suffix(".txt")))
        lost = next(iter(sources.values()), None)
    else:
        lost = None
        for after in (path for path in _pictures(root) if path.stem.endswith("_after")):
            stem = after.stem.removesuffix("_after")
            before = next((p for p in _pictures(root) if p.stem == f"{stem}_before"), Path())
            pairs.append((before, after, root / f"{stem}.txt"))
    missing = next((after for before, after, _ in pairs if before == Path()), lost)
    if missing is not None:
        raise UserError(f"{missing} has no partner; an edit needs pairs NAME_before.png and NAME_after.png")
    if not pairs:
        raise UserError(f"{root} holds no pairs; an edit needs pictures NAME_before.png and NAME_after.png")
    examples = []
    for before, after, text in pairs:
        try:
            source, (target, mask) = _read(before)[0], _read(after)
        except _UnreadableError as error:
            warnings.warn(f"{error}; its pair is not used", stacklevel=4)
            continue
        caption = fill(_caption(text, TRIGGER), name)
        examples.append(Example(path=after, picture=target, mask=mask, before=source, caption=caption))
    if not examples:
        raise UserError(f"no pair in {root} can be read")
    return examples


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
    short = min(picture.size)
    left, top = (picture.size[0] - short) // 2, (picture.size[1] - short) // 2
    square = picture.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.LANCZOS)
    values = torch.from_numpy(np.asarray(square, dtype=np.float32).copy()) / 127.5 - 1
    return values[None] if values.ndim == 2 else values.movedim(-1, 0)
