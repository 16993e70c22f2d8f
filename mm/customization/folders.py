"""Which files of a folder are pictures to learn from, and which are their captions, masks and sources.

Design choices
- Files are matched by their stems. `NAME.txt` (or `NAME.caption`, kohya's usual suffix) is the caption of `NAME.png`,
  `NAME-masklabel.png` its mask (OneTrainer).
- Repeats are in the names of folders inside the one that is given, as in kohya's scripts. The name of the given folder
  itself says nothing, so that `2026_mug` is not 2026 repeats.
- A file or folder that nothing is learned from is named in a warning; hidden ones and those of file managers are not.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from mm.core.errors import UserError
from mm.core.nouns import counted

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CAPTIONS = (".caption", ".txt")  # the last one counts where a picture has both
MAX_REPEATS = 10_000
_MASK = "-masklabel"
_REPEATS = re.compile(r"(\d+)_(.+)")
_SIDES = ("before", "after")
_OF_FILE_MANAGERS = ("thumbs.db", "desktop.ini")


@dataclass(frozen=True, kw_only=True)
class Found:
    """The files of one picture.

    Attributes:
        picture: the file.
        caption: its text file; None without one.
        mask: its mask; None without one.
        before: the source of an edit.
        repeats: how often the picture counts.
    """

    picture: Path
    caption: Path | None
    mask: Path | None
    before: Path | None = None
    repeats: int = 1


def pictures_in(root: Path) -> list[Found]:
    """The pictures of a folder, and of folders in it such as `10_mug`, in the order of their names.

    Raises:
        UserError: where there is none, where the folder holds two subjects, or repeats are out of range.
    """
    found = [one for place, repeats in _places(root) for one in _of_place(place, repeats)]
    if not found:
        others = [path.name for path in _listed(root)]
        more = f"; it holds {_first(others)}" if others else ""
        raise UserError(f"{root} holds no picture ({', '.join(SUFFIXES)}){more}; put a few into it")
    return found


def pairs_in(root: Path) -> list[Found]:
    """The pairs of an edit: `NAME_before.png` and `NAME_after.png`, or the same names in `before` and `after`.

    Raises:
        UserError: where there is none, or a picture has no partner or several.
    """
    if all((root / side).is_dir() for side in _SIDES):
        sides = [_by_stem(root / side, "") for side in _SIDES]
        texts, ours = _captions(_listed(root / "after")), [*sides[0].values(), *sides[1].values()]
    else:
        sides = [_by_stem(root, f"_{side}") for side in _SIDES]
        texts, ours = _captions(_listed(root)), [*sides[0].values(), *sides[1].values()]
    alone = sorted(sides[0].keys() ^ sides[1].keys())
    if alone:
        missing = sides[0].get(alone[0]) or sides[1][alone[0]]
        raise UserError(f"{missing} has no partner; an edit needs pairs NAME_before.png and NAME_after.png")
    if not ours:
        raise UserError(f"{root} holds no pairs; an edit needs pictures NAME_before.png and NAME_after.png")
    made = [
        Found(picture=after, before=sides[0][stem], caption=texts.get(stem), mask=_mask(after))
        for stem, after in sorted(sides[1].items())
    ]
    for place in dict.fromkeys([root, *(path.parent for path in ours)]):
        _warn_of_unused(place, _used(made), skipped=_SIDES, stray="is no text or mask of a pair and is not used")
    return made


def is_read(root: Path, place: Path) -> bool:
    """Whether pictures that lie in a place, which may not be there yet, are among those of a folder."""
    root, place = root.resolve(), place.resolve()
    inside = place.name in _SIDES or _REPEATS.fullmatch(place.name) is not None
    return place == root or (place.parent == root and inside)


def _places(root: Path) -> list[tuple[Path, int]]:
    """The folders that hold pictures, each with its repeats."""
    places = [(root, 1)] if _pictures(root) else []
    subjects: dict[str, Path] = {}
    for inner in (path for path in _listed(root) if path.is_dir()):
        match = _REPEATS.fullmatch(inner.name)
        if match and _pictures(inner):
            places.append((inner, _repeats(inner)))
            subjects[match[2].strip().partition(" ")[0].lower()] = inner
    if len(subjects) > 1:
        listed = ", ".join(str(path) for path in subjects.values())
        raise UserError(f"{root} holds {len(subjects)} subjects ({listed}); customize each folder with its own name")
    return places


def _repeats(folder: Path) -> int:
    match = _REPEATS.fullmatch(folder.name)
    repeats = int(match[1][:20]) if match else 1
    if not 1 <= repeats <= MAX_REPEATS:
        raise UserError(f"{folder} says {repeats} repeats; give 1 to {MAX_REPEATS}, or another name to the folder")
    return repeats


def _of_place(place: Path, repeats: int) -> list[Found]:
    texts = _captions(_listed(place))
    made = [
        Found(picture=path, caption=texts.get(path.stem), mask=_mask(path), repeats=repeats)
        for path in _pictures(place)
    ]
    _warn_of_unused(place, _used(made))
    return made


def _by_stem(place: Path, end: str) -> dict[str, Path]:
    """The pictures whose names end so, by the rest of the name. Raises UserError where two have one name."""
    found: dict[str, Path] = {}
    for path in (path for path in _pictures(place) if path.stem.endswith(end)):
        other = found.setdefault(path.stem.removesuffix(end), path)
        if other is not path:
            raise UserError(f"{other} and {path} have one name, and an edit needs one of each; take one away")
    return found


def _listed(folder: Path) -> list[Path]:
    """What a folder holds, in the order of names, without hidden files and those of file managers."""
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror or error}); give another folder") from error
    return [path for path in found if path.name[0] != "." and path.name.lower() not in _OF_FILE_MANAGERS]


def _pictures(place: Path) -> list[Path]:
    files = [path for path in _listed(place) if path.suffix.lower() in SUFFIXES and path.is_file()]
    return [path for path in files if not path.stem.endswith(_MASK)]


def _captions(files: Sequence[Path]) -> dict[str, Path]:
    """Text files by stem."""
    return {path.stem: path for end in CAPTIONS for path in files if path.suffix.lower() == end and path.is_file()}


def _mask(picture: Path) -> Path | None:
    label = picture.with_name(f"{picture.stem}{_MASK}.png")
    return label if label.is_file() else None


def _used(found: Sequence[Found]) -> set[Path]:
    return {path for one in found for path in (one.picture, one.caption, one.mask, one.before) if path is not None}


def _warn_of_unused(place: Path, used: Collection[Path], skipped: Collection[str] = (), stray: str = "") -> None:
    """Warns once for each kind of file that nothing is learned from."""
    lost: dict[str, list[str]] = {}
    for path in _listed(place):
        if path in used:
            continue
        if path.is_dir():
            inner = path.name not in skipped and not _REPEATS.fullmatch(path.name) and _pictures(path)
            why = "holds pictures that are not used; move them beside the others, or call the folder 1_NAME"
            if not inner:
                continue
        elif path.stem.endswith(_MASK) and path.suffix != ".png":
            why = f"is not used; masks are called NAME{_MASK}.png"
        elif path.suffix.lower() in CAPTIONS or path.stem.endswith(_MASK):
            why = stray or "has no picture of the same name and is not used"
        else:
            why = f"is not used; pictures are {', '.join(SUFFIXES)} files, captions .txt files of the same names"
        lost.setdefault(why, []).append(path.name)
    for why, found in lost.items():
        more = f" (and {counted(len(found) - 1, 'more', 'more')})" if found[1:] else ""
        warnings.warn(f"{place / found[0]}{more} {why}", stacklevel=5)


def _first(found: Sequence[str]) -> str:
    return f"{found[0]} and {len(found) - 1} more" if found[1:] else found[0]
